"""Which learned merges become tokens: those that the text really emits often enough.

Continued BPE counts a pair when it is merged; longer merges then eat most of some tokens. What
counts for a row is how often its token comes out at the end, so every candidate set is replayed
by the family's own engine before it is accepted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from lexigraft.families import Family
from lexigraft.families.continued_bpe import Merge, Unit, continue_bpe

# A dead token costs a row and buys nothing by itself; more than this share is not worth it.
BRIDGE_SHARE = 0.05
_SPARE = 1.15  # candidates learned per token wanted, to fill the places of those dropped
_ROUNDS = 64


@dataclass(frozen=True)
class Choice:
    """The chosen merges, in rank order, with how often each token comes out.

    Attributes:
        merges: what to append.
        counts: token -> occurrences on the learning text.
    """

    merges: list[Merge]
    counts: Mapping[str, int]

    @property
    def bridges(self) -> frozenset[str]:
        """Tokens that never come out: kept as parts of others only."""
        return frozenset(merge.token for merge in self.merges if not self.counts[merge.token])


def choose(family: Family, units: Mapping[Unit, int], *, limit: int, min_count: int) -> Choice:
    """At most `limit` tokens, each emitted at least `min_count` times unless others need it.

    Leaves (tokens that are no part of another) below `min_count` are dropped and their places
    filled by the next candidates, until none is left. While more than `BRIDGE_SHARE` of the
    choice are dead, what is made of the least useful dead tokens is dropped, so that these come
    out themselves again.
    """
    if limit <= 0:
        return Choice([], {})
    wanted = int(limit * _SPARE) + 64
    learned = list(
        islice(
            continue_bpe(
                units,
                join=family.join,
                adoptable=family.adoptable(units),
                implicit=family.implicit,
                min_count=min_count,
            ),
            wanted,
        )
    )
    candidates = family.admits(learned)
    replay = _Replay(family, units)
    dropped: set[str] = set()
    kept: list[Merge] = []
    counts: Counter[str] = Counter()
    for _ in range(_ROUNDS):
        kept = _first(candidates, dropped, limit)
        counts = replay.count(kept)
        bad = _rare_leaves(kept, counts, min_count) or _excess_bridges(kept, counts)
        if not bad:
            break
        dropped |= bad
    else:  # still unsettled: keep what is certainly alive
        kept = [merge for merge in kept if merge.token not in bad]
        counts = replay.count(kept)
    return Choice(kept, counts)


class _Replay:
    """Counts of new tokens when the family's engine reads the learning text again."""

    def __init__(self, family: Family, units: Mapping[Unit, int]) -> None:
        joined: Counter[str] = Counter()
        for unit, weight in units.items():
            joined["".join(unit)] += weight
        self.family = family
        self.stretches = sorted(joined)
        self.weights = [joined[stretch] for stretch in self.stretches]

    def count(self, merges: Sequence[Merge]) -> Counter[str]:
        counts = Counter({merge.token: 0 for merge in merges})
        emitted = self.family.emitted(merges, self.stretches)
        for tokens, weight in zip(emitted, self.weights, strict=True):
            for token in tokens:
                if token in counts:
                    counts[token] += weight
        return counts


def _first(candidates: Sequence[Merge], dropped: set[str], limit: int) -> list[Merge]:
    """The first `limit` candidates that neither are nor need a dropped token."""
    kept: list[Merge] = []
    gone = set(dropped)
    for merge in candidates:
        if merge.token in gone or merge.left in gone or merge.right in gone:
            gone.add(merge.token)
            continue
        kept.append(merge)
        if len(kept) == limit:
            break
    return kept


def _children(kept: Sequence[Merge]) -> dict[str, set[str]]:
    children: dict[str, set[str]] = defaultdict(set)
    for merge in kept:
        if merge.right is not None:
            children[merge.left].add(merge.token)
            children[merge.right].add(merge.token)
    return children


def _rare_leaves(kept: Sequence[Merge], counts: Mapping[str, int], min_count: int) -> set[str]:
    children = _children(kept)
    return {m.token for m in kept if not children.get(m.token) and counts[m.token] < min_count}


def _excess_bridges(kept: Sequence[Merge], counts: Mapping[str, int]) -> set[str]:
    """What is made of the least useful dead tokens above the allowed share."""
    dead = [merge.token for merge in kept if not counts[merge.token]]
    excess = len(dead) - int(BRIDGE_SHARE * len(kept))
    if excess <= 0:
        return set()
    children = _children(kept)
    families = {token: _descendants(token, children) for token in dead}
    use = {token: sum(counts[t] for t in families[token]) for token in dead}
    weakest = sorted(dead, key=lambda token: (use[token], token))[:excess]
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
