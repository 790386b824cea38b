"""The models of a blend, opened, held against each other, and aligned by token text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lexigraft.blending.methods import Array, Mask
from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.fit import open_whole
from lexigraft.checkpoints.header import FLOATS, Tensor
from lexigraft.checkpoints.rows import by_row, read_ids, read_rows, same_values
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap, aligned

# Values of one model in one block; a blend holds some ten such blocks in float64 per writer.
BLOCK_VALUES = 2**19


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        folder: where it lies.
        checkpoint: its config and tensors.
        vocabulary: its vocabulary tensors.
        tokens: its token map.
    """

    folder: Path
    checkpoint: Checkpoint
    vocabulary: VocabularyTensors
    tokens: TokenMap

    @classmethod
    def open(cls, folder: Path) -> Model:
        """Read config, headers and token map.

        Raises:
            RefusalError: quantised weights.
            LexigraftError: a file is missing or damaged, or the model contradicts itself.
        """
        checkpoint, vocabulary = open_whole(folder)
        tokens = TokenMap.read(folder)
        if tokens.tokens > vocabulary.rows:
            raise LexigraftError(
                f"{folder}: {vocabulary.rows:,} rows for {tokens.tokens:,} tokens",
                needed="a row for every token",
                fix=f"lexigraft check {folder}",
            )
        return cls(folder, checkpoint, vocabulary, tokens)

    def table(self, name: str) -> Tensor:
        """A vocabulary tensor; of a tied model, the embedding stands for the head."""
        tied = self.vocabulary.tied and name == self.vocabulary.head_name
        return by_row(self.checkpoint.tensor(self.vocabulary.embeds[0] if tied else name))

    @cached_property
    def body(self) -> dict[str, Tensor]:
        """The tensors outside the vocabulary."""
        vocabulary = {*self.vocabulary.names, self.vocabulary.head_name}
        return {n: t for n, t in self.checkpoint.tensors.items() if n not in vocabulary}


def require_alike(first: Model, others: Sequence[Model]) -> None:
    """The models are of one architecture: the same tensors with the same shapes.

    Raises:
        RefusalError: names the first difference.
    """
    for other in others:
        kinds = [model.checkpoint.config.get("model_type") for model in (first, other)]
        names = [{*m.body, *m.vocabulary.embeds, *m.vocabulary.biases} for m in (first, other)]
        apart = sorted(names[0] ^ names[1])
        found = ""
        if kinds[0] != kinds[1]:
            found = f"{first.folder} is {kinds[0]}, {other.folder} is {kinds[1]}"
        elif apart:
            having, lacking = (first, other) if apart[0] in names[0] else (other, first)
            found = f"{having.folder} has {apart[0]}, {lacking.folder} has not"
        else:
            for name, tensor in first.body.items():
                shape = other.body[name].shape
                if shape != tensor.shape:
                    found = (
                        f"{name} is {list(tensor.shape)} in {first.folder} and {list(shape)} in "
                        f"{other.folder}"
                    )
                    break
            for name in () if found else first.vocabulary.embeds:
                if first.table(name).shape[1:] != other.table(name).shape[1:]:
                    found = f"{name} has another width in {first.folder} than in {other.folder}"
        if found:
            raise RefusalError(
                found,
                needed="models of one architecture and size, that differ in weights and vocabulary",
                fix="name models that were made from the same base",
            )


@dataclass(frozen=True)
class Aligned:
    """One tensor of several models, row by row as the result has them.

    Attributes:
        name: of the tensor in the result.
        shape: in the result, without padding: rows and width, or (rows,).
        tensors: of each model; leading dimensions are joined to rows.
        places: per model, id of the result -> its own row, or -1; None outside the vocabulary.
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    places: tuple[npt.NDArray[np.int64], ...] | None = None

    @property
    def step(self) -> int:
        """Rows of a block, always the same for a shape: what is drawn by chance hangs on it."""
        rows = max(1, self.shape[0])
        return max(1, BLOCK_VALUES // math.prod(self.shape[1:])) if len(self.shape) > 1 else rows

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """The blocks."""
        rows = self.shape[0]
        return [(start, min(start + self.step, rows)) for start in range(0, rows, self.step)]

    def read(self, start: int, stop: int) -> tuple[list[Array], list[Mask]]:
        """Rows [start, stop) of each model in float64, and which of them it has (others are 0)."""
        values, has = [], []
        for place, tensor in enumerate(self.tensors):
            if self.places is None:
                rows = read_rows(tensor, start, stop).astype(np.float64)
                here = np.ones(stop - start, bool)
            else:
                own = self.places[place][start:stop]
                here = own >= 0
                rows = np.zeros((stop - start, *self.shape[1:]))
                rows[here] = read_ids(tensor, own[here].tolist()).astype(np.float64)
            values.append(rows)
            has.append(here)
        return values, has


def body_tensor(name: str, models: Sequence[Model]) -> Aligned:
    """A tensor outside the vocabulary, which `is_blendable`."""
    tensors = tuple(_flat(model.body[name]) for model in models)
    return Aligned(name, tensors[0].shape, tensors)


def is_blendable(name: str, models: Sequence[Model]) -> bool:
    """False for what is no float and the same in all models.

    Raises:
        RefusalError: it is no float and differs.
    """
    tensors = [model.body[name] for model in models]
    if all(tensor.dtype in FLOATS for tensor in tensors):
        return True
    if all(same_values(tensors[0], tensor) for tensor in tensors[1:]):
        return False
    raise RefusalError(
        f"{name} is stored as {tensors[0].dtype} and differs between the models",
        needed="one of " + ", ".join(FLOATS),
        fix="use the models before quantisation",
    )


def _flat(tensor: Tensor) -> Tensor:
    """Fused experts, shape (E, out, in), as (E out, in): blocks stay small."""
    if not tensor.shape:
        return dataclasses.replace(tensor, shape=(1,))
    if len(tensor.shape) < 3:
        return tensor
    return dataclasses.replace(tensor, shape=(math.prod(tensor.shape[:-1]), tensor.shape[-1]))


def places_of(
    models: Sequence[Model], tokens: TokenMap, rows: int
) -> tuple[npt.NDArray[np.int64], ...]:
    """Per model, id of the result -> its own row, or -1 where it has none.

    Args:
        models: of the blend, the base last.
        tokens: the token map of the result.
        rows: how many rows to align. An id that means nothing, in the result as in a model, is the
            same row there: so padding is blended too.
    """
    unused = [token_id for token_id in range(rows) if token_id not in tokens.texts]
    places = []
    for model in models:
        own = np.full(rows, -1, np.int64)
        for token_id, place in aligned(tokens, model.tokens).items():
            own[token_id] = place
        for token_id in unused:
            if token_id < model.vocabulary.rows and token_id not in model.tokens.texts:
                own[token_id] = token_id
        places.append(own)
    return tuple(places)


def vocabulary_tensor(
    name: str, models: Sequence[Model], places: tuple[npt.NDArray[np.int64], ...]
) -> Aligned:
    """A vocabulary tensor under the ids of the result, by `places_of`."""
    tables = tuple(model.table(name) for model in models)
    return Aligned(name, (len(places[0]), *tables[0].shape[1:]), tables, places)
