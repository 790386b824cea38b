"""Rows that training never moved, told from the weights alone.

Tokens that no training text held (`<unused12>`, `<|reserved_special_token_3|>`) have rows that
belong to nothing, and statistics over a table must leave them out. Three signs are taken, each
far from anything that a trained row does, for a trained row must never be left out:

- **vanished**: a norm below 1% of what is usual (zeros, and rows that weight decay has eaten);
- **copies**: eight rows or more with the same bits, as padding and "mean of all" starts leave them;
- **like padding**: rows from `tokens` on are padding and never trained. Where they lie close
  together (weight decay, or an output layer that pushes all unused rows the same way), a used row
  that lies among them was not trained either.

The signs are those of Land & Bartolo 2024 (arXiv 2405.05417), who compare each row with known
unused ones, kept to the clear cases: a row of fresh noise that was never pushed looks like any
other and is not found. Measured on real models, the trained row nearest to vanishing has half the
usual norm (SmolLM2-135M: 0.57, stories260K: 0.54), fifty times the limit.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.rows import ids_in_blocks, in_blocks, widened

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

VANISHED = 0.01  # of the usual norm
COPIES = 8
TIGHT = 0.1  # of the usual distance from the padding rows: how far apart they may lie themselves


class _Padding(NamedTuple):
    center: Array
    radius: float


class RowSizes:
    """Norms of the used rows of a table, and where they lie beside its padding rows.

    Args:
        tensor: shape (R, D).
        tokens: V; rows from here on are padding.
    """

    def __init__(self, tensor: Tensor, tokens: int) -> None:
        self._tensor = tensor
        self._padding = _padding(tensor, tokens)
        self._squares = np.zeros(tokens)
        self._along = np.zeros(tokens if self._padding else 0)

    def see(self, start: int, rows: Array) -> None:
        """Take in rows from `start` on, shape (n, D), float32 or float64."""
        here = slice(start, start + len(rows))
        self._squares[here] = np.einsum("ij,ij->i", rows, rows)
        if self._padding:
            self._along[here] = np.einsum("ij,j->i", rows, self._padding.center.astype(rows.dtype))

    def broken(self) -> list[int]:
        """Ids of rows that hold NaN or infinity, ascending."""
        doubtful = np.flatnonzero(~np.isfinite(self._squares))
        return [
            int(token_id)
            for ids, rows in ids_in_blocks(self._tensor, doubtful)
            for token_id in ids[~np.isfinite(rows.astype(np.float64)).all(axis=1)]
        ]

    def untrained(self) -> Ids:
        """Ids of rows that training never moved, ascending; none where that would be all."""
        norms = np.sqrt(self._squares)
        # A quantile, not the median: half of the rows may be unused.
        usual = np.quantile(norms, 0.9) if norms.size else 0.0
        found = norms <= VANISHED * usual
        found[self._copies()] = True
        if self._padding:
            found[self._among(self._padding)] = True
        return np.flatnonzero(found) if not found.all() else np.empty(0, np.int64)

    def _among(self, padding: _Padding) -> Ids:
        """Ids of rows that lie among the padding rows, if these lie close together."""
        size = float(padding.center @ padding.center)
        squares = self._squares - 2 * self._along + size
        usual = float(np.sqrt(np.maximum(np.median(squares), 0)))
        if padding.radius > TIGHT * usual:
            return np.empty(0, np.int64)
        # Padding lies nearer to its own mean than other rows of its kind do.
        limit = 2 * padding.radius
        # A difference of squares in float32 is not exact: near rows are measured again.
        near = np.flatnonzero(squares <= limit**2 + 1e-4 * (self._squares + size))
        found = [
            ids[np.sqrt(((widened(rows) - padding.center) ** 2).sum(axis=1)) <= limit]
            for ids, rows in ids_in_blocks(self._tensor, near)
        ]
        return np.concatenate(found) if found else near

    def _copies(self) -> Ids:
        """Ids of rows whose bits `COPIES` rows have: told by equal norms, proved by the bits."""
        _, group, counts = np.unique(self._squares, return_inverse=True, return_counts=True)
        candidates = np.flatnonzero(counts[group] >= COPIES)
        digests = [
            hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            for _, rows in ids_in_blocks(self._tensor, candidates)
            for row in rows
        ]
        seen = Counter(digests)
        often = np.array([seen[digest] >= COPIES for digest in digests], bool)
        copies: Ids = candidates[often]
        return copies


def _padding(tensor: Tensor, tokens: int) -> _Padding | None:
    """Mean of the padding rows and how far from it they lie; None for fewer than two."""
    count = tensor.rows - tokens
    if count < 2:
        return None
    total = np.zeros(tensor.shape[1])
    for _, rows in in_blocks(tensor, tokens):
        total += widened(rows).sum(axis=0, dtype=np.float64)
    center = total / count
    radius = max(
        float(np.sqrt(((widened(rows) - center) ** 2).sum(axis=1)).max())
        for _, rows in in_blocks(tensor, tokens)
    )
    return _Padding(center, radius) if np.isfinite(radius) else None
