"""The best LoRA of a difference between two matrices on disk, found in blocks of rows.

Randomised SVD (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1): a few
random columns times D, two power iterations with QR between them, and the SVD of what is left.
Memory is a block of rows and the factors, whatever the matrix's size. Products run in one thread
each, so that bits do not depend on how many there are.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.rows import in_blocks, read_rows
from lexigraft.errors import LexigraftError

# Columns beyond the rank, and power iterations: Halko et al. section 4.2 and 4.5.
OVERSAMPLING = 16
ITERATIONS = 2
# What `auto` begins with.
FIRST_WIDTH = 32


@dataclass(frozen=True)
class Difference:
    """D = tuned - base, shape (m, n), in float32.

    Attributes:
        base: the one matrix; several lie one below the other.
        tuned: the other, in as many pieces of the same shapes.
    """

    base: tuple[Tensor, ...]
    tuned: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return sum(tensor.rows for tensor in self.tuned), self.tuned[0].shape[1]

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows)."""
        above = 0
        for old, new in zip(self.base, self.tuned, strict=True):
            for start, rows in in_blocks(new):
                before = read_rows(old, start, start + len(rows))
                change = torch.from_numpy(rows.astype(np.float32) - before.astype(np.float32))
                yield above + start, change
            above += new.rows

    def square(self) -> float:
        """The squared Frobenius norm."""
        return math.fsum(float(rows.double().square().sum()) for _, rows in self.blocks())

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """D right: (n, l) -> (m, l)."""
        return torch.cat([rows @ right for _, rows in self.blocks()])

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """D' left: (m, l) -> (n, l)."""
        total = torch.zeros(self.shape[1], left.shape[1])
        for start, rows in self.blocks():
            total += rows.T @ left[start : start + len(rows)]
        return total

    def distance(self, left: torch.Tensor, right: torch.Tensor) -> float:
        """The Frobenius norm of D - left right."""
        return math.sqrt(
            math.fsum(
                float((rows - left[start : start + len(rows)] @ right).double().square().sum())
                for start, rows in self.blocks()
            )
        )


@dataclass(frozen=True)
class Factors:
    """D is about left right.

    Attributes:
        left: shape (m, r).
        right: shape (r, n).
        rest: the Frobenius norm of what they leave of D.
        norm: that of D.
    """

    left: torch.Tensor
    right: torch.Tensor
    rest: float
    norm: float

    @property
    def error(self) -> float:
        """The one over the other."""
        return self.rest / self.norm

    @property
    def rank(self) -> int:
        """r."""
        return int(self.left.shape[1])


def factors(difference: Difference, *, rank: int | None, most: float, seed: int) -> Factors | None:
    """The factors of a difference; None where it is zero.

    Args:
        difference: D.
        rank: r, as far as D has so many dimensions; None for the least one whose error is at most
            `most`.
        most: see there.
        seed: of the random columns.

    Raises:
        LexigraftError: a number is not finite.
    """
    square, limit = difference.square(), min(difference.shape)
    tuned = difference.tuned[0]
    if not math.isfinite(square):
        raise LexigraftError(
            f"{tuned.name} of {tuned.path.parent} or of {difference.base[0].path.parent} holds NaN "
            "or infinity",
            needed="finite numbers in both models",
            fix=f"lexigraft check {tuned.path.parent} --deep",
        )
    if square == 0:
        return None
    norm = math.sqrt(square)
    if rank is not None:
        parts = _decomposed(difference, min(rank + OVERSAMPLING, limit), seed)
        return _cut(difference, parts, min(rank, limit), norm)
    width, aim = min(FIRST_WIDTH, limit), most
    parts = _decomposed(difference, width, seed)
    while True:
        fitting = np.flatnonzero(_rest(difference, parts) <= aim * norm)
        if not len(fitting) and width < limit:
            width = min(2 * width, limit)
            parts = _decomposed(difference, width, seed)
            continue
        found = int(fitting[0]) + 1 if len(fitting) else width
        result = _cut(difference, parts, found, norm)
        if result.error <= most or found == limit:
            return result
        aim *= 0.99  # rounding


class _Parts(NamedTuple):
    """The head of a singular value decomposition: U (m, l), l values, V' (l, n)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def _decomposed(difference: Difference, width: int, seed: int) -> _Parts:
    draw = np.random.default_rng([seed, zlib.crc32(difference.tuned[0].name.encode())])
    random = torch.from_numpy(draw.standard_normal((difference.shape[1], width), np.float32))
    basis = _orthonormal(difference.times(random))
    for _ in range(ITERATIONS):
        basis = _orthonormal(difference.times(_orthonormal(difference.transposed_times(basis))))
    right, values, small = torch.linalg.svd(
        difference.transposed_times(basis).double(), full_matrices=False
    )
    return _Parts(basis @ small.T.float(), values, right.T.float())


def _rest(difference: Difference, parts: _Parts) -> np.ndarray[Any, Any]:
    """The Frobenius norm of what the first r values leave of D, for r = 1, 2 ... l.

    What lies outside of the basis is measured: as the difference of two squares, a small one would
    drown in rounding.
    """
    outside = difference.distance(parts.left * parts.values.float(), parts.right)
    squares = parts.values.square().numpy()
    tails = np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)
    rest: np.ndarray[Any, Any] = np.sqrt(tails + outside**2)
    return rest


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(columns)[0]
    return basis


def _cut(difference: Difference, parts: _Parts, rank: int, norm: float) -> Factors:
    """The first `rank` of everything; singular values are shared between both factors."""
    root = parts.values[:rank].sqrt().float()
    left, right = parts.left[:, :rank] * root, root[:, None] * parts.right[:rank]
    return Factors(left, right, difference.distance(left, right), norm)
