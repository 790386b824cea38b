"""Byte-pair segmentation of many short words at once, as an engine with a merge list does it.

The reference engines build an object for each text; counting a corpus needs ids alone. The words
come from the engine's own pre-tokenizer; each is joined here by the base's ranks, the best
adjacent pair first, the leftmost of equals. A test compares the ids with the engine's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lexigraft.families.native import COMPILED, compiled
from lexigraft.families.replay import fill, rank_of, table_size
from lexigraft.families.units import Ints, Symbols

_FEW = 20_000


class Segmenter:
    """A merge list as arrays.

    Args:
        pairs: (left, right) token strings in rank order.
        ids: token -> id.
        letters: single character (as the files spell it) -> id.
        unknown_from: a character that is no token becomes this number plus its code point; None
            where every character is a token.
    """

    def __init__(
        self,
        pairs: Iterable[Sequence[str]],
        ids: Mapping[str, int],
        letters: Mapping[str, int],
        *,
        unknown_from: int | None = None,
    ) -> None:
        rows = [(ids[left], ids[right], ids[left + right]) for left, right in pairs]
        merges = np.array(rows, dtype=np.int64).reshape(-1, 3)
        self.keys: Ints = (merges[:, 0] << 32) | merges[:, 1]
        self.ranks: Symbols = np.arange(len(merges), dtype=np.int32)
        self.results: Ints = np.ascontiguousarray(merges[:, 2])
        self.table: Symbols = np.full(table_size(len(merges)), -1, dtype=np.int32)
        fill(self.table, self.keys)
        base = -1 if unknown_from is None else unknown_from
        self.letters = np.full(0x110000, -1, dtype=np.int64)
        if base >= 0:
            self.letters = base + np.arange(0x110000, dtype=np.int64)
        for letter, token_id in letters.items():
            self.letters[ord(letter)] = token_id

    def run(self, words: Sequence[str]) -> tuple[Ints, Ints]:
        """(n,) ids of all words one after the other, and (w,) the number of ids of each.

        Raises:
            KeyError: a character that is no token.
        """
        counts = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        text = "".join(words)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        rows = self.letters[points]
        if len(rows) and rows.min() < 0:
            raise KeyError(text[int(np.argmin(rows))])
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        lengths = np.zeros(len(words), dtype=np.int64)
        threads = (os.cpu_count() or 1) if COMPILED and len(rows) > _FEW else 1
        edges = [len(words) * part // threads for part in range(threads + 1)]

        def work(part: int) -> None:
            _segment(
                rows, starts, edges[part], edges[part + 1], self.table, self.keys, self.ranks,
                self.results, lengths,
            )  # fmt: skip

        if threads == 1:
            work(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(threads)))
        within = np.arange(len(rows)) - np.repeat(starts[:-1], counts)
        return rows[within < np.repeat(lengths, counts)], lengths


@compiled
def _segment(rows, starts, begin, end, table, keys, ranks, results, lengths) -> None:  # type: ignore[no-untyped-def]
    none = 2**31 - 1
    longest = 1
    for word in range(begin, end):
        longest = max(longest, starts[word + 1] - starts[word])
    best = np.empty(longest, dtype=np.int64)  # rank of the pair that begins here
    for word in range(begin, end):
        first = starts[word]
        size = starts[word + 1] - first
        lowest = none
        for at in range(size - 1):
            best[at] = rank_of(table, keys, ranks, rows[first + at], rows[first + at + 1])
            lowest = min(lowest, best[at])
        while lowest < none:
            at = 0
            while best[at] != lowest:
                at += 1
            rows[first + at] = results[lowest]
            size -= 1
            for later in range(at + 1, size):
                rows[first + later] = rows[first + later + 1]
            for later in range(at + 1, size - 1):
                best[later] = best[later + 1]
            if at > 0:
                best[at - 1] = rank_of(table, keys, ranks, rows[first + at - 1], rows[first + at])
            if at < size - 1:
                best[at] = rank_of(table, keys, ranks, rows[first + at], rows[first + at + 1])
            lowest = none
            for other in range(size - 1):
                lowest = min(lowest, best[other])
        lengths[word] = size
