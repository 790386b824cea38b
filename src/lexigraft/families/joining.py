"""Byte-pair joining by ranked pairs: the compiled loops and tables that all of learning uses.

A key is left * 2**32 + right. A table finds the number of a key: key, number, key, number ...;
-1 where it is empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from lexigraft.families.native import COMPILED, compiled
from lexigraft.families.units import Ints

Result = TypeVar("Result")
_FEW = 20_000  # symbols below which threads cost more than they save


def new_table(keys: int) -> Ints:
    """An empty table for so many keys, at most half full."""
    size = 1 << 8
    while size < 4 * keys:
        size *= 2
    return np.full(size, -1, dtype=np.int64)


def in_threads(rows: int, symbols: int, work: Callable[[int, int], Result]) -> list[Result]:
    """`work(begin, end)` for parts of `rows` rows, which hold so many symbols, on all cores.

    Compiled loops release the interpreter; interpreted ones, and small jobs, take one thread.
    """
    threads = (os.cpu_count() or 1) if COMPILED and symbols > _FEW else 1
    edges = [rows * part // threads for part in range(threads + 1)]
    if threads == 1:
        return [work(0, rows)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, edges[:-1], edges[1:]))


@compiled
def slot_of(table: Ints, key: int) -> int:
    """Where `key` stands in the table, or the empty place where it belongs."""
    # Products stay below 2**63, so that compiled and interpreted arithmetic agree.
    mixed = (key >> 32) * 2147483629 + (key & 0xFFFFFFFF) * 2654435
    mask = (len(table) >> 1) - 1
    slot = (mixed ^ (mixed >> 17)) & mask
    while table[2 * slot] >= 0 and table[2 * slot] != key:
        slot = (slot + 1) & mask
    return 2 * slot


@compiled
def fill(table: Ints, keys: Ints) -> None:
    """Enter the number of each key; of equal keys that of the first."""
    for number in range(len(keys)):
        slot = slot_of(table, keys[number])
        if table[slot] < 0:
            table[slot] = keys[number]
            table[slot + 1] = number


@compiled
def find(table: Ints, key: int) -> int:
    """The number of a key; -1 where it is not in the table."""
    return table[slot_of(table, key) + 1]


@compiled
def _rank(table: Ints, ranks: Ints, left: int, right: int) -> int:
    number = find(table, (np.int64(left) << 32) | right)
    return ranks[number] if number >= 0 else 2**31 - 1


@compiled
def join_row(row, size, best, table, ranks, results, joined, weight) -> int:  # type: ignore[no-untyped-def]
    """Join a row of symbols in place, the best rank first and the leftmost of equals.

    Args:
        row: symbols; those behind the new length are left as they fall.
        size: how many they are.
        best: room for as many ranks.
        table: finds the pairs that are joined.
        ranks: rank of each pair.
        results: symbol that each rank makes.
        joined: for each rank, `weight` is added for each pair joined.
        weight: how often the row stands in the text.

    Returns:
        The new length.
    """
    none = 2**31 - 1
    lowest = none
    for at in range(size - 1):
        best[at] = _rank(table, ranks, row[at], row[at + 1])
        lowest = min(lowest, best[at])
    while lowest < none:
        at = 0
        while best[at] != lowest:
            at += 1
        row[at] = results[lowest]
        joined[lowest] += weight
        size -= 1
        for later in range(at + 1, size):
            row[later] = row[later + 1]
        for later in range(at + 1, size - 1):
            best[later] = best[later + 1]
        if at > 0:
            best[at - 1] = _rank(table, ranks, row[at - 1], row[at])
        if at < size - 1:
            best[at] = _rank(table, ranks, row[at], row[at + 1])
        lowest = none
        for other in range(size - 1):
            lowest = min(lowest, best[other])
    return size
