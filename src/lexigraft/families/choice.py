"""Which learned merges become tokens: those that the text really emits often enough.

Continued BPE counts a pair when it is merged; longer merges then eat most of some tokens. What
counts for a row is how often its token comes out at the end, so every candidate set is replayed
before it is accepted, and the places of those dropped are filled with the next candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np

from lexigraft.families import Family
from lexigraft.families.continued_bpe import Merge, continue_bpe
from lexigraft.families.replay import Replayed
from lexigraft.families.units import Ints, Units

# A dead token costs a row and buys nothing by itself; more than this share is not worth it.
BRIDGE_SHARE = 0.05
_SPARE = 64  # candidates tried beyond the number wanted, at first
_ROUNDS = 64

Judge = Callable[[Sequence[Merge], Mapping[str, int]], set[str]]
Refusal = Callable[[Sequence[Merge]], set[str]]


@dataclass(frozen=True)
class Choice:
    """The chosen merges, in rank order, with how often each token comes out.

    Attributes:
        merges: what to append.
        counts: token -> occurrences on the learning text.
        saved: for each merge, the tokens that the learning text is shorter by.
        detours: tokens that need one part less than when they were learned.
    """

    merges: list[Merge]
    counts: Mapping[str, int]
    saved: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    detours: int = 0

    @cached_property
    def bridges(self) -> frozenset[str]:
        """Tokens that never come out: kept as parts of others only."""
        children = children_of(self.merges)
        return frozenset(t for t in children if t in self.counts and not self.counts[t])


def choose(
    family: Family,
    units: Units,
    *,
    limit: int,
    min_count: int,
    first: Sequence[Merge] = (),
    asked: frozenset[str] = frozenset(),
    pinned: frozenset[str] = frozenset(),
    banned: Callable[[str], bool] = lambda token: False,
    refuse: Refusal | None = None,
    judges: Sequence[Judge] = (),
    budget: int | None = None,
) -> Choice:
    """At most `limit` tokens, each emitted at least `min_count` times unless others need it.

    Leaves (tokens that are no part of another) below `min_count` are dropped and their places
    filled by the next candidates, until none is left. While more than `BRIDGE_SHARE` of the
    budget are dead, what is made of the least useful dead tokens is dropped, so that these come
    out themselves again. Bridges of asked tokens are not counted there: a list is obeyed.

    Args:
        family: the base.
        units: the learning text.
        limit: how many tokens at most.
        min_count: occurrences in the final segmentation.
        first: merges decided beforehand (for the asked tokens), in rank order.
        asked: tokens that a list asks for.
        pinned: those of them that are kept however rare they are.
        banned: token -> whether it may not be made, not even as a part.
        refuse: all candidates so far -> those that are not wanted; asked again with each new
            candidate, since a part is wanted if what is made of it is.
        judges: (kept merges, counts) -> further tokens to drop.
        budget: the number of tokens that bridges are a share of; default: those kept.
    """
    if limit <= 0:
        return Choice([], {})

    def join(left: str, right: str) -> str | None:
        token = family.join(left, right)
        return None if token is None or banned(token) else token

    stream = continue_bpe(
        units, join=join, implicit=family.implicit, min_count=min_count, first=first
    )
    candidates = _Candidates(family, stream, refuse)
    # A character becomes a token without being joined: `join` is not asked.
    dropped = {letter for letter in map(units.texts.__getitem__, units.pending) if banned(letter)}
    decided = frozenset(merge.token for merge in first)
    kept: list[Merge] = []
    replayed = Replayed({}, np.zeros(0, dtype=np.int64))
    for _ in range(_ROUNDS):
        kept = candidates.first(limit, dropped)
        replayed = family.replay(units, kept)
        bad = _rare_leaves(kept, replayed.counts, min_count)
        for judge in judges:
            bad |= judge(kept, replayed.counts)
        bad = (bad | _orphans(kept, asked | pinned, decided)) - with_parts(kept, pinned)
        if not bad:
            allowed = int(BRIDGE_SHARE * (len(kept) if budget is None else budget))
            bad = _excess_bridges(kept, replayed.counts, with_parts(kept, asked), allowed)
        if not bad:
            break
        dropped |= bad
    else:  # still unsettled: keep what is certainly alive
        kept = _without(kept, bad)
        replayed = family.replay(units, kept)
    kept, replayed, detours = _shortened(family, units, kept, replayed, with_parts(kept, pinned))
    while dead := _dead(
        family, units, kept, replayed.counts, min_count=min_count, asked=asked, pinned=pinned,
        decided=decided,
    ):  # fmt: skip
        kept = _without(kept, dead)
        replayed = family.replay(units, kept)
    return Choice(kept, replayed.counts, replayed.saved, detours)


def _dead(
    family: Family,
    units: Units,
    kept: Sequence[Merge],
    counts: Mapping[str, int],
    *,
    min_count: int,
    asked: frozenset[str],
    pinned: frozenset[str],
    decided: frozenset[str],
) -> set[str]:
    """Leaves that come out too rarely, and pinned ones that cannot come out at all.

    A pinned word that the text does not hold is read from its own letters. Where other merges
    take these, its row could never be trained or used: it is dropped, and the lists' table says so.
    """
    rare = _rare_leaves(kept, counts, min_count)
    silent = [merge for merge in kept if merge.token in rare & pinned and not counts[merge.token]]
    own = _spelled(units, kept, silent)
    formed = family.replay(own, kept).counts if own is not None else {}
    good = {token for token in pinned if counts.get(token) or formed.get(token)}
    return (rare - good) | _orphans(kept, asked | pinned, decided)


def _spelled(units: Units, kept: Sequence[Merge], some: Sequence[Merge]) -> Units | None:
    """Units that spell `some` of the kept tokens, each once, in the symbols of `units`."""
    parts = {merge.token: (merge.left, merge.right) for merge in kept if merge.right is not None}
    numbers = {text: symbol for symbol, text in reversed(list(units.texts.items()))}

    def symbols(token: str) -> list[str]:
        left, right = parts.get(token, ("", ""))
        return symbols(left) + symbols(right or "") if left else [token]

    rows = {tuple(symbols(merge.token)): 1 for merge in some}
    if not rows:
        return None
    pending = {units.texts[symbol]: pieces for symbol, pieces in units.pending.items()}
    # Letters that the text does not hold are adopted as those that it holds.
    pending |= {t: len(t.encode()) for row in rows for t in row if t not in numbers}
    known = {text: symbol for text, symbol in numbers.items() if text not in pending}
    return Units.from_tuples(rows, known, pending)


def _orphans(kept: Sequence[Merge], asked: frozenset[str], decided: frozenset[str]) -> set[str]:
    """Merges made for asked tokens that are not kept, and for no others."""
    return {merge.token for merge in kept} & decided - with_parts(kept, asked)


class _Candidates:
    """Learned merges, asked for as they are needed."""

    def __init__(self, family: Family, stream: Iterator[Merge], refuse: Refusal | None) -> None:
        self.family = family
        self.stream = stream
        self.refuse = refuse
        self.learned: list[Merge] = []
        self.admitted: list[Merge] = []

    def first(self, limit: int, dropped: set[str]) -> list[Merge]:
        """The first `limit` candidates that neither are nor need a dropped token."""
        kept = _without(self.admitted, dropped)
        more = limit - len(kept) + _SPARE
        while len(kept) < limit:
            found = list(islice(self.stream, more))
            if not found:
                break
            self.learned += found
            self.admitted = self.family.admits(self.learned)
            if self.refuse is not None:
                self.admitted = _without(self.admitted, self.refuse(self.admitted))
            kept = _without(self.admitted, dropped)
            more *= 2
        return kept[:limit]


def _without(merges: Sequence[Merge], dropped: set[str]) -> list[Merge]:
    kept: list[Merge] = []
    gone = set(dropped)
    for merge in merges:
        if merge.token in gone or merge.left in gone or merge.right in gone:
            gone.add(merge.token)
        else:
            kept.append(merge)
    return kept


def children_of(kept: Sequence[Merge]) -> dict[str, set[str]]:
    """Token -> the kept tokens that it is a part of."""
    children: dict[str, set[str]] = defaultdict(set)
    for merge in kept:
        if merge.right is not None:
            children[merge.left].add(merge.token)
            children[merge.right].add(merge.token)
    return children


def with_parts(kept: Sequence[Merge], tokens: frozenset[str]) -> set[str]:
    """Those of `tokens` that are kept, and all that they are made of."""
    needed: set[str] = set()
    for merge in reversed(kept):  # parts rank before what is made of them
        if merge.token in tokens or merge.token in needed:
            needed |= {merge.token, merge.left, merge.right or merge.left}
    return needed


def _rare_leaves(kept: Sequence[Merge], counts: Mapping[str, int], min_count: int) -> set[str]:
    children = children_of(kept)
    return {m.token for m in kept if not children.get(m.token) and counts[m.token] < min_count}


def _excess_bridges(
    kept: Sequence[Merge], counts: Mapping[str, int], needed: set[str], allowed: int
) -> set[str]:
    """What is made of the least useful dead tokens above the number allowed, nothing `needed`."""
    dead = [m.token for m in kept if not counts[m.token] and m.token not in needed]
    excess = len(dead) - allowed
    if excess <= 0:
        return set()
    children = children_of(kept)
    families = {token: _descendants(token, children) for token in dead}
    use = {token: sum(counts[t] for t in families[token]) for token in dead}
    droppable = [token for token in dead if families[token]]
    weakest = sorted(droppable, key=lambda token: (use[token], token))[:excess]
    return set().union(*(families[token] for token in weakest))


def _descendants(token: str, children: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    stack = [token]
    while stack:
        for child in children.get(stack.pop(), ()):
            if child not in found:
                found.add(child)
                stack.append(child)
    return found


def _shortened(
    family: Family,
    units: Units,
    kept: list[Merge],
    replayed: Replayed,
    needed: set[str],
) -> tuple[list[Merge], Replayed, int]:
    """Take dead tokens out where what is made of them can be made of other parts.

    A dead token is scaffolding: `ab` on the way from `a b c` to `abc`. Where `b c` are joined by
    another token anyway, `abc` can be made of `a` and `bc`. A set of such changes is taken only
    if the text stays at least as short and nothing else falls out of use.
    """
    changed = kept
    dead = [m.token for m in kept if m.right is not None and not replayed.counts[m.token]]
    for token in dead:
        if token not in needed:
            changed = _detour(family, changed, token) or changed
    if len(changed) == len(kept):
        return kept, replayed, 0
    again = family.replay(units, changed)
    alive = {m.token for m in kept if replayed.counts[m.token]}
    if again.saved.sum() < replayed.saved.sum() or not all(again.counts[t] for t in alive):
        return kept, replayed, 0
    return changed, again, len(kept) - len(changed)


def _detour(family: Family, kept: list[Merge], dead: str) -> list[Merge] | None:
    """`kept` without `dead`, its children made of two other parts; None where one cannot be."""
    place = {merge.token: at for at, merge in enumerate(kept)}
    changed = list(kept)
    for at, merge in enumerate(kept):
        if dead not in (merge.left, merge.right):
            continue
        for cut in range(1, len(merge.token)):
            left, right = merge.token[:cut], merge.token[cut:]
            known = [part in family.map.ids or place.get(part, at) < at for part in (left, right)]
            if dead not in (left, right) and all(known) and family.join(left, right) == merge.token:
                changed[at] = merge._replace(left=left, right=right)
                break
        else:
            return None
    del changed[place[dead]]
    return changed
