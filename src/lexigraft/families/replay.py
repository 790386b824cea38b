"""What an engine makes of counted units: base symbols in, tokens of the extended vocabulary out.

Byte-pair engines join, in each stretch, the adjacent pair of the best rank, the leftmost first,
until none is left. The same is done here on all units at once, which is how candidates are judged
without writing a tokenizer for each try. The published tokenizer is compared with these counts
(law 4), so the engines themselves stay the judges.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lexigraft.families.continued_bpe import Merge
from lexigraft.families.native import COMPILED, compiled
from lexigraft.families.units import Ints, Symbols, Units

_FEW = 20_000  # symbols below which threads cost more than they save


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
        if merge.right is None and merge.token in numbers:
            adopted[numbers[merge.token]] = rank
            results[rank] = numbers[merge.token]
        else:  # or a letter that these units do not hold
            results[rank] = first + rank
            numbers.setdefault(merge.token, first + rank)
    keys, ranks = _ranked_pairs(merges, numbers, units, adopted, implicit=implicit)
    table = np.full(table_size(len(keys)), -1, dtype=np.int32)
    fill(table, keys)
    emitted = np.zeros(first + len(merges) + 1, dtype=np.int64)
    saved = np.zeros(len(merges) + 1, dtype=np.int64)
    for part_emitted, part_saved in _in_threads(units, table, keys, ranks, results, emitted, saved):
        emitted += part_emitted
        saved += part_saved
    for letter, rank in adopted.items():
        saved[rank] += (units.pending[letter] - 1) * _occurrences(units, letter)
    counts = {merge.token: int(emitted[results[rank]]) for rank, merge in enumerate(merges)}
    return Replayed(counts, saved[:-1])


def _ranked_pairs(
    merges: Sequence[Merge],
    numbers: Mapping[str, int],
    units: Units,
    adopted: Mapping[int, int],
    *,
    implicit: bool,
) -> tuple[Ints, Symbols]:
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
    return np.array(keys, dtype=np.int64), np.array(ranks, dtype=np.int32)


def _in_threads(
    units: Units,
    table: Symbols,
    keys: Ints,
    ranks: Symbols,
    results: Ints,
    emitted: Ints,
    saved: Ints,
) -> Iterable[tuple[Ints, Ints]]:
    """Each thread takes a part of the units; sums of whole numbers know no order."""
    threads = (os.cpu_count() or 1) if COMPILED and len(units.symbols) > _FEW else 1
    edges = [len(units.weights) * part // threads for part in range(threads + 1)]

    def work(part: int) -> tuple[Ints, Ints]:
        own = np.zeros_like(emitted), np.zeros_like(saved)
        _replay(
            units.symbols, units.starts, units.weights, edges[part], edges[part + 1], table, keys,
            ranks, results, own[0], own[1],
        )  # fmt: skip
        return own

    if threads == 1:
        return [work(0)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))


def _occurrences(units: Units, letter: int) -> int:
    places = np.flatnonzero(units.symbols == letter)
    owners = np.searchsorted(units.starts, places, side="right") - 1
    return int(units.weights[owners].sum())


def table_size(pairs: int) -> int:
    """A power of two that leaves most of the table empty."""
    size = 1 << 8
    while size < 3 * pairs:
        size *= 2
    return size


# --- compiled ------------------------------------------------------------------------------------


@compiled
def _slot(key: int, mask: int) -> int:
    # As in continued_bpe: products stay below 2**63.
    mixed = (key >> 32) * 2147483629 + (key & 0xFFFFFFFF) * 2654435
    return (mixed ^ (mixed >> 17)) & mask


@compiled
def fill(table: Symbols, keys: Ints) -> None:
    """Enter the number of each key in an open hash table; of equal keys the first is found."""
    mask = len(table) - 1
    for number in range(len(keys)):
        slot = _slot(keys[number], mask)
        while table[slot] >= 0:
            slot = (slot + 1) & mask
        table[slot] = number


@compiled
def rank_of(table: Symbols, keys: Ints, ranks: Symbols, left: int, right: int) -> int:
    """The rank of a pair; 2**31 - 1 where it is never joined."""
    key = (np.int64(left) << 32) | right
    mask = len(table) - 1
    slot = _slot(key, mask)
    while table[slot] >= 0:
        if keys[table[slot]] == key:
            return ranks[table[slot]]
        slot = (slot + 1) & mask
    return 2**31 - 1


@compiled
def _replay(  # type: ignore[no-untyped-def]
    symbols, starts, weights, begin, end, table, keys, ranks, results, emitted, saved,
) -> None:  # fmt: skip
    none = 2**31 - 1
    longest = 1
    for unit in range(begin, end):
        longest = max(longest, starts[unit + 1] - starts[unit])
    row = np.empty(longest, dtype=np.int64)
    best = np.empty(longest, dtype=np.int64)  # rank of the pair that begins here
    for unit in range(begin, end):
        size = starts[unit + 1] - starts[unit]
        weight = weights[unit]
        lowest = none
        for at in range(size):
            row[at] = symbols[starts[unit] + at]
        for at in range(size - 1):
            best[at] = rank_of(table, keys, ranks, row[at], row[at + 1])
            lowest = min(lowest, best[at])
        while lowest < none:
            at = 0
            while best[at] != lowest:
                at += 1
            row[at] = results[lowest]
            saved[lowest] += weight
            size -= 1
            for later in range(at + 1, size):
                row[later] = row[later + 1]
            for later in range(at + 1, size - 1):
                best[later] = best[later + 1]
            if at > 0:
                best[at - 1] = rank_of(table, keys, ranks, row[at - 1], row[at])
            if at < size - 1:
                best[at] = rank_of(table, keys, ranks, row[at], row[at + 1])
            lowest = none
            for other in range(size - 1):
                lowest = min(lowest, best[other])
        for at in range(size):
            emitted[row[at]] += weight
