"""The passes over one tensor: what needs the whole of it is found first, then blocks are made.

Memory is a few blocks, whatever the model's size. What is drawn by chance hangs on the seed, the
tensor's name, the model and the block alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lexigraft.blending.inputs import Aligned, Model
from lexigraft.blending.methods import (
    Array,
    Largest,
    Mask,
    by_row,
    combined,
    dropped_at_random,
    dropped_by_rank,
    linear,
    slerp_factors,
)
from lexigraft.blending.settings import Parameters, Settings
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.rows import read_ids
from lexigraft.checkpoints.survey import survey


@dataclass(frozen=True)
class Blended:
    """One tensor of the result.

    Attributes:
        aligned: it, in the models and, last, in the base.
        settings: the blend.
        parameters: the numbers for this tensor.
        anchor: the model whose rows stand for ids that have no token.
        new_padding: how many rows without a token lie behind the aligned ones.
        chat_ids: ids whose rows are the chat model's (chat-vector).
    """

    aligned: Aligned
    settings: Settings
    parameters: Parameters
    anchor: Model
    new_padding: int = 0
    chat_ids: frozenset[int] = frozenset()

    def blocks(self) -> Iterator[Array]:
        """Its rows in float64, block by block."""
        make = {
            "linear": self._linear,
            "slerp": self._slerp,
            "task": self._task,
            "chat-vector": self._chat,
        }[self.settings.how.kind]
        for start, rows in make():
            yield self._with_holes(rows, start)
        first = self.aligned.shape[0]
        end = first + self.new_padding
        for start in range(first, end, self.aligned.step):
            yield self._padding(np.arange(start, min(start + self.aligned.step, end)))

    def _with_holes(self, rows: Array, start: int) -> Array:
        """Ids without a token keep the row that they have."""
        if self.aligned.places is None:
            return rows
        known = np.any([own[start : start + len(rows)] >= 0 for own in self.aligned.places], axis=0)
        holes = start + np.flatnonzero(~known)
        if len(holes):
            rows[holes - start] = self._padding(holes)
        return rows

    def _padding(self, ids: npt.NDArray[np.int64]) -> Array:
        """Rows of ids that have no token: the anchor's where it has them, else its mean row."""
        rows = np.empty((len(ids), *self.aligned.shape[1:]))
        held = ids < self._own.rows
        rows[held] = read_ids(self._own, ids[held].tolist()).astype(np.float64)
        if not held.all():
            rows[~held] = self._mean
        return rows

    @cached_property
    def _own(self) -> Tensor:
        return self.anchor.table(self.aligned.name)

    @cached_property
    def _mean(self) -> Array:
        """The mean of the anchor's used rows."""
        mean: Array = survey(self._own, self.anchor.tokens.tokens).mean
        return mean

    def _linear(self) -> Iterator[tuple[int, Array]]:
        for start, stop in self.aligned.ranges:
            values, has = self.aligned.read(start, stop)
            mixed = linear(
                values[:-1], self.parameters.weights, has[:-1], normalise=self.parameters.normalise
            )
            lacking = ~np.any(has[:-1], axis=0)
            mixed[lacking] = values[-1][lacking]  # tokens of the base alone
            yield start, mixed

    def _slerp(self) -> Iterator[tuple[int, Array]]:
        """From the base, which is one of the two, to the other."""
        other = 1 if self.settings.models[0] == self.settings.base else 0
        sums = np.zeros(3)
        for start, stop in self.aligned.ranges:
            values, has = self.aligned.read(start, stop)
            both = has[-1] & has[other]
            one, two = values[-1][both], values[other][both]
            sums += [np.vdot(one, two), np.vdot(one, one), np.vdot(two, two)]
        length = math.sqrt(sums[1]) * math.sqrt(sums[2])
        factors = slerp_factors(self.parameters.t, min(1.0, sums[0] / length) if length else 1.0)
        for start, stop in self.aligned.ranges:
            values, has = self.aligned.read(start, stop)
            mixed = factors[0] * values[-1] + factors[1] * values[other]
            for mine, theirs in ((-1, other), (other, -1)):
                alone = has[mine] & ~has[theirs]
                mixed[alone] = values[mine][alone]
            yield start, mixed

    def _task(self) -> Iterator[tuple[int, Array]]:
        numbers, how = self.parameters, self.settings.how
        for start, stop in self.aligned.ranges:
            base, deltas = self._deltas(start, stop)
            yield (
                start,
                combined(
                    base,
                    [self._thinned(delta, place, start) for place, delta in enumerate(deltas)],
                    numbers.weights,
                    elect=how.elects,
                    normalise=numbers.normalise,
                    scale=numbers.scale,
                ),
            )

    def _deltas(self, start: int, stop: int) -> tuple[Array, list[Array]]:
        """The base's rows, grown, and what each model adds to them.

        A row that the base lacks starts as the plain mean of those of the models that have it; a
        model that lacks a row adds nothing to it.
        """
        values, has = self.aligned.read(start, stop)
        base = _grown(values, has)
        return base, [
            np.where(by_row(here, rows), rows - base, 0)
            for rows, here in zip(values[:-1], has[:-1], strict=True)
        ]

    def _thinned(self, delta: Array, place: int, start: int) -> Array:
        how, numbers = self.settings.how.thinned, self.parameters
        density = numbers.densities[place]
        if how == "magnitude":
            largest = self._largest[place]
            return delta if largest is None else largest.keep(delta)
        if how is None:
            return delta
        name = zlib.crc32(self.aligned.name.encode())
        draw = np.random.default_rng([self.settings.seed, name, place, start])
        if how == "random":
            return dropped_at_random(delta, density, draw, rescale=numbers.rescale)
        epsilon = numbers.epsilons[place]
        return dropped_by_rank(delta, density, epsilon, draw, rescale=numbers.rescale)

    @cached_property
    def _largest(self) -> list[Largest | None]:
        """Per model what TIES keeps: two passes over the tensor; None where all is kept."""
        size = math.prod(self.aligned.shape)
        found = [
            None if density >= 1 else Largest(max(1, int(density * size)) if density > 0 else 0)
            for density in self.parameters.densities
        ]
        for see, end in ((Largest.see, Largest.turn), (Largest.see_again, Largest.settle)):
            for start, stop in self.aligned.ranges if any(found) else ():
                for largest, delta in zip(found, self._deltas(start, stop)[1], strict=True):
                    if largest is not None:
                        see(largest, delta)
            for largest in filter(None, found):
                end(largest)
        return found

    def _chat(self) -> Iterator[tuple[int, Array]]:
        """What was trained on, plus what the chat model adds to the base; its own tokens as are."""
        weight = self.parameters.weights[1] * self.parameters.scale
        for start, stop in self.aligned.ranges:
            (own, chat, base), (has_own, has_chat, has_base) = self.aligned.read(start, stop)
            both = has_chat & has_base
            mixed = own + np.where(by_row(both, own), weight * (chat - base), 0)
            if self.aligned.places is not None:
                is_chat = np.isin(np.arange(start, stop), list(self.chat_ids))
                taken = has_chat & (~has_own | is_chat)
                mixed[taken] = chat[taken]
            yield start, mixed


def _grown(values: list[Array], has: list[Mask]) -> Array:
    """The base's rows; where it lacks one, the mean of those of the models that have it."""
    base, lacking = values[-1], ~has[-1]
    if lacking.any():
        counts = np.sum([here[lacking] for here in has[:-1]], axis=0)
        total = np.sum([rows[lacking] for rows in values[:-1]], axis=0)
        base = base.copy()
        base[lacking] = total / by_row(np.maximum(counts, 1), total)
    return base
