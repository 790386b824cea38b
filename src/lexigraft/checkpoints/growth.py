"""What rows a grown vocabulary tensor has: the one rule that graft and merge share.

Rows are addressed by token id. Letters: V tokens before, T after, N new ones, R rows before, R'
rows after.
Rows [0, V) are the base's, but for ids whose token was replaced, whose rows are new; [V, T) are
new as well, N in all; the base's padding rows from T to R stay as they
were; what is left up to R' is filled with the mean of the trained rows among [0, V), so that k
padding rows of a head take about k/(V+k) of the probability at most (Hewitt 2021).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.architectures import vocabulary_of
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.header import FLOATS, Tensor, numpy_dtype, raw
from lexigraft.checkpoints.plan import Compute, CopyRows, PlannedTensor
from lexigraft.checkpoints.rows import (
    block_rows,
    by_row,
    grown_shape,
    ids_in_blocks,
    in_blocks,
    runs,
)
from lexigraft.checkpoints.untrained import Ids, RowSizes
from lexigraft.errors import LexigraftError

Array = npt.NDArray[Any]
NewRows = Callable[[int, int], Array]  # (start, stop) -> that stretch of the new rows

_PART_VALUES = 2**17


# What the rows of a joined vocabulary are a multiple of, where they become more.
ROW_STEP = 64


@dataclass(frozen=True)
class Growth:
    """From how many rows to how many.

    Attributes:
        rows_before: R.
        first_id: V, the base's tokens (max id + 1), and the first id behind them.
        tokens: T.
        rows: R'.
        replaced: ids below V that have a new token, ascending.
    """

    rows_before: int
    first_id: int
    tokens: int
    rows: int
    replaced: tuple[int, ...] = ()

    @classmethod
    def to(
        cls,
        rows_before: int,
        first_id: int,
        tokens: int,
        pad_to: int,
        replaced: Sequence[int] = (),
    ) -> Growth:
        """Grow to max(rows_before, tokens rounded up to a multiple of `pad_to`).

        >>> Growth.to(128, 100, 105, 64).rows, Growth.to(128, 100, 140, 64).rows
        (128, 192)
        """
        rows = max(rows_before, -(-tokens // pad_to) * pad_to)
        return cls(rows_before, first_id, tokens, rows, tuple(replaced))

    @property
    def new_ids(self) -> list[int]:
        """The N new ids, ascending."""
        return [*self.replaced, *range(self.first_id, self.tokens)]

    @property
    def new_padding(self) -> int:
        """How many rows have no token and did not exist before."""
        return self.rows - max(self.rows_before, self.tokens)

    @property
    def grows(self) -> bool:
        """True if rows or tokens are not as many as before, or old ids have new tokens."""
        return bool(self.replaced) or (self.rows, self.tokens) != (self.rows_before, self.first_id)


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


def grown(
    tensor: Tensor,
    growth: Growth,
    new_rows: NewRows,
    mean: Callable[[], Array],
    *,
    observe: Callable[[memoryview], None] = lambda _: None,
) -> PlannedTensor:
    """The grown `tensor`, to be written.

    Args:
        tensor: the base's vocabulary tensor, R rows (or a (1, R) bias).
        growth: from how many rows to how many.
        new_rows: gives rows [start, stop) of the N new ones, counted from 0 in the order of
            `growth.new_ids`, shape (n, D), in any float type; they are cast to the tensor's.
            Called while writing.
        mean: gives the mean of `survey`, from which new padding rows are made.
            Called while writing, if there are any.
        observe: is shown the bytes of the new rows, block after block, as they are written.
    """
    view = by_row(tensor)
    parts: list[CopyRows | Compute] = []
    old = made = 0  # rows of the result, and new ones, that have a part
    for start, stop in runs(growth.new_ids):
        if start > old:
            parts.append(CopyRows(view, old, start))
        parts.append(_computed(view, stop - start, _from(new_rows, made), observe))
        old, made = stop, made + stop - start
    if growth.rows_before > old:
        parts.append(CopyRows(view, old, growth.rows_before))
    if growth.new_padding:
        parts.append(_computed(view, growth.new_padding, lambda a, b: repeated(mean(), b - a)))
    return PlannedTensor(tensor.name, tensor.dtype, grown_shape(tensor, growth.rows), tuple(parts))


def _from(rows: NewRows, first: int) -> NewRows:
    return lambda start, stop: rows(first + start, first + stop)


def repeated(row: Array, count: int) -> Array:
    """`count` rows that are all `row`."""
    return np.repeat(row[None], count, axis=0)


def _computed(
    tensor: Tensor,
    count: int,
    rows: NewRows,
    observe: Callable[[memoryview], None] = lambda _: None,
) -> Compute:
    def blocks() -> Iterator[Array]:
        for block in _blocks(tensor, count, rows):
            observe(raw(block))
            yield block

    return Compute(count * tensor.row_bytes, blocks)


def _blocks(tensor: Tensor, count: int, rows: NewRows) -> Iterator[Array]:
    dtype, step = numpy_dtype(tensor.dtype), block_rows(tensor)
    for start in range(0, count, step):
        block = rows(start, min(start + step, count))
        yield np.ascontiguousarray(block.astype(dtype, copy=False))


def rows_hash(tensor: Tensor, count: int, rows: NewRows) -> str:
    """SHA-256 of `count` computed rows in the storage type of `tensor`, as they are written."""
    state = hashlib.sha256()
    for block in _blocks(by_row(tensor), count, rows):
        state.update(raw(block))
    return state.hexdigest()
