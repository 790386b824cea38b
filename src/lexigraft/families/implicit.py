"""What the implicit engines share: SentencePiece and tiktoken join any pair that makes a token.

`tokenizer.json` lists merges instead. So a new token must be one that both form alike, with every
way to make it of two tokens listed, and it must not be what a base token waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from lexigraft.families.continued_bpe import Merge


def splits(token: str, known: Iterable[str]) -> list[tuple[str, str]]:
    """Every way to cut `token` into two known pieces."""
    cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in known and right in known]


def ordered_splits(token: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to cut `token` into two tokens, the lowest ids first."""
    # A plain loop: 150,000 tokens have a million cuts, most of them with no token on the left.
    found = []
    for cut in range(1, len(token)):
        left = ids.get(token[:cut])
        if left is not None:
            right = ids.get(token[cut:])
            if right is not None:
                found.append((left, right, cut))
    found.sort()
    return [(token[:cut], token[cut:]) for _, _, cut in found]


def beginnings_and_ends(tokens: Iterable[str]) -> frozenset[str]:
    """Every proper beginning and end of the tokens.

    Were such a string a token, one that is never formed could be formed by it: a base token would
    appear in texts where it never did.
    """
    return frozenset(
        part
        for token in tokens
        for cut in range(1, len(token))
        for part in (token[:cut], token[cut:])
    )


def formed_alike(
    merges: Sequence[Merge],
    ids: Mapping[str, int],
    derived: Callable[[Sequence[Merge]], Iterable[Merge]],
) -> list[Merge]:
    """`merges` that both kinds of engine form alike, each with the parts it is made of.

    Left out are tokens with two splits X+Y and Y+Z (the implicit engine joins the left pair of
    X Y Z, a merge list the pair listed first), and those that are not formed out of their own
    symbols, because another token takes a part of them first: what is joined within a token does
    not depend on what stands around it.

    Args:
        merges: candidates, in rank order.
        ids: the base's tokens.
        derived: merges -> those that are formed, with the parts that they are formed of.
    """
    kept = list(merges)
    while True:
        known = ids.keys() | {merge.token for merge in kept}
        formed = list(derived([m for m in kept if not _is_ambiguous(m.token, known)]))
        if len(formed) == len(kept):
            return formed
        kept = formed


def _is_ambiguous(token: str, known: Iterable[str]) -> bool:
    """True where `token` has two splits X+Y and Y+Z into known pieces."""
    pairs = splits(token, known)
    lefts = dict(pairs)
    return any(right in lefts and (right, lefts[right]) != (left, right) for left, right in pairs)


def last_pair(
    symbols: Sequence[str], places: Mapping[str, int], token: str
) -> tuple[str, str] | None:
    """The two parts that `token` is joined of last, or None if it is not formed.

    Args:
        symbols: its base tokens.
        places: new token -> place in the order of the ranks.
    """
    parts = list(symbols)
    own = places[token]
    while len(parts) > 1:
        ranked = [
            (place, at)
            for at, (left, right) in enumerate(pairwise(parts))
            if (place := places.get(left + right, own + 1)) <= own
        ]
        if not ranked:
            return None
        place, at = min(ranked)
        if place == own:
            return (parts[at], parts[at + 1]) if len(parts) == 2 else None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return None
