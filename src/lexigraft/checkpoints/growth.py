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
from typing import TYPE_CHECKING, Any

from lexigraft.checkpoints.header import Tensor, numpy_dtype, raw
from lexigraft.checkpoints.plan import Compute, CopyRows, PlannedTensor
from lexigraft.checkpoints.rows import block_rows, by_row, grown_shape, runs

if TYPE_CHECKING:  # a graft plans, and begins to copy, before it imports numpy
    import numpy.typing as npt

    Array = npt.NDArray[Any]

NewRows = Callable[[int, int], "Array"]  # (start, stop) -> that stretch of the new rows

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
    import numpy as np

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
    import numpy as np

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
