"""The formulas of blending: pure functions over float64 blocks of rows.

Letters: a block has n rows of D numbers; v_i are those of model i, b the base's, d_i = v_i - b.

- linear: sum w_i v_i / sum w_i (Model soups, Wortsman et al. 2022, arXiv:2203.05482).
- slerp: along the great circle between two tensors (Shoemake 1985), as mergekit applies it: the
  angle is that of the whole tensors, seen as vectors; below sin(theta) = 0.03 a straight line.
- task: b + sum w_i d_i (Task arithmetic, Ilharco et al. 2022, arXiv:2212.04089).
- ties: of each d_i only the largest share by magnitude is kept; per number the sign with the
  greater weighted mass is elected, and the d_i of that sign are averaged (Yadav et al. 2023,
  arXiv:2306.01708).
- dare: each number of d_i is dropped with probability 1 - density, the others are divided by
  density (Yu et al. 2023, arXiv:2311.03099).
- della: as dare, but the probability to stay grows with the rank of the magnitude within the row,
  from density - epsilon to density + epsilon, and each is divided by its own; then signs are
  elected as in ties (Deep et al. 2024, arXiv:2406.11617).
- chat-vector: v + w (chat - b) (Huang et al. 2023, arXiv:2310.04799): task arithmetic, with another
  model than the base to add to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
_STRAIGHT = 0.9995  # of |cos theta|, from which mergekit goes straight


@dataclass(frozen=True)
class Method:
    """One way to blend.

    Attributes:
        kind: what is computed at all.
        thinned: which numbers of the d_i stay.
        elects: signs are elected.
        normalises: by default, weights are divided by their sum.
    """

    kind: Literal["linear", "slerp", "task", "chat-vector"]
    thinned: Literal["magnitude", "random", "ranked"] | None = None
    elects: bool = False
    normalises: bool = False


METHODS = {
    "linear": Method("linear", normalises=True),
    "slerp": Method("slerp"),
    "task": Method("task"),
    "ties": Method("task", "magnitude", elects=True, normalises=True),
    "dare": Method("task", "random"),
    "dare_ties": Method("task", "random", elects=True),
    "della": Method("task", "ranked", elects=True, normalises=True),
    "della_linear": Method("task", "ranked"),
    "chat-vector": Method("chat-vector"),
}


def linear(
    values: Sequence[Array], weights: Sequence[float], has: Sequence[Mask], *, normalise: bool
) -> Array:
    """The weighted mean (or, not normalised, sum) of n rows, of each over the models that have it.

    Weights are renormalised for each row: those of the models that have it sum to what all sum to.
    Where the former are all 0, each counts 1. A row that no model has is 0.

    Args:
        values: per model, shape (n, D) or (n,).
        weights: one per model.
        has: per model, which rows it has, shape (n,).
        normalise: divide by the sum of the weights.
    """
    present = np.array(has, np.float64)
    given = present * np.array(weights, np.float64)[:, None]
    silent = ~np.any(given, axis=0)
    given[:, silent] = present[:, silent]
    sums = given.sum(axis=0)
    whole = 1.0 if normalise else float(sum(weights))
    factors = given * (np.where(silent, 1.0, whole) / np.where(sums == 0, 1, sums))
    total = np.zeros_like(values[0])
    for rows, factor in zip(values, factors, strict=True):
        total += by_row(factor, rows) * rows
    return total


def slerp_factors(t: float, cosine: float) -> tuple[float, float]:
    """What the two tensors are multiplied with.

    Args:
        t: 0 for the first, 1 for the second.
        cosine: of the angle between them.

    >>> slerp_factors(0.0, 0.5), slerp_factors(0.25, 1.0)
    ((1.0, 0.0), (0.75, 0.25))
    """
    if abs(cosine) > _STRAIGHT or t in (0.0, 1.0):
        return 1 - t, t
    theta = float(np.arccos(cosine))
    return float(np.sin((1 - t) * theta) / np.sin(theta)), float(np.sin(t * theta) / np.sin(theta))


def combined(
    base: Array,
    deltas: Sequence[Array],
    weights: Sequence[float],
    *,
    elect: bool,
    normalise: bool,
    scale: float,
) -> Array:
    """The base's rows plus what the (thinned) deltas say: task arithmetic, with TIES' election.

    Args:
        base: b, shape (n, D) or (n,).
        deltas: d_i.
        weights: w_i.
        elect: only numbers of the elected sign count, each divided by the weights that agree.
        normalise: divide by the sum of the weights.
        scale: lambda, which the change is multiplied with at the end.
    """
    total, divisor = np.zeros_like(base), np.zeros_like(base)
    if elect:
        mass = np.zeros_like(base)
        for delta, weight in zip(deltas, weights, strict=True):
            mass += weight * delta
        sign = np.where(mass >= 0, 1.0, -1.0)
    for delta, weight in zip(deltas, weights, strict=True):
        change = weight * delta
        agrees = np.sign(change) == sign if elect else np.ones(change.shape, bool)
        total += np.where(agrees, change, 0)
        divisor += np.where(agrees, weight, 0)
    if normalise:
        total /= np.where(np.abs(divisor) < 1e-8, 1, divisor)
    result: Array = base + scale * total
    return result


def dropped_at_random(
    delta: Array, density: float, draw: np.random.Generator, *, rescale: bool
) -> Array:
    """DARE: each number stays with probability `density`, divided by it if `rescale`."""
    if density >= 1:
        return delta
    stays = draw.random(delta.shape) < density
    return np.where(stays, delta / density if rescale else delta, 0)


def dropped_by_rank(
    delta: Array, density: float, epsilon: float, draw: np.random.Generator, *, rescale: bool
) -> Array:
    """DELLA's MagPrune: what is greater within its row stays more likely.

    Args:
        delta: shape (n, D), or (n,), which is one row.
        density: the mean probability to stay.
        epsilon: how far the probabilities reach to both sides of it.
        draw: the source of chance.
        rescale: divide each number that stays by its probability.
    """
    if density >= 1:
        return delta
    rows = np.atleast_2d(np.abs(delta))
    ranks = np.empty(rows.shape)
    order = np.argsort(rows, axis=1, kind="stable")
    np.put_along_axis(ranks, order, np.arange(rows.shape[1], dtype=np.float64)[None], axis=1)
    share = ranks / max(1, rows.shape[1] - 1)
    chance = (density - epsilon + 2 * epsilon * share).reshape(delta.shape)
    stays = draw.random(delta.shape) < chance
    return np.where(stays, delta / chance if rescale else delta, 0)


@dataclass
class Largest:
    """The k largest magnitudes of a tensor that is seen in blocks, three times in the same order.

    Magnitudes are compared in float32, whose bits sort as the numbers do: the first pass counts
    their upper halves, the second the lower halves of those at the limit, the third keeps. Of equal
    ones at the limit the first are kept.

    Attributes:
        count: k.
    """

    count: int
    _high: Any = field(default_factory=lambda: np.zeros(2**16, np.int64))
    _low: Any = field(default_factory=lambda: np.zeros(2**16, np.int64))
    _limit: int = 0
    _equal: int = 0

    def see(self, delta: Array) -> None:
        """First pass."""
        self._high += np.bincount(_bits(delta) >> 16, minlength=2**16)

    def turn(self) -> None:
        """Between the first pass and the second."""
        self._limit, self._equal = _reaching(self._high, self.count)

    def see_again(self, delta: Array) -> None:
        """Second pass."""
        bits = _bits(delta)
        self._low += np.bincount(bits[bits >> 16 == self._limit] & 0xFFFF, minlength=2**16)

    def settle(self) -> None:
        """Between the second pass and the third."""
        low, self._equal = _reaching(self._low, self._equal)
        self._limit = self._limit << 16 | low

    def keep(self, delta: Array) -> Array:
        """Third pass: `delta` with all but the largest set to 0."""
        bits = _bits(delta)
        stays = bits > self._limit
        equal = np.flatnonzero(bits == self._limit)[: self._equal]
        self._equal -= len(equal)
        stays[equal] = True
        return np.where(stays.reshape(delta.shape), delta, 0)


def _bits(delta: Array) -> npt.NDArray[np.int64]:
    return np.abs(delta).astype(np.float32).reshape(-1).view(np.uint32).astype(np.int64)


def _reaching(counts: npt.NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The highest bin from which on there are `wanted`, and how many of its own are among them."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, wanted))
    place = min(place, len(counts) - 1)
    return len(counts) - 1 - place, wanted - int(above[place] - counts[::-1][place])


def by_row(factor: npt.NDArray[Any], rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """One factor per row, shaped to be multiplied with `rows`."""
    return factor.reshape((len(factor), *(1 for _ in rows.shape[1:])))
