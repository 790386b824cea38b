"""Continued byte-pair encoding: new merges after all of the base's, over base segmentations.

Method: Purason et al., "Teaching Old Tokenizers New Words" (arXiv 2512.03989). Pairs of adjacent
symbols are counted over the segmentations that the base itself makes, and the pair that saves
most tokens is merged first. Appended merges come after every base merge, so that any text is
first segmented as before and then coarsened: never longer, and the pieces of a new token are
the concatenation of its parts'.

The counts are kept as in Sennrich et al.'s subword-nmt: a pair knows its places, a merge changes
only its neighbours, and the best pair comes from a heap whose entries are brought up to date
when they are taken out (`pairs`). Whether a pair may be joined is asked once per candidate.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lexigraft.families.units import Unit, Units

__all__ = ["Merge", "Unit", "continue_bpe"]


class Merge(NamedTuple):
    """One new token: `left` + `right`, or an adopted character where `right` is None."""

    token: str
    left: str
    right: str | None
    occurrences: int


def continue_bpe(
    units: Units,
    *,
    join: Callable[[str, str], str | None],
    implicit: bool,
    min_count: int,
    first: Sequence[Merge] = (),
) -> Iterator[Merge]:
    """New merges, best first, until no pair is left that occurs `min_count` times.

    Ties go to the lower left, then the lower right symbol: base tokens in the order of their
    ids, then adopted characters, then new tokens in the order in which they were made.

    Args:
        units: counted stretches of text. Nothing is joined across units, and nothing to a
            pending character before it was adopted.
        join: (left, right) -> the joined token, or None where the two may not be joined.
        implicit: the engine joins every adjacent pair whose concatenation is a token, not only
            the pairs of a merge list (SentencePiece, tiktoken).
        min_count: the least number of occurrences at the time of merging.
        first: merges decided beforehand (terms); they are made first, in their order, and are
            yielded too, with the occurrences found here. Those that occur nowhere are skipped
            when a part of them does not exist.

    Yields:
        One `Merge` per new token, in the order in which the merges must be ranked.
    """
    return _Learner(units, join=join, implicit=implicit, min_count=min_count, decided=first).run()


class _Learner:
    """The state of one learning run, and the Python side of its loop."""

    def __init__(
        self,
        units: Units,
        *,
        join: Callable[[str, str], str | None],
        implicit: bool,
        min_count: int,
        decided: Sequence[Merge],
    ) -> None:
        self.join = join
        self.implicit = implicit
        self.min_count = max(1, min_count)
        self.decided = decided
        self.texts = dict(units.texts)
        self.numbers = {text: symbol for symbol, text in reversed(list(self.texts.items()))}
        self.next = units.next_symbol
        self.made: dict[str, int] = {}
        self.letters = dict(units.pending)
        from lexigraft.families.pairs import Pairs  # compiled loops, for those who learn

        self.pairs = Pairs(units)

    def run(self) -> Iterator[Merge]:
        yield from self._make_decided()
        letters = [
            (-count * (self.letters[letter] - 1), letter, count)
            for letter, count in self.pairs.letter_counts(self.letters).items()
            if count >= self.min_count
        ]
        heapq.heapify(letters)
        while True:
            pair = self.pairs.best(self.min_count)
            gain = self.pairs.count(pair) if pair >= 0 else 0
            # A character is completed before anything is made of it.
            if letters and -letters[0][0] >= gain:
                if pair >= 0:
                    self.pairs.give_back(pair)
                _, letter, count = heapq.heappop(letters)
                if letter in self.letters:
                    yield self._adopt(letter, count)
                continue
            if pair < 0:
                return
            merge = self._try(pair)
            if merge is not None:
                yield merge

    def _adopt(self, letter: int, count: int) -> Merge:
        del self.letters[letter]
        self.pairs.open(letter)
        text = self.texts[letter]
        return Merge(text, text, None, count)

    def _try(self, pair: int) -> Merge | None:
        left, right = self.pairs.parts(pair)
        token = self.join(self.texts[left], self.texts[right])
        if token is None or (token in self.made and not self.implicit):
            self.pairs.ban(pair)
            return None
        known = self.made.get(token)
        count = self.pairs.count(pair)
        self.pairs.merge(pair, self._number(token))
        if known is not None:
            return None
        return Merge(token, self.texts[left], self.texts[right], count)

    def _number(self, token: str) -> int:
        if token not in self.made:
            self.made[token] = self.next
            self.texts[self.next] = token
            self.numbers.setdefault(token, self.next)
            self.next += 1
        return self.made[token]

    def _make_decided(self) -> Iterator[Merge]:
        counts = self.pairs.letter_counts(self.letters)
        for merge in self.decided:
            left = self.numbers.get(merge.left)
            right = None if merge.right is None else self.numbers.get(merge.right)
            if merge.right is None:
                if left in self.letters and left is not None:
                    yield self._adopt(left, counts.get(left, 0))
                elif left is None:  # a letter that these units do not hold
                    self._number(merge.token)
                    yield merge._replace(occurrences=0)
                continue
            if left is None or right is None or {left, right} & self.letters.keys():
                continue
            fresh = merge.token not in self.made
            symbol = self._number(merge.token)
            pair = self.pairs.find(left, right)
            count = self.pairs.count(pair) if pair >= 0 else 0
            if pair >= 0:
                self.pairs.merge(pair, symbol)
            if fresh:
                yield merge._replace(occurrences=count)
