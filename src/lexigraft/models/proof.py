"""The proof of a merge: logits of the result beside those of base + adapter, unmerged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from lexigraft.checkpoints.header import numpy_dtype
from lexigraft.console import working
from lexigraft.models.load import load_model, quiet_transformers

SEQUENCES, LENGTH = 4, 64
# Law: within 1e-4 where weights are float32. A 16-bit result is rounded once per weight, which
# no unmerged model is; what that may cost grows with the logits.
FLOAT32_LIMIT = 1e-4
ROUNDING_STEPS = 16


@dataclass(frozen=True)
class LogitProof:
    """How far apart two models are.

    Attributes:
        difference: the largest difference of two logits.
        limit: the most that rounding explains.
    """

    difference: float
    limit: float


@working("comparing logits")
def compare_merged(
    base: Path,
    adapter: Path,
    merged: Path,
    *,
    base_tokens: int,
    tokens: int,
    adapter_rows: int,
    dtype: str,
    labels: int | None = None,
    replaced: Sequence[int] = (),
) -> LogitProof:
    """Compare `merged` with PEFT's unmerged model on sequences of old and new tokens.

    Logits are those of each position, of a classifier those of its labels.

    Args:
        base: the base, grafted or not; rows that it lacks are taken from `merged` before the
            adapter is put on, which replaces those that it holds.
        adapter: the PEFT adapter.
        merged: the result of the merge.
        base_tokens: tokens of the base's tokenizer.
        tokens: tokens of the result's.
        adapter_rows: rows of the model that the adapter was trained on.
        dtype: safetensors' name of the type that the result is stored in.
        labels: of a classifier, how many labels it has.
        replaced: ids of the base that have another token in the result.

    Raises:
        LexigraftError: transformers cannot load a model.
    """
    new = [*replaced, *range(base_tokens, min(tokens, adapter_rows))]
    lacking = [*replaced, *range(base_tokens, adapter_rows)]
    ids = torch.from_numpy(_sequences(base_tokens, new))
    result, start = (load_model(folder, labels=labels) for folder in (merged, base))
    ours = _logits(result, ids)
    theirs = _logits(_unmerged(start, adapter, result, adapter_rows, lacking), ids)
    width = min(ours.shape[-1], theirs.shape[-1])
    difference = float((ours[..., :width] - theirs[..., :width]).abs().max())
    step = float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)
    limit = max(FLOAT32_LIMIT, ROUNDING_STEPS * step * float(theirs.abs().max()))
    return LogitProof(difference, limit)


def _sequences(old: int, new: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Half of the sequences hold old ids only, the others old and new ones by turns."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, old, (SEQUENCES, LENGTH))
    if new:
        ids[SEQUENCES // 2 :, ::2] = draw.choice(new, (SEQUENCES // 2, LENGTH // 2))
    return ids


def _unmerged(model: Any, adapter: Path, result: Any, rows: int, lacking: Sequence[int]) -> Any:
    from peft import PeftModel

    with quiet_transformers(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT speaks of tied weights, which are compared here
        if rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        for old, new in (
            (model.get_input_embeddings(), result.get_input_embeddings()),
            (model.get_output_embeddings(), result.get_output_embeddings()),
        ):
            if old is None:  # a classifier
                continue
            old.weight[lacking] = new.weight[lacking].to(old.weight)
        return PeftModel.from_pretrained(model, str(adapter)).eval()


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """One sequence at a time: classifiers read a batch by its padding, and these have none."""
    model.config.get_text_config().pad_token_id = None
    with torch.no_grad():
        found = [model(input_ids=one[None].to(model.device)).logits.float().cpu() for one in ids]
    return torch.cat(found)
