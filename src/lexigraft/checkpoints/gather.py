"""Vocabulary tensors with some of their rows, and the same put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.growth import repeated
from lexigraft.checkpoints.header import Tensor, numpy_dtype
from lexigraft.checkpoints.plan import Compute, PlannedTensor
from lexigraft.checkpoints.rows import by_row, grown_shape, in_blocks, read_rows

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]


def gathered(
    tensor: Tensor, ids: Ids, padding: int = 0, mean: Callable[[], Array] | None = None
) -> PlannedTensor:
    """Rows `ids` (ascending) of a vocabulary tensor, and `padding` rows that are all `mean`.

    The whole tensor is read once, in blocks: rows that stay lie scattered in it.
    """
    view = by_row(tensor)
    parts = [Compute(len(ids) * view.row_bytes, lambda: _rows(view, ids))]
    if padding:
        assert mean is not None
        row = mean

        def rows() -> Iterator[Array]:
            yield repeated(row(), padding).astype(numpy_dtype(view.dtype))

        parts.append(Compute(padding * view.row_bytes, rows))
    shape = grown_shape(tensor, len(ids) + padding)
    return PlannedTensor(tensor.name, tensor.dtype, shape, tuple(parts))


def _rows(view: Tensor, ids: Ids) -> Iterator[Array]:
    stays = np.zeros(view.rows, bool)
    stays[ids] = True
    for first, block in in_blocks(view):
        if (here := stays[first : first + len(block)]).any():
            yield np.ascontiguousarray(block[here])


def interleaved(
    tensor: Tensor, kept: Ids, removed: Tensor, removed_ids: Ids, *, like: Tensor
) -> PlannedTensor:
    """The tensor that `gathered` rows `kept` and `removed_ids` of, put together again.

    Args:
        tensor: rows `kept`, in their order, from its first on; what lies behind them is padding.
        kept: ids, ascending.
        removed: rows `removed_ids`, in their order.
        removed_ids: ids, ascending; with `kept` they are 0 to R - 1.
        like: says name and layout.
    """
    stays = np.zeros(len(kept) + len(removed_ids), bool)
    stays[kept] = True
    mine = by_row(tensor)
    # Not `by_row` of it: one removed row looks like a bias stored as (1, V).
    theirs = replace(removed, shape=(len(removed_ids), *mine.shape[1:]))

    def blocks() -> Iterator[Array]:
        at = [0, 0]
        step = max(1, 4 * 2**20 // max(1, mine.row_bytes))
        for first in range(0, len(stays), step):
            here = stays[first : first + step]
            rows = np.empty((len(here), *mine.shape[1:]), numpy_dtype(mine.dtype))
            for side, (source, place) in enumerate(((mine, here), (theirs, ~here))):
                count = int(place.sum())
                rows[place] = read_rows(source, at[side], at[side] + count)
                at[side] += count
            yield rows

    part = Compute(len(stays) * mine.row_bytes, blocks)
    return PlannedTensor(like.name, like.dtype, grown_shape(like, len(stays)), (part,))
