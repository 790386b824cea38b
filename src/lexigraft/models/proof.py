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
from lexigraft.console import note, working
from lexigraft.errors import LexigraftError
from lexigraft.families import load
from lexigraft.manifest import Manifest
from lexigraft.models.load import load_model, quiet_transformers

SEQUENCES, LENGTH = 4, 64
# Read where no manifest keeps a text.
TEXT = "The patient was treated for pneumonia. 患者冠状动脉正常。 Привет, 123 🙂"
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
    """Compare `merged` with PEFT's unmerged model on sequences of old and new tokens, and on text.

    The text is what the manifest of the tokenizer keeps, or a fixed one, and the new words. Logits
    are those of each position, of a classifier those of its labels.

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
    sequences = [*_drawn(base_tokens, new), *_read(merged, new, adapter_rows)]
    result, start = (load_model(folder, labels=labels) for folder in (merged, base))
    unmerged = _unmerged(start, adapter, result, adapter_rows, lacking)
    difference = largest = 0.0
    for ids in map(torch.tensor, sequences):
        ours, theirs = _logits(result, ids), _logits(unmerged, ids)
        width = min(ours.shape[-1], theirs.shape[-1])
        apart = (ours[..., :width] - theirs[..., :width]).abs().max()
        difference = float(torch.maximum(apart, torch.tensor(difference)))  # keeps NaN
        largest = max(largest, float(theirs.abs().max()))
    step = float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)
    return LogitProof(difference, max(FLOAT32_LIMIT, ROUNDING_STEPS * step * largest))


def _read(folder: Path, new: Sequence[int], rows: int) -> list[list[int]]:
    """Text as the tokenizer in `folder` reads it, `LENGTH` ids of each at most, all below `rows`.

    New tokens are read out of their own words, one after another, as text holds them.
    """
    try:
        family = load(folder)
    except LexigraftError as fault:  # a merge takes tokenizers that lexigraft cannot run
        note(f"the proof reads random ids and no text: {fault.found}")
        return []
    record = (Manifest.read(folder) or Manifest()).last("learn")
    kept = [probe.text for probe in record.probe] if record else []
    texts = [" ".join(kept or [TEXT]), family.decode(new[:LENGTH])]
    found = ([i for i in ids if i < rows] for ids in family.encode_batch(texts))
    return [ids[:LENGTH] for ids in found if ids]


def _drawn(old: int, new: Sequence[int]) -> list[list[int]]:
    """Half of the sequences hold old ids only, the others old and new ones by turns."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, old, (SEQUENCES, LENGTH))
    if new:
        ids[SEQUENCES // 2 :, ::2] = draw.choice(new, (SEQUENCES // 2, LENGTH // 2))
    return [one.tolist() for one in ids]


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
    """Of one sequence: classifiers read a batch by its padding, and these have none."""
    model.config.get_text_config().pad_token_id = None
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids[None].to(model.device)).logits.float().cpu()
    return found
