"""Byte-pair segmentation of many short words at once, as an engine with a merge list does it.

The reference engines build an object for each text; counting a corpus needs ids alone. The words
come from the engine's own pre-tokenizer; each is joined here by the base's ranks, the best
adjacent pair first, the leftmost of equals. A test compares the ids with the engine's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lexigraft.families.native import COMPILED, compiled
from lexigraft.families.replay import fill, rank_of, table_size
from lexigraft.families.units import Ints, Symbols

_FEW = 20_000


class Segmenter:
    """A merge list as arrays.

    Args:
        merges: (left, right) token strings, or `left right`, in rank order.
        ids: token -> id.
        letters: (256,) the id of each byte; -1 where it has none.
    """

    def __init__(
        self, merges: Sequence[str | Sequence[str]], ids: Mapping[str, int], letters: Sequence[int]
    ) -> None:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        number = ids.__getitem__
        lefts = np.fromiter((number(left) for left, _ in pairs), np.int64, len(pairs))
        rights = np.fromiter((number(right) for _, right in pairs), np.int64, len(pairs))
        self.keys: Ints = (lefts << 32) | rights
        self.ranks: Symbols = np.arange(len(pairs), dtype=np.int32)
        self.results: Ints = np.fromiter(
            (number(left + right) for left, right in pairs), np.int64, len(pairs)
        )
        self.table: Symbols = np.full(table_size(len(pairs)), -1, dtype=np.int32)
        fill(self.table, self.keys)
        self.letters: Ints = np.array(letters, dtype=np.int64)

    def run(self, words: Sequence[bytes]) -> tuple[Ints, Ints]:
        """(n,) ids of all words one after the other, and (w,) the number of ids of each.

        Raises:
            KeyError: a byte that is no token.
        """
        counts = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        data = np.frombuffer(b"".join(words), dtype=np.uint8)
        rows = self.letters[data]
        if len(rows) and rows.min() < 0:
            raise KeyError(int(data[int(np.argmin(rows))]))
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
