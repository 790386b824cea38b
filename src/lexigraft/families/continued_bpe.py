"""Continued byte-pair encoding: new merges after all of the base's, over base segmentations.

Method: Purason et al., "Teaching Old Tokenizers New Words" (arXiv 2512.03989). Pairs of adjacent
symbols are counted over the segmentations that the base itself makes, and the pair that saves
most tokens is merged first. Appended merges come after every base merge, so that any text is
first segmented as before and then coarsened: never longer, and the pieces of a new token are
the concatenation of its parts'.

Symbols are token strings as the files spell them. A character that the base has no symbol for
(SentencePiece spells it in bytes) takes part as an `Adoptable`: it becomes a symbol of its own
before anything can be joined to it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

Unit = tuple[str, ...]


class Merge(NamedTuple):
    """One new token: `left` + `right`, or an adopted character where `right` is None."""

    token: str
    left: str
    right: str | None
    occurrences: int


def continue_bpe(
    units: Mapping[Unit, int],
    *,
    join: Callable[[str, str], str | None],
    adoptable: Mapping[str, int],
    implicit: bool,
    min_count: int,
) -> Iterator[Merge]:
    """New merges, best first, until no pair is left that occurs `min_count` times.

    Args:
        units: segmentation of a stretch of text -> how often it occurs. Nothing is joined
            across units.
        join: (left, right) -> the joined token, or None where the two may not be joined.
        adoptable: character -> the number of base tokens that spell it now. It stands as one
            symbol in `units`, and may not be joined before it was adopted.
        implicit: the engine joins every adjacent pair whose concatenation is a token, not only
            the pairs of a merge list (SentencePiece).
        min_count: the least number of occurrences at the time of merging.

    Yields:
        One `Merge` per new token, in the order in which the merges must be ranked.
    """
    return _Learner(
        units, join=join, adoptable=adoptable, implicit=implicit, min_count=min_count
    ).run()


class _Learner:
    """Pair counts, where each pair occurs, and a heap of candidates with lazy updates."""

    def __init__(
        self,
        units: Mapping[Unit, int],
        *,
        join: Callable[[str, str], str | None],
        adoptable: Mapping[str, int],
        implicit: bool,
        min_count: int,
    ) -> None:
        ordered = sorted(units.items())  # the order of a hash table must not decide anything
        self.sequences: list[list[str]] = [list(unit) for unit, _ in ordered]
        self.weights = [weight for _, weight in ordered]
        self.join = join
        self.pending = dict(adoptable)
        self.min_count = max(1, min_count)
        self.implicit = implicit
        self.joined: dict[tuple[str, str], str | None] = {}
        self.counts: dict[tuple[str, str], int] = defaultdict(int)
        self.places: dict[tuple[str, str], set[int]] = defaultdict(set)
        self.homes: dict[str, set[int]] = defaultdict(set)
        self.heap: list[tuple[int, str, str]] = []
        self.taken: set[str] = set()

    def run(self) -> Iterator[Merge]:
        characters: dict[str, int] = defaultdict(int)
        for place, sequence in enumerate(self.sequences):
            for symbol in sequence:
                if symbol in self.pending:
                    characters[symbol] += self.weights[place]
                    self.homes[symbol].add(place)
            self._count(place)
        for character, count in characters.items():
            if count >= self.min_count:
                gain = count * (self.pending[character] - 1)
                self.heap.append((-gain, character, ""))
        self.heap.extend((-count, *pair) for pair, count in self.counts.items())
        heapq.heapify(self.heap)
        while self.heap:
            gain, left, right = heapq.heappop(self.heap)
            if not right:
                del self.pending[left]
                yield Merge(left, left, None, characters[left])
                self._open(left)
                continue
            count = self.counts.get((left, right), 0)
            if count != -gain or count < self.min_count:
                continue
            token = self._joined(left, right)
            if token is None:
                continue
            if token not in self.taken:
                self.taken.add(token)
                yield Merge(token, left, right, count)
            elif not self.implicit:
                continue
            self._merge(left, right, token)

    def _joined(self, left: str, right: str) -> str | None:
        if left in self.pending or right in self.pending:
            return None
        pair = (left, right)
        if pair not in self.joined:
            self.joined[pair] = self.join(left, right)
        return self.joined[pair]

    def _count(self, place: int) -> None:
        """Count the pairs of one sequence."""
        weight = self.weights[place]
        for left, right in pairwise(self.sequences[place]):
            if self._joined(left, right) is not None:
                self.counts[left, right] += weight
                self.places[left, right].add(place)

    def _open(self, character: str) -> None:
        """Count the pairs of a character that has just become a symbol."""
        changed: set[tuple[str, str]] = set()
        for place in sorted(self.homes.pop(character)):
            sequence, weight = self.sequences[place], self.weights[place]
            for left, right in pairwise(sequence):
                if character in (left, right) and self._joined(left, right) is not None:
                    self.counts[left, right] += weight
                    self.places[left, right].add(place)
                    changed.add((left, right))
        self._push(changed)

    def _merge(self, left: str, right: str, token: str) -> None:
        changed: set[tuple[str, str]] = set()
        for place in self.places.pop((left, right)):
            self.sequences[place] = self._merge_in(place, left, right, token, changed)
        self.counts.pop((left, right), None)
        self._push(changed)

    def _merge_in(
        self, place: int, left: str, right: str, token: str, changed: set[tuple[str, str]]
    ) -> list[str]:
        """One sequence with the pair merged; the counts of the neighbouring pairs follow."""
        sequence = self.sequences[place]
        merged: list[str] = []
        at, last = 0, len(sequence) - 1
        while at <= last:
            if at < last and sequence[at] == left and sequence[at + 1] == right:
                if merged:
                    self._exchange(place, (merged[-1], left), (merged[-1], token), changed)
                if at + 2 <= last:
                    after = sequence[at + 2]
                    self._exchange(place, (right, after), (token, after), changed)
                merged.append(token)
                at += 2
            else:
                merged.append(sequence[at])
                at += 1
        return merged

    def _exchange(
        self, place: int, old: tuple[str, str], new: tuple[str, str], changed: set[tuple[str, str]]
    ) -> None:
        weight = self.weights[place]
        if self._joined(*old) is not None:
            self.counts[old] -= weight
            changed.add(old)
        if self._joined(*new) is not None:
            self.counts[new] += weight
            self.places[new].add(place)
            changed.add(new)

    def _push(self, pairs: set[tuple[str, str]]) -> None:
        for pair in pairs:
            count = self.counts.get(pair, 0)
            if count >= self.min_count:
                heapq.heappush(self.heap, (-count, *pair))
            elif count <= 0:
                self.counts.pop(pair, None)
                self.places.pop(pair, None)
