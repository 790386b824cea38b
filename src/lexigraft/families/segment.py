"""Byte-pair segmentation of many short words at once, as an engine with a merge list does it.

The reference engines build an object for each text; counting a corpus needs ids alone. The words
come from the engine's own pre-tokenizer; each is joined here by the base's ranks, the best
adjacent pair first, the leftmost of equals. A test compares the ids with the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lexigraft.families.joining import fill, in_threads, join_row, new_table
from lexigraft.families.merges import Merges, merge_pairs
from lexigraft.families.native import compiled
from lexigraft.families.units import Ints


class Segmenter:
    """A merge list as arrays.

    Args:
        merges: (left, right) token strings, or `left right`, in rank order.
        ids: token -> id.
        letters: (256,) the id of each byte; -1 where it has none.
    """

    def __init__(self, merges: Merges, ids: Mapping[str, int], letters: Sequence[int]) -> None:
        pairs = merge_pairs(merges)
        number = ids.__getitem__
        lefts = np.fromiter((number(left) for left, _ in pairs), np.int64, len(pairs))
        rights = np.fromiter((number(right) for _, right in pairs), np.int64, len(pairs))
        self.ranks: Ints = np.arange(len(pairs), dtype=np.int64)
        self.results: Ints = np.fromiter(
            (number(left + right) for left, right in pairs), np.int64, len(pairs)
        )
        self.table: Ints = new_table(len(pairs))
        fill(self.table, (lefts << 32) | rights)
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

        def work(begin: int, end: int) -> None:
            _segment(rows, starts, begin, end, self.table, self.ranks, self.results, lengths)

        in_threads(len(words), len(rows), work)
        within = np.arange(len(rows)) - np.repeat(starts[:-1], counts)
        return rows[within < np.repeat(lengths, counts)], lengths


@compiled
def _segment(rows, starts, begin, end, table, ranks, results, lengths) -> None:  # type: ignore[no-untyped-def]
    longest = 1
    for word in range(begin, end):
        longest = max(longest, starts[word + 1] - starts[word])
    best = np.empty(longest, dtype=np.int64)
    joined = np.zeros(len(results), dtype=np.int64)  # nobody asks for these counts
    for word in range(begin, end):
        row = rows[starts[word] : starts[word + 1]]
        lengths[word] = join_row(row, len(row), best, table, ranks, results, joined, 1)
