"""An adapter whose rows follow the tokens of a model whose ids have changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.adapters.config import CONFIG
from lexigraft.adapters.folder import WEIGHTS, Adapter
from lexigraft.adapters.keys import Key, parse
from lexigraft.adapters.match import match, vocabulary_name
from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.gather import Ids, gathered
from lexigraft.checkpoints.header import Tensor, numpy_dtype, read_header
from lexigraft.checkpoints.plan import (
    DEFAULT_METADATA,
    Compute,
    Plan,
    PlannedFile,
    PlannedTensor,
)
from lexigraft.checkpoints.rows import read_rows
from lexigraft.checkpoints.survey import survey
from lexigraft.checkpoints.write import write_plan
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import copy_tokenizer
from lexigraft.families.tokenmap import TOKENIZER_FILES
from lexigraft.files import MANIFEST, NEW_TOKENS, read_object, write_json

_ID_KEYS = ("trainable_token_indices", "token_indices")


@dataclass(frozen=True)
class Moving:
    """Where the rows of a model go.

    Attributes:
        checkpoint: the model before.
        vocabulary: its vocabulary tensors.
        places: old id -> new id of the tokens that stay.
        sources: (n,) ids of the rows that stay, padding among them, ascending.
        padding: how many new padding rows follow.
    """

    checkpoint: Checkpoint
    vocabulary: VocabularyTensors
    places: Mapping[int, int]
    sources: Ids
    padding: int


def trained_ids(adapter: Adapter) -> frozenset[int]:
    """Ids whose rows an adapter holds singly."""
    return frozenset(i for ids in adapter.config.token_ids.values() for i in ids)


def remap_adapter(adapter: Adapter, moving: Moving, tokenizer: Path, output: Path) -> None:
    """Write `adapter` for the model under its new ids into the folder `output`.

    Rows of tokens that stay are bit-identical, every other tensor is copied. Padding rows of
    whole matrices are the mean of the rows that stay, LoRA's are 0.

    Args:
        adapter: trained on the model as it was; it fits its tensors.
        moving: where rows go.
        tokenizer: folder with the tokenizer under the new ids, copied where the adapter has one.
        output: an existing empty folder.

    Raises:
        RefusalError: DoRA of an embedding, whose norms run over all rows.
        LexigraftError: it belongs to another model, or to one with more rows.
    """
    match(adapter, moving.checkpoint, moving.vocabulary)
    header = read_header(adapter.weights)
    planned = tuple(_planned(tensor, adapter, moving) for tensor in header.tensors)
    metadata = DEFAULT_METADATA if header.metadata is None else header.metadata
    sources = {tensor.name: tensor for tensor in header.tensors}
    write_plan(Plan((PlannedFile(WEIGHTS, planned, metadata),), None, sources), output)
    config = read_object(adapter.folder / CONFIG)
    write_json(output / CONFIG, {**config, **_moved_ids(config, moving.places)})
    for path in sorted(adapter.folder.iterdir()):
        own = (CONFIG, MANIFEST, NEW_TOKENS, *TOKENIZER_FILES)
        of_weights = path.suffix in (".safetensors", ".bin", ".pt", ".tiktoken")
        if path.is_file() and path.name not in own and not of_weights:
            shutil.copyfile(path, output / path.name)
    if any((adapter.folder / name).is_file() for name in TOKENIZER_FILES):
        copy_tokenizer(tokenizer, output)


def _moved_ids(config: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {module: moved(ids) for module, ids in value.items()}
        return [places[int(token_id)] for token_id in value]

    return {key: moved(config[key]) for key in _ID_KEYS if config.get(key)}


def _planned(tensor: Tensor, adapter: Adapter, moving: Moving) -> PlannedTensor:
    key = parse(tensor.name)
    name = vocabulary_name(key.target, moving.checkpoint, moving.vocabulary)
    axis = None if name is None else _axis(key, tensor, name, moving.vocabulary, adapter)
    if axis is None:
        return PlannedTensor.copy(tensor)
    if tensor.shape[axis] != moving.vocabulary.rows:
        raise LexigraftError(
            f"{tensor.name} of {adapter.folder} has {tensor.shape[axis]:,} rows, the model "
            f"{moving.vocabulary.rows:,}",
            needed="an adapter that was trained on this model, with as many rows",
            fix=f"lexigraft merge {moving.checkpoint.folder} {adapter.folder} -o MERGED, and prune "
            "MERGED",
        )
    if axis == 1:
        return _columns(tensor, moving)
    zero = key.part in ("lora_B", "lora_bias")
    stop = int(moving.sources[-1]) + 1
    mean = partial(_zeros, tensor) if zero else lambda: survey(tensor, stop).mean
    return gathered(tensor, moving.sources, moving.padding, mean)


def _axis(
    key: Key, tensor: Tensor, name: str, vocabulary: VocabularyTensors, adapter: Adapter
) -> int | None:
    """The dimension of a tensor that counts tokens; None where none does."""
    low_rank = adapter.low_rank.get(key.target)
    of_embedding = low_rank is not None and low_rank.of_embedding
    if key.part in ("full", "saved", "original", "base"):
        return 0
    if key.part == "embedding_A":
        return 1
    if key.part == "magnitude" and of_embedding:
        raise RefusalError(
            f"DoRA on {name} was trained with the norms of all rows, some of which would go",
            needed="LoRA of the embedding, or its rows",
            fix=f"lexigraft merge MODEL {adapter.folder} -o MERGED, and prune MERGED",
        )
    is_head = name not in vocabulary.embeds or not of_embedding
    return 0 if key.part in ("lora_B", "lora_bias", "magnitude") and is_head else None


def _zeros(tensor: Tensor) -> npt.NDArray[Any]:
    return np.zeros(tensor.shape[1:])


def _columns(tensor: Tensor, moving: Moving) -> PlannedTensor:
    """LoRA's A of an embedding, shape (r, R): one row of it at a time."""
    dtype = numpy_dtype(tensor.dtype)
    width = len(moving.sources) + moving.padding

    def blocks() -> Iterator[npt.NDArray[Any]]:
        for row in range(tensor.rows):
            values = np.zeros((1, width), dtype)
            values[:, : len(moving.sources)] = read_rows(tensor, row, row + 1)[:, moving.sources]
            yield values

    part = Compute(tensor.rows * width * dtype.itemsize, blocks)
    return PlannedTensor(tensor.name, tensor.dtype, (tensor.rows, width), (part,))
