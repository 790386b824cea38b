"""Merges as tokenizer.json lists them, and what joining pairs by their ranks makes of symbols."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

Pair = tuple[str, str]
Merges = Sequence[str | Sequence[str]]  # each `left right`, or its two parts


def merge_pairs(merges: Merges) -> list[Pair]:
    """The two parts of each merge.

    >>> merge_pairs(["a b", ["c", "d"]])
    [('a', 'b'), ('c', 'd')]
    """
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in split]


def joins(symbols: Iterable[str], rank_of: Callable[[Pair], float | None]) -> list[Pair]:
    """The joins by which `symbols` become one, in their order; [] if they do not, or are one.

    Method: all kinds of BPE (Sennrich et al. 2016, arXiv 1508.07909).

    Args:
        symbols: letters of a token.
        rank_of: a pair -> its rank, the lowest of which is joined first, and the leftmost of
            equals; None where it is never joined.
    """
    parts, found = list(symbols), []
    while len(parts) > 1:
        ranked = [
            (rank, at)
            for at, pair in enumerate(pairwise(parts))
            if (rank := rank_of(pair)) is not None
        ]
        if not ranked:
            return []
        _, at = min(ranked)
        found.append((parts[at], parts[at + 1]))
        parts[at : at + 2] = ["".join(found[-1])]
    return found
