"""What rows a grown vocabulary tensor has: the one rule that graft and merge share.

Rows are addressed by token id. Letters: V old tokens, N new ones, R rows before, R' rows after.
Rows [0, V) are the base's; [V, V+N) are new; the base's padding rows from V+N to R stay as they
were; what is left up to R' is filled with the mean of the trained rows among [0, V), so that k
padding rows of a head take about k/(V+k) of the probability at most (Hewitt 2021).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.header import Tensor, numpy_dtype, raw
from lexigraft.checkpoints.plan import Compute, CopyRows, PlannedTensor
from lexigraft.checkpoints.rows import block_rows, by_row, grown_shape, ids_in_blocks, in_blocks
from lexigraft.checkpoints.untrained import Ids, RowSizes
from lexigraft.errors import LexigraftError

Array = npt.NDArray[Any]
NewRows = Callable[[int, int], Array]  # (start, stop) -> that stretch of the new rows

_PART_VALUES = 2**17


@dataclass(frozen=True)
class Growth:
    """From how many rows to how many.

    Attributes:
        rows_before: R.
        first_id: V, the base's tokens (max id + 1), and the id of the first new token.
        tokens: V + N.
        rows: R'.
    """

    rows_before: int
    first_id: int
    tokens: int
    rows: int

    @classmethod
    def to(cls, rows_before: int, first_id: int, tokens: int, pad_to: int) -> Growth:
        """Grow to max(rows_before, tokens rounded up to a multiple of `pad_to`).

        >>> Growth.to(128, 100, 105, 64).rows, Growth.to(128, 100, 140, 64).rows
        (128, 192)
        """
        return cls(rows_before, first_id, tokens, max(rows_before, -(-tokens // pad_to) * pad_to))

    @property
    def new_padding(self) -> int:
        """How many rows have no token and did not exist before."""
        return self.rows - max(self.rows_before, self.tokens)

    @property
    def grows(self) -> bool:
        """True if there are more rows or more tokens than before."""
        return (self.rows, self.tokens) != (self.rows_before, self.first_id)


@dataclass(frozen=True)
class Survey:
    """One pass over the used rows of a vocabulary tensor.

    Attributes:
        sha256: hash of the bytes of rows [0, V).
        mean: float64 mean of those of them that were trained, shape (D,), or () for a bias.
        untrained: ids of the rows that training never moved (`untrained.RowSizes`), ascending.
        broken: ids of rows that hold NaN or infinity, ascending.
    """

    sha256: str
    mean: Array
    untrained: Ids
    broken: Sequence[int]


def survey(tensor: Tensor, tokens: int) -> Survey:
    """Hash and float64 mean of rows [0, tokens) of a vocabulary tensor, read in blocks.

    A bias has one number a row, which tells nothing about training: all its rows count.

    Raises:
        LexigraftError: the tensor has fewer rows, or its file became shorter.
    """
    tensor = by_row(tensor)
    state = hashlib.sha256()
    total = np.zeros(tensor.shape[1:], np.float64)
    sizes = RowSizes(tensor, tokens) if len(tensor.shape) > 1 else None
    broken: list[int] = []
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told by name
        for start, block in in_blocks(tensor, 0, tokens):
            state.update(raw(block))
            for first, rows in _wide_parts(block):
                total += rows.sum(axis=0, dtype=np.float64)
                if sizes is None:
                    broken += (start + first + np.flatnonzero(~np.isfinite(rows))).tolist()
                else:
                    sizes.see(start + first, rows)
        if sizes is None:
            return Survey(state.hexdigest(), total / max(1, tokens), np.empty(0, np.int64), broken)
        broken = sizes.broken()
        untrained = np.empty(0, np.int64) if broken else sizes.untrained()
        for _, rows in ids_in_blocks(tensor, untrained):
            total -= rows.astype(np.float64).sum(axis=0)
    mean = total / max(1, tokens - len(untrained))
    return Survey(state.hexdigest(), mean, untrained, broken)


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
        new_rows: gives rows [start, stop) of the N new ones, counted from 0, shape (n, D), in
            any float type; they are cast to the tensor's. Called while writing.
        mean: gives `survey(tensor, growth.first_id).mean`, from which new padding rows are made.
            Called while writing, if there are any.
        observe: is shown the bytes of the new rows, block after block, as they are written.
    """
    view = by_row(tensor)
    parts: list[CopyRows | Compute] = [
        CopyRows(view, 0, growth.first_id),
        _computed(view, growth.tokens - growth.first_id, new_rows, observe),
    ]
    if growth.rows_before > growth.tokens:
        parts.append(CopyRows(view, growth.tokens, growth.rows_before))
    if growth.new_padding:
        parts.append(_computed(view, growth.new_padding, lambda a, b: repeated(mean(), b - a)))
    return PlannedTensor(tensor.name, tensor.dtype, grown_shape(tensor, growth.rows), tuple(parts))


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
