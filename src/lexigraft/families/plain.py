"""Counting and replay in plain Python, for families whose engine is no byte-pair encoder.

Such a family says in token strings what its units are and what its engine makes of a stretch of
text; the arrays of the learner are made of that here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lexigraft.families.continued_bpe import Merge
from lexigraft.families.tokenmap import TokenMap
from lexigraft.families.units import Unit, Units

if TYPE_CHECKING:
    from lexigraft.families.replay import Replayed

_BATCH = 4096


class PlainCounting(ABC):
    """The part of the `Family` protocol that counts and replays units."""

    map: TokenMap

    @abstractmethod
    def units(self, texts: Sequence[str]) -> Iterator[Unit]:
        """Stretches of `texts`, as base tokens, in which new tokens may arise."""

    @abstractmethod
    def adoptable(self, units: Iterable[Unit]) -> Mapping[str, int]:
        """Characters in `units` that have no token -> how many base tokens spell each."""

    @abstractmethod
    def emitted(self, merges: Sequence[Merge], stretches: Sequence[str]) -> list[list[str]]:
        """Tokens of each stretch (units joined) under this tokenizer extended by `merges`."""

    def written(self, text: str) -> list[str]:
        """The spellings in the files of a token that stands for `text`, the usual one first."""
        return [text.replace(" ", "\u2581")]

    def count_units(self, chunks: Mapping[str, int]) -> Units:
        """The stretches of `chunks` (text -> occurrences) in which new tokens may arise."""
        by_weight: dict[int, list[str]] = defaultdict(list)
        for text, weight in chunks.items():
            by_weight[weight].append(text)
        counted: Counter[Unit] = Counter()
        total = 0
        for weight, texts in by_weight.items():
            for start in range(0, len(texts), _BATCH):
                batch = texts[start : start + _BATCH]
                total += weight * sum(map(len, self.encode_batch(batch)))
                for unit in self.units(batch):
                    counted[unit] += weight
        units = Units.from_tuples(counted, self.map.ids, self.adoptable(counted))
        return replace(units, total=total)

    def replay(self, units: Units, merges: Sequence[Merge]) -> Replayed:
        """What the engine of this tokenizer extended by `merges` makes of `units`."""
        counts = {merge.token: 0 for merge in merges}
        counted = units.to_tuples()
        stretches = ["".join(unit) for unit in counted]
        for tokens, weight in zip(self.emitted(merges, stretches), counted.values(), strict=True):
            for token in tokens:
                if token in counts:
                    counts[token] += weight
        pieces = [len(self.pieces(merge.token)) - 1 for merge in merges]
        saved = [counts[m.token] * fewer for m, fewer in zip(merges, pieces, strict=True)]
        from lexigraft.families.replay import Replayed

        return Replayed(counts, np.array(saved, dtype=np.int64))

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def pieces(self, token: str, *, added: bool = False) -> list[int]:
        """Ids that spell `token` in this tokenizer."""
