"""Adjacent pairs of symbols in counted units: how often each occurs, where, and which is best.

The inner loops are compiled (`native`): integers and arrays of integers only. `store` is (keys,
counts, head, stamps, listed, places, links, sizes); `sizes` is [pairs, places, heap, stamp]. A key
is left * 2**32 + right; `table` finds the number of a pair by its key: key, number, key, number ...
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lexigraft.families.native import compiled
from lexigraft.families.units import Ints, Symbols, Units

_BLOCK = 1 << 16


class Pairs:
    """Adjacent pairs of symbols: their counts, their places and a heap of candidates."""

    def __init__(self, units: Units) -> None:
        n = len(units.symbols)
        self.symbols: Symbols = units.symbols.astype(np.int32, copy=True)
        self.after: Symbols = np.arange(1, n + 1, dtype=np.int32)
        self.before: Symbols = np.arange(-1, n - 1, dtype=np.int32)
        if n:
            self.after[units.starts[1:] - 1] = -1
            self.before[units.starts[:-1]] = -1
        self.weights: Ints = np.repeat(units.weights, np.diff(units.starts))
        self.pair_at: Symbols = np.full(n, -1, dtype=np.int32)  # of a symbol and its follower
        self.pending = np.zeros(units.next_symbol + 1, dtype=np.bool_)
        self.pending[list(units.pending)] = True
        # Each merge of two symbols adds two places at most and takes one symbol away: memory
        # that is never written costs nothing.
        most = 3 * n + 16
        self.keys: Ints = np.empty(most, dtype=np.int64)
        self.counts: Ints = np.zeros(most, dtype=np.int64)
        self.head: Symbols = np.empty(most, dtype=np.int32)
        self.stamps: Symbols = np.zeros(most, dtype=np.int32)
        self.listed: Symbols = np.zeros(most, dtype=np.int32)  # places ever listed, by pair
        self.places: Symbols = np.empty(most, dtype=np.int32)
        self.links: Symbols = np.empty(most, dtype=np.int32)
        self.heap_counts: Ints = np.empty(2 * most, dtype=np.int64)
        self.heap_pairs: Symbols = np.empty(2 * most, dtype=np.int32)
        self.sizes: Ints = np.zeros(4, dtype=np.int64)  # pairs, places, heap, stamp
        self.table: Ints = np.full(1 << 12, -1, dtype=np.int64)  # key, pair, key, pair ...
        at = 0
        while at < n:  # a block at a time, since most pairs are seen before
            self._reserve(_BLOCK)
            at = _count_all(
                at, min(n, at + _BLOCK), self.symbols, self.after, self.weights, self.pending,
                self.pair_at, self._store(), self.table,
            )  # fmt: skip
        _heap_all(self.counts, self.keys, self.heap_counts, self.heap_pairs, self.sizes)

    def _store(self) -> tuple[npt.NDArray[np.int64], ...]:
        return (  # type: ignore[return-value]
            self.keys, self.counts, self.head, self.stamps, self.listed, self.places, self.links,
            self.sizes,
        )  # fmt: skip

    def _reserve(self, more: int) -> None:
        """Make the table large enough for `more` new pairs."""
        need = 4 * (int(self.sizes[0]) + more)
        if need > len(self.table):
            size = len(self.table)
            while size < need:
                size *= 2
            self.table = np.full(size, -1, dtype=np.int64)
            _fill_table(self.table, self.keys, int(self.sizes[0]))

    def letter_counts(self, letters: Mapping[int, int]) -> dict[int, int]:
        """How often each pending letter occurs."""
        if not letters:
            return {}
        here = self.pending[self.symbols]
        symbols = self.symbols[here]
        totals = np.bincount(symbols, weights=self.weights[here].astype(np.float64))
        return {letter: int(totals[letter]) for letter in letters if letter < len(totals)}

    def best(self, least: int) -> int:
        """The pair that occurs most often, taken off the heap; -1 if none occurs often enough."""
        return int(
            _best(self.counts, self.keys, self.heap_counts, self.heap_pairs, self.sizes, least)
        )

    def give_back(self, pair: int) -> None:
        """Put a pair that `best` took back on the heap."""
        _push(self.counts, self.keys, self.heap_counts, self.heap_pairs, self.sizes, pair)

    def parts(self, pair: int) -> tuple[int, int]:
        """The two symbols of a pair."""
        key = int(self.keys[pair])
        return key >> 32, key & 0xFFFFFFFF

    def find(self, left: int, right: int) -> int:
        """The number of a pair; -1 if it never occurred."""
        return int(_find(self.table, (left << 32) | right))

    def ban(self, pair: int) -> None:
        """Never offer this pair again. Its count goes, its neighbours stay."""
        self.stamps[pair] = -1

    def merge(self, pair: int, symbol: int) -> None:
        """Replace the pair by `symbol` wherever it stands."""
        if symbol >= len(self.pending):
            self.pending = np.append(self.pending, np.zeros(len(self.pending) + 1, dtype=np.bool_))
        self._reserve(2 * int(self.listed[pair]))
        _merge(
            pair, symbol, self.symbols, self.after, self.before, self.weights, self.pending,
            self.pair_at, self._store(), self.table, self.heap_counts, self.heap_pairs,
        )  # fmt: skip

    def open(self, letter: int) -> None:
        """Count the pairs of a letter that is now a token."""
        self.pending[letter] = False
        places = np.flatnonzero(self.symbols == letter).astype(np.int32)
        self._reserve(2 * len(places))
        _open(
            letter, places, self.symbols, self.after, self.before, self.weights, self.pending,
            self.pair_at, self._store(), self.table, self.heap_counts, self.heap_pairs,
        )  # fmt: skip


@compiled
def _slot(key: int, mask: int) -> int:
    # Products stay below 2**63, so that compiled and interpreted arithmetic agree.
    mixed = (key >> 32) * 2147483629 + (key & 0xFFFFFFFF) * 2654435
    return (mixed ^ (mixed >> 17)) & mask


@compiled
def _find(table: Ints, key: int) -> int:
    mask = (len(table) >> 1) - 1
    slot = _slot(key, mask)
    while table[2 * slot] >= 0:
        if table[2 * slot] == key:
            return table[2 * slot + 1]
        slot = (slot + 1) & mask
    return -1


@compiled
def _fill_table(table: Ints, keys: Ints, count: int) -> None:
    mask = (len(table) >> 1) - 1
    for pair in range(count):
        slot = _slot(keys[pair], mask)
        while table[2 * slot] >= 0:
            slot = (slot + 1) & mask
        table[2 * slot] = keys[pair]
        table[2 * slot + 1] = pair


@compiled
def _add(store, table, key, weight, place, pair_at) -> int:  # type: ignore[no-untyped-def]
    """Count one more occurrence of a pair, at `place`; returns its number."""
    keys, counts, head, _stamps, listed, places, links, sizes = store
    mask = (len(table) >> 1) - 1
    slot = _slot(key, mask)
    while table[2 * slot] >= 0 and table[2 * slot] != key:
        slot = (slot + 1) & mask
    pair = table[2 * slot + 1]
    if pair < 0:
        pair = sizes[0]
        sizes[0] += 1
        table[2 * slot] = key
        table[2 * slot + 1] = pair
        keys[pair] = key
        head[pair] = -1
    node = sizes[1]
    sizes[1] += 1
    places[node] = place
    links[node] = head[pair]
    head[pair] = node
    counts[pair] += weight
    listed[pair] += 1
    pair_at[place] = pair
    return pair


@compiled
def _count_all(  # type: ignore[no-untyped-def]
    begin, end, symbols, after, weights, pending, pair_at, store, table,
) -> int:  # fmt: skip
    for place in range(begin, end):
        follower = after[place]
        if follower < 0 or pending[symbols[place]] or pending[symbols[follower]]:
            continue
        key = (np.int64(symbols[place]) << 32) | symbols[follower]
        _add(store, table, key, weights[place], place, pair_at)
    return end


@compiled
def _is_before(count: int, key: int, other_count: int, other_key: int) -> bool:
    return count > other_count or (count == other_count and key < other_key)


@compiled
def _sift_up(heap_counts: Ints, heap_pairs: Symbols, keys: Ints, at: int) -> None:
    count, pair = heap_counts[at], heap_pairs[at]
    key = keys[pair]
    while at > 0:
        parent = (at - 1) >> 1
        if not _is_before(count, key, heap_counts[parent], keys[heap_pairs[parent]]):
            break
        heap_counts[at], heap_pairs[at] = heap_counts[parent], heap_pairs[parent]
        at = parent
    heap_counts[at], heap_pairs[at] = count, pair


@compiled
def _sift_down(heap_counts: Ints, heap_pairs: Symbols, keys: Ints, at: int, size: int) -> None:
    count, pair = heap_counts[at], heap_pairs[at]
    key = keys[pair]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        other = child + 1
        if other < size and _is_before(
            heap_counts[other], keys[heap_pairs[other]], heap_counts[child], keys[heap_pairs[child]]
        ):
            child = other
        if not _is_before(heap_counts[child], keys[heap_pairs[child]], count, key):
            break
        heap_counts[at], heap_pairs[at] = heap_counts[child], heap_pairs[child]
        at = child
    heap_counts[at], heap_pairs[at] = count, pair


@compiled
def _push(counts, keys, heap_counts, heap_pairs, sizes, pair) -> None:  # type: ignore[no-untyped-def]
    at = sizes[2]
    sizes[2] += 1
    heap_counts[at], heap_pairs[at] = counts[pair], pair
    _sift_up(heap_counts, heap_pairs, keys, at)


@compiled
def _heap_all(counts, keys, heap_counts, heap_pairs, sizes) -> None:  # type: ignore[no-untyped-def]
    size = sizes[0]
    sizes[2] = size
    for pair in range(size):
        heap_counts[pair], heap_pairs[pair] = counts[pair], pair
    for at in range(size // 2 - 1, -1, -1):
        _sift_down(heap_counts, heap_pairs, keys, at, size)


@compiled
def _best(counts, keys, heap_counts, heap_pairs, sizes, least) -> int:  # type: ignore[no-untyped-def]
    # Counts of a pair grow only when it is made, and are then pushed; so an entry is never
    # below the truth, and one above it is brought up to date here.
    while sizes[2] > 0:
        count, pair = heap_counts[0], heap_pairs[0]
        if count == counts[pair] and count >= least and counts[pair] >= 0:
            found = pair
        else:
            found = -1
            if counts[pair] < count and counts[pair] >= least:
                heap_counts[0] = counts[pair]
                _sift_down(heap_counts, heap_pairs, keys, 0, sizes[2])
                continue
        sizes[2] -= 1
        last = sizes[2]
        heap_counts[0], heap_pairs[0] = heap_counts[last], heap_pairs[last]
        if last > 0:
            _sift_down(heap_counts, heap_pairs, keys, 0, last)
        if found >= 0:
            return found
    return -1


@compiled
def _merge(  # type: ignore[no-untyped-def]
    pair, symbol, symbols, after, before, weights, pending, pair_at, store, table,
    heap_counts, heap_pairs,
) -> None:  # fmt: skip
    keys, counts, head, stamps, listed, places, links, sizes = store
    left, right = keys[pair] >> 32, keys[pair] & 0xFFFFFFFF
    standing = np.empty(listed[pair], dtype=np.int32)
    number = 0
    node = head[pair]
    while node >= 0:
        standing[number] = places[node]
        number += 1
        node = links[node]
    if left == right:  # x x x: the left pair is joined, not the right one
        standing.sort()
    counts[pair] = 0
    head[pair] = -1
    listed[pair] = 0
    new_pairs = np.empty(2 * number, dtype=np.int32)
    changed = 0
    sizes[3] += 1
    stamp = sizes[3]
    for at in range(number):
        place = standing[at]
        second = after[place]
        if symbols[place] != left or second < 0 or symbols[second] != right:
            continue
        weight = weights[place]
        previous, following = before[place], after[second]
        if previous >= 0 and pair_at[previous] >= 0:
            counts[pair_at[previous]] -= weight
            pair_at[previous] = -1
        if pair_at[second] >= 0:
            counts[pair_at[second]] -= weight
            pair_at[second] = -1
        pair_at[place] = -1
        symbols[place] = symbol
        symbols[second] = -1
        after[place] = following
        after[second] = -1
        if following >= 0:
            before[following] = place
        if previous >= 0 and not pending[symbols[previous]]:
            key = (np.int64(symbols[previous]) << 32) | symbol
            new = _add(store, table, key, weight, previous, pair_at)
            if stamps[new] != stamp and stamps[new] >= 0:
                stamps[new] = stamp
                new_pairs[changed] = new
                changed += 1
        if following >= 0 and not pending[symbols[following]]:
            key = (np.int64(symbol) << 32) | symbols[following]
            new = _add(store, table, key, weight, place, pair_at)
            if stamps[new] != stamp and stamps[new] >= 0:
                stamps[new] = stamp
                new_pairs[changed] = new
                changed += 1
    counts[pair] = 0
    for at in range(changed):
        _push(counts, keys, heap_counts, heap_pairs, sizes, new_pairs[at])


@compiled
def _open(  # type: ignore[no-untyped-def]
    letter, standing, symbols, after, before, weights, pending, pair_at, store, table,
    heap_counts, heap_pairs,
) -> None:  # fmt: skip
    keys, counts, _head, stamps, _listed, _places, _links, sizes = store
    new_pairs = np.empty(2 * len(standing), dtype=np.int32)
    changed = 0
    sizes[3] += 1
    stamp = sizes[3]
    for place in standing:
        weight = weights[place]
        previous, following = before[place], after[place]
        if following >= 0 and not pending[symbols[following]]:
            key = (np.int64(letter) << 32) | symbols[following]
            new = _add(store, table, key, weight, place, pair_at)
            if stamps[new] != stamp and stamps[new] >= 0:
                stamps[new] = stamp
                new_pairs[changed] = new
                changed += 1
        # Where the letter stands before itself, the pair was counted from there.
        if previous >= 0 and symbols[previous] != letter and not pending[symbols[previous]]:
            key = (np.int64(symbols[previous]) << 32) | letter
            new = _add(store, table, key, weight, previous, pair_at)
            if stamps[new] != stamp and stamps[new] >= 0:
                stamps[new] = stamp
                new_pairs[changed] = new
                changed += 1
    for at in range(changed):
        _push(counts, keys, heap_counts, heap_pairs, sizes, new_pairs[at])
