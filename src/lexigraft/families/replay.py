"""What an engine makes of counted units: base symbols in, tokens of the extended vocabulary out.

Byte-pair engines join, in each stretch, the adjacent pair of the best rank, the leftmost first,
until none is left. The same is done here on all units at once, which is how candidates are judged
without writing a tokenizer for each try. The published tokenizer is compared with these counts
(law 4), so the engines themselves stay the judges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lexigraft.families.continued_bpe import Merge
from lexigraft.families.joining import fill, in_threads, join_row, new_table
from lexigraft.families.native import compiled
from lexigraft.families.units import Ints, Units


@dataclass(frozen=True)
class Replayed:
    """What came out of some units.

    Attributes:
        counts: token -> how often it came out, for each new token.
        saved: for each merge, in rank order, how many tokens fewer the units have through it.
    """

    counts: dict[str, int]
    saved: Ints


def replay(units: Units, merges: Sequence[Merge], *, implicit: bool) -> Replayed:
    """Segment `units` with the base extended by `merges` (in rank order).

    Args:
        units: stretches in base symbols.
        merges: what is appended to the base.
        implicit: the engine joins every pair whose concatenation is a token.
    """
    numbers = {text: symbol for symbol, text in reversed(list(units.texts.items()))}
    first = units.next_symbol
    results = np.zeros(len(merges), dtype=np.int64)  # symbol of each rank
    adopted: dict[int, int] = {}
    for rank, merge in enumerate(merges):
        if merge.right is None and numbers.get(merge.token, -1) in units.pending:
            adopted[numbers[merge.token]] = rank
            results[rank] = numbers[merge.token]
        else:  # or a letter that these units do not hold
            results[rank] = first + rank
            numbers.setdefault(merge.token, first + rank)
    keys, ranks = _ranked_pairs(merges, numbers, units, adopted, implicit=implicit)
    table = new_table(len(keys))
    fill(table, keys)

    def work(begin: int, end: int) -> tuple[Ints, Ints]:
        emitted = np.zeros(first + len(merges) + 1, dtype=np.int64)
        saved = np.zeros(len(merges), dtype=np.int64)
        _replay(
            units.symbols, units.starts, units.weights, begin, end, table, ranks, results, emitted,
            saved,
        )  # fmt: skip
        return emitted, saved

    # Sums of whole numbers know no order.
    parts = in_threads(len(units.weights), len(units.symbols), work)
    emitted, saved = (np.sum([part[one] for part in parts], axis=0) for one in (0, 1))
    for letter, rank in adopted.items():
        saved[rank] += (units.pending[letter] - 1) * _occurrences(units, letter)
    counts = {merge.token: int(emitted[results[rank]]) for rank, merge in enumerate(merges)}
    return Replayed(counts, saved)


def _ranked_pairs(
    merges: Sequence[Merge],
    numbers: Mapping[str, int],
    units: Units,
    adopted: Mapping[int, int],
    *,
    implicit: bool,
) -> tuple[Ints, Ints]:
    """Keys of the pairs that the engine joins, and the rank of each."""
    closed = units.pending.keys() - adopted.keys()
    keys, ranks = [], []
    for rank, merge in enumerate(merges):
        if merge.right is None:
            continue
        pairs: Iterable[tuple[str, str]] = [(merge.left, merge.right)]
        if implicit:
            token = merge.token
            pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        for left, right in pairs:
            a, b = numbers.get(left), numbers.get(right)
            if a is not None and b is not None and a not in closed and b not in closed:
                keys.append((a << 32) | b)
                ranks.append(rank)
    return np.array(keys, dtype=np.int64), np.array(ranks, dtype=np.int64)


def _occurrences(units: Units, letter: int) -> int:
    places = np.flatnonzero(units.symbols == letter)
    owners = np.searchsorted(units.starts, places, side="right") - 1
    return int(units.weights[owners].sum())


@compiled
def _replay(  # type: ignore[no-untyped-def]
    symbols, starts, weights, begin, end, table, ranks, results, emitted, saved,
) -> None:  # fmt: skip
    longest = 1
    for unit in range(begin, end):
        longest = max(longest, starts[unit + 1] - starts[unit])
    row = np.empty(longest, dtype=np.int64)
    best = np.empty(longest, dtype=np.int64)
    for unit in range(begin, end):
        size = starts[unit + 1] - starts[unit]
        for at in range(size):
            row[at] = symbols[starts[unit] + at]
        size = join_row(row, size, best, table, ranks, results, saved, weights[unit])
        for at in range(size):
            emitted[row[at]] += weights[unit]
