"""One pass over the rows of a vocabulary tensor: their hash, their mean, and which mean nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.architectures import vocabulary_of
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.header import FLOATS, Tensor, raw
from lexigraft.checkpoints.rows import by_row, ids_in_blocks, in_blocks
from lexigraft.checkpoints.untrained import Ids, RowSizes
from lexigraft.errors import LexigraftError

Array = npt.NDArray[Any]

_PART_VALUES = 2**17


@dataclass(frozen=True)
class Survey:
    """One pass over the used rows of a vocabulary tensor.

    Attributes:
        sha256: hash of the bytes of rows [0, V), without those that were left out.
        mean: float64 mean of those of them that were trained, shape (D,), or () for a bias.
        untrained: ids of the rows that are not in the mean, ascending: training never moved them
            (`untrained.RowSizes`), or they were left out.
        broken: ids of rows that hold NaN or infinity, ascending.
    """

    sha256: str
    mean: Array
    untrained: Ids
    broken: Sequence[int]


def survey(tensor: Tensor, tokens: int, leave_out: Sequence[int] = ()) -> Survey:
    """Hash and float64 mean of rows [0, tokens) of a vocabulary tensor, read in blocks.

    A bias has one number a row, which tells nothing about training: all its rows count.

    Args:
        tensor: the tensor.
        tokens: V.
        leave_out: ids below V, ascending, whose rows are in neither hash nor mean.

    Raises:
        LexigraftError: the tensor has fewer rows, or its file became shorter.
    """
    tensor = by_row(tensor)
    state = hashlib.sha256()
    total = np.zeros(tensor.shape[1:], np.float64)
    sizes = RowSizes(tensor, tokens) if len(tensor.shape) > 1 else None
    broken: list[int] = []
    apart = np.asarray(leave_out, np.int64)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told by name
        for start, block in in_blocks(tensor, 0, tokens):
            gone = apart[(apart >= start) & (apart < start + len(block))] - start
            state.update(raw(np.delete(block, gone, axis=0) if gone.size else block))
            for first, rows in _wide_parts(block):
                total += rows.sum(axis=0, dtype=np.float64)
                if sizes is None:
                    broken += (start + first + np.flatnonzero(~np.isfinite(rows))).tolist()
                else:
                    sizes.see(start + first, rows)
        if sizes is not None:
            broken = sizes.broken()
        untrained = np.empty(0, np.int64) if sizes is None or broken else sizes.untrained()
        untrained = np.union1d(untrained, apart)
        for _, rows in ids_in_blocks(tensor, untrained):
            total -= rows.astype(np.float64).sum(axis=0)
    mean = total / max(1, tokens - len(untrained))
    return Survey(state.hexdigest(), mean, untrained, broken)


def never_trained(folder: Path, tokens: int) -> frozenset[int] | None:
    """Ids whose row training moved in no vocabulary table of a model, or not in one of two.

    None where the folder holds no weights that can be read.
    """
    try:
        checkpoint = Checkpoint.open(folder)
        vocabulary = vocabulary_of(checkpoint)
    except LexigraftError:
        return None
    found: set[int] = set()
    for name in (*vocabulary.embeds, *vocabulary.heads):
        tensor = checkpoint.tensors[name]
        if tensor.dtype in FLOATS and len(tensor.shape) == 2 and tensor.rows >= tokens:
            found.update(survey(tensor, tokens).untrained.tolist())
    return frozenset(found)


def _wide_parts(block: Array) -> Iterator[tuple[int, Array]]:
    """(first row, rows) of a block in float32 or float64, a few at a time, in one small buffer.

    What is widened stays in the processor's cache until it is summed.
    """
    step = max(1, _PART_VALUES // max(1, block[:1].size))
    kind = np.float64 if block.dtype == np.float64 else np.float32
    buffer = np.empty((min(step, len(block)), *block.shape[1:]), kind)
    for first in range(0, len(block), step):
        rows = buffer[: len(block) - first]
        rows[...] = block[first : first + len(rows)]
        yield first, rows


def require_finite(tensor: Tensor, known: Survey) -> None:
    """Stop where a used row holds NaN or infinity: it would be in every mean.

    Raises:
        LexigraftError: names the tensor and the rows.
    """
    if known.broken:
        shown = ", ".join(map(str, known.broken[:5]))
        more = f" and {len(known.broken) - 5:,} more" if len(known.broken) > 5 else ""
        raise LexigraftError(
            f"{tensor.name} in {tensor.path} holds NaN or infinity in rows {shown}{more}",
            needed="finite numbers in every row that a token has",
            fix="download the model again, or take a checkpoint from before its training failed",
        )
