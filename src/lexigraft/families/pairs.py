"""Adjacent pairs of symbols in counted units: how often each occurs, where, and which is best.

The inner loops are compiled (`native`): integers and arrays of integers only. Memory decides their
speed, so what is read together lies together:

- `cells` (n, 4): of each place its symbol, the place after it, the place before it, and the number
  of the pair that begins there; -1 for none.
- `pairs` (p, 5): of each pair its key (left * 2**32 + right), its count, its last occurrence, how
  many occurrences were listed, and the last merge that offered it (-1: never again).
- `places`, `links`: occurrences, each with the one listed before it.
- `table`: finds the number of a pair by its key (`joining`).
- `sizes`: pairs, occurrences, entries of the heap, merges.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lexigraft.families.joining import fill, find, new_table, slot_of
from lexigraft.families.native import compiled
from lexigraft.families.units import Ints, Symbols, Units

_BLOCK = 1 << 16
_SYMBOL, _AFTER, _BEFORE, _PAIR = range(4)
_KEY, _COUNT, _HEAD, _LISTED, _STAMP = range(5)


class Pairs:
    """Adjacent pairs of symbols: their counts, their places and a heap of candidates."""

    def __init__(self, units: Units) -> None:
        n = len(units.symbols)
        self.cells: Symbols = np.empty((n, 4), dtype=np.int32)
        self.cells[:, _SYMBOL] = units.symbols
        self.cells[:, _AFTER] = np.arange(1, n + 1)
        self.cells[:, _BEFORE] = np.arange(-1, n - 1)
        self.cells[:, _PAIR] = -1
        if n:
            self.cells[units.starts[1:] - 1, _AFTER] = -1
            self.cells[units.starts[:-1], _BEFORE] = -1
        self.weights: Ints = np.repeat(units.weights, np.diff(units.starts))
        self.pending = np.zeros(units.next_symbol + 1, dtype=np.bool_)
        self.pending[list(units.pending)] = True
        # Each merge of two symbols adds two occurrences at most and takes one symbol away: memory
        # that is never written costs nothing.
        most = 3 * n + 16
        self.pairs: Ints = np.empty((most, 5), dtype=np.int64)
        self.places: Symbols = np.empty(most, dtype=np.int32)
        self.links: Symbols = np.empty(most, dtype=np.int32)
        self.heap: Ints = np.empty((2 * most, 2), dtype=np.int64)  # count, pair
        self.sizes: Ints = np.zeros(4, dtype=np.int64)
        self.table: Ints = new_table(0)
        at = 0
        while at < n:  # a block at a time, since most pairs are seen before
            self._reserve(_BLOCK)
            at = _count_all(at, min(n, at + _BLOCK), self.weights, self.pending, *self._store())
        _heap_all(self.pairs, self.heap, self.sizes)

    def _store(self) -> tuple[Symbols, Ints, Symbols, Symbols, Ints, Ints]:
        return self.cells, self.pairs, self.places, self.links, self.sizes, self.table

    def _reserve(self, more: int) -> None:
        """Make the table large enough for `more` new pairs."""
        known = int(self.sizes[0])
        if 4 * (known + more) > len(self.table):
            self.table = new_table(known + more)
            fill(self.table, self.pairs[:known, _KEY].copy())

    def count(self, pair: int) -> int:
        """How often a pair occurs."""
        return int(self.pairs[pair, _COUNT])

    def letter_counts(self, letters: Mapping[int, int]) -> dict[int, int]:
        """How often each pending letter occurs."""
        if not letters:
            return {}
        here = self.pending[self.cells[:, _SYMBOL]]
        symbols = self.cells[here, _SYMBOL]
        totals = np.bincount(symbols, weights=self.weights[here].astype(np.float64))
        return {letter: int(totals[letter]) for letter in letters if letter < len(totals)}

    def best(self, least: int) -> int:
        """The pair that occurs most often, taken off the heap; -1 if none occurs often enough."""
        return int(_best(self.pairs, self.heap, self.sizes, least))

    def give_back(self, pair: int) -> None:
        """Put a pair that `best` took back on the heap."""
        _push(self.pairs, self.heap, self.sizes, pair)

    def parts(self, pair: int) -> tuple[int, int]:
        """The two symbols of a pair."""
        key = int(self.pairs[pair, _KEY])
        return key >> 32, key & 0xFFFFFFFF

    def find(self, left: int, right: int) -> int:
        """The number of a pair; -1 if it never occurred."""
        return int(find(self.table, (left << 32) | right))

    def ban(self, pair: int) -> None:
        """Never offer this pair again. Its count goes, its neighbours stay."""
        self.pairs[pair, _STAMP] = -1

    def merge(self, pair: int, symbol: int) -> None:
        """Replace the pair by `symbol` wherever it stands."""
        if symbol >= len(self.pending):
            self.pending = np.append(self.pending, np.zeros(len(self.pending) + 1, dtype=np.bool_))
        self._reserve(2 * int(self.pairs[pair, _LISTED]))
        _merge(pair, symbol, self.weights, self.pending, self.heap, *self._store())

    def open(self, letter: int) -> None:
        """Count the pairs of a letter that is now a token."""
        self.pending[letter] = False
        places = np.flatnonzero(self.cells[:, _SYMBOL] == letter).astype(np.int32)
        self._reserve(2 * len(places))
        _open(letter, places, self.weights, self.pending, self.heap, *self._store())


# --- compiled ------------------------------------------------------------------------------------


@compiled
def _add(key, weight, place, cells, pairs, places, links, sizes, table) -> int:  # type: ignore[no-untyped-def]
    """Count one more occurrence of a pair, at `place`; returns its number."""
    slot = slot_of(table, key)
    pair = table[slot + 1]
    if pair < 0:
        pair = sizes[0]
        sizes[0] += 1
        table[slot] = key
        table[slot + 1] = pair
        pairs[pair, _KEY] = key
        pairs[pair, _COUNT] = 0
        pairs[pair, _HEAD] = -1
        pairs[pair, _LISTED] = 0
        pairs[pair, _STAMP] = 0
    node = sizes[1]
    sizes[1] += 1
    places[node] = place
    links[node] = pairs[pair, _HEAD]
    pairs[pair, _COUNT] += weight
    pairs[pair, _HEAD] = node
    pairs[pair, _LISTED] += 1
    cells[place, _PAIR] = pair
    return pair


@compiled
def _list(key, weight, place, changed, new, cells, pairs, places, links, sizes, table) -> int:  # type: ignore[no-untyped-def]
    """Count an occurrence in the merge under way; a pair it counts first joins `changed`."""
    made = _add(key, weight, place, cells, pairs, places, links, sizes, table)
    if pairs[made, _STAMP] < 0 or pairs[made, _STAMP] == sizes[3]:
        return new
    pairs[made, _STAMP] = sizes[3]
    changed[new] = made
    return new + 1


@compiled
def _count_all(  # type: ignore[no-untyped-def]
    begin, end, weights, pending, cells, pairs, places, links, sizes, table,
) -> int:  # fmt: skip
    for place in range(begin, end):
        follower = cells[place, _AFTER]
        if follower < 0 or pending[cells[place, _SYMBOL]] or pending[cells[follower, _SYMBOL]]:
            continue
        key = (np.int64(cells[place, _SYMBOL]) << 32) | cells[follower, _SYMBOL]
        _add(key, weights[place], place, cells, pairs, places, links, sizes, table)
    return end


@compiled
def _is_before(count: int, key: int, other_count: int, other_key: int) -> bool:
    return count > other_count or (count == other_count and key < other_key)


@compiled
def _sift_up(heap: Ints, pairs: Ints, at: int) -> None:
    count, pair = heap[at, 0], heap[at, 1]
    key = pairs[pair, _KEY]
    while at > 0:
        parent = (at - 1) >> 1
        if not _is_before(count, key, heap[parent, 0], pairs[heap[parent, 1], _KEY]):
            break
        heap[at, 0], heap[at, 1] = heap[parent, 0], heap[parent, 1]
        at = parent
    heap[at, 0], heap[at, 1] = count, pair


@compiled
def _sift_down(heap: Ints, pairs: Ints, at: int, size: int) -> None:
    count, pair = heap[at, 0], heap[at, 1]
    key = pairs[pair, _KEY]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        other = child + 1
        if other < size and _is_before(
            heap[other, 0], pairs[heap[other, 1], _KEY], heap[child, 0], pairs[heap[child, 1], _KEY]
        ):
            child = other
        if not _is_before(heap[child, 0], pairs[heap[child, 1], _KEY], count, key):
            break
        heap[at, 0], heap[at, 1] = heap[child, 0], heap[child, 1]
        at = child
    heap[at, 0], heap[at, 1] = count, pair


@compiled
def _push(pairs: Ints, heap: Ints, sizes: Ints, pair: int) -> None:
    at = sizes[2]
    sizes[2] += 1
    heap[at, 0], heap[at, 1] = pairs[pair, _COUNT], pair
    _sift_up(heap, pairs, at)


@compiled
def _heap_all(pairs: Ints, heap: Ints, sizes: Ints) -> None:
    size = sizes[0]
    sizes[2] = size
    for pair in range(size):
        heap[pair, 0], heap[pair, 1] = pairs[pair, _COUNT], pair
    for at in range(size // 2 - 1, -1, -1):
        _sift_down(heap, pairs, at, size)


@compiled
def _best(pairs: Ints, heap: Ints, sizes: Ints, least: int) -> int:
    # Counts of a pair grow only when it is made, and are then pushed; so an entry is never
    # below the truth, and one above it is brought up to date here.
    while sizes[2] > 0:
        count, pair = heap[0, 0], heap[0, 1]
        if count == pairs[pair, _COUNT] and count >= least:
            found = pair
        else:
            found = np.int64(-1)
            if least <= pairs[pair, _COUNT] < count:
                heap[0, 0] = pairs[pair, _COUNT]
                _sift_down(heap, pairs, 0, sizes[2])
                continue
        sizes[2] -= 1
        last = sizes[2]
        heap[0, 0], heap[0, 1] = heap[last, 0], heap[last, 1]
        if last > 0:
            _sift_down(heap, pairs, 0, last)
        if found >= 0:
            return found
    return -1


@compiled
def _merge(  # type: ignore[no-untyped-def]
    pair, symbol, weights, pending, heap, cells, pairs, places, links, sizes, table,
) -> None:  # fmt: skip
    left, right = pairs[pair, _KEY] >> 32, pairs[pair, _KEY] & 0xFFFFFFFF
    standing = np.empty(pairs[pair, _LISTED], dtype=np.int32)
    number = 0
    node = pairs[pair, _HEAD]
    while node >= 0:
        standing[number] = places[node]
        number += 1
        node = np.int64(links[node])
    if left == right:  # x x x: the left pair is joined, not the right one
        standing.sort()
    pairs[pair, _HEAD] = -1
    pairs[pair, _LISTED] = 0
    changed = np.empty(2 * number, dtype=np.int64)
    new = 0
    sizes[3] += 1
    for at in range(number):
        place = standing[at]
        second = cells[place, _AFTER]
        if cells[place, _SYMBOL] != left or second < 0 or cells[second, _SYMBOL] != right:
            continue
        weight = weights[place]
        previous, following = cells[place, _BEFORE], cells[second, _AFTER]
        if previous >= 0 and cells[previous, _PAIR] >= 0:
            pairs[cells[previous, _PAIR], _COUNT] -= weight
            cells[previous, _PAIR] = -1
        if cells[second, _PAIR] >= 0:
            pairs[cells[second, _PAIR], _COUNT] -= weight
            cells[second, _PAIR] = -1
        cells[place, _SYMBOL] = symbol
        cells[place, _AFTER] = following
        cells[place, _PAIR] = -1
        cells[second, _SYMBOL] = -1
        cells[second, _AFTER] = -1
        if following >= 0:
            cells[following, _BEFORE] = place
        if previous >= 0 and not pending[cells[previous, _SYMBOL]]:
            key = (np.int64(cells[previous, _SYMBOL]) << 32) | symbol
            new = _list(
                key, weight, previous, changed, new, cells, pairs, places, links, sizes, table
            )
        if following >= 0 and not pending[cells[following, _SYMBOL]]:
            key = (np.int64(symbol) << 32) | cells[following, _SYMBOL]
            new = _list(key, weight, place, changed, new, cells, pairs, places, links, sizes, table)
    pairs[pair, _COUNT] = 0
    for at in range(new):
        _push(pairs, heap, sizes, changed[at])


@compiled
def _open(  # type: ignore[no-untyped-def]
    letter, standing, weights, pending, heap, cells, pairs, places, links, sizes, table,
) -> None:  # fmt: skip
    changed = np.empty(2 * len(standing), dtype=np.int64)
    new = 0
    sizes[3] += 1
    for place in standing:
        weight = weights[place]
        previous, following = cells[place, _BEFORE], cells[place, _AFTER]
        if following >= 0 and not pending[cells[following, _SYMBOL]]:
            key = (np.int64(letter) << 32) | cells[following, _SYMBOL]
            new = _list(key, weight, place, changed, new, cells, pairs, places, links, sizes, table)
        # Where the letter stands before itself, the pair was counted from there.
        if (
            previous >= 0
            and cells[previous, _SYMBOL] != letter
            and not pending[cells[previous, _SYMBOL]]
        ):
            key = (np.int64(cells[previous, _SYMBOL]) << 32) | letter
            new = _list(
                key, weight, previous, changed, new, cells, pairs, places, links, sizes, table
            )
    for at in range(new):
        _push(pairs, heap, sizes, changed[at])
