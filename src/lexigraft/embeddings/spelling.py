"""The pieces that new tokens are spelled with, and how many characters each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lexigraft.embeddings.methods import Pieces, Weights
from lexigraft.families import Family, TokenMap
from lexigraft.families.spelling import character_width


def spell(base: Family, extended: TokenMap, ids: Sequence[int]) -> list[list[int]]:
    """Per id of `ids`, the base tokens that spell the token; [] for an unused id."""
    return [
        base.pieces(extended.texts[token_id], added=token_id in extended.added)
        if token_id in extended.texts
        else []
        for token_id in ids
    ]


def characters_of(base: Family, pieces: Pieces) -> Weights:
    """Per token, the number of characters in each of its pieces, a leading space included.

    Each byte counts as its share of the character that it is a part of, so that the pieces of a
    token hold as many characters as the token, also where they cut through one.
    """
    return [_characters([base.token_bytes(piece) for piece in spelt]) for spelt in pieces]


def _characters(parts: Sequence[bytes]) -> list[float]:
    """
    >>> _characters([b"ab", "\u60a3".encode()[:1], "\u60a3".encode()[1:]])
    [2.0, 0.3333333333333333, 0.6666666666666666]
    """
    shares: list[float] = []
    width = 1
    for byte in b"".join(parts):
        if not 0x80 <= byte < 0xC0:  # no continuation byte: a character begins
            width = max(1, character_width(byte))
        shares.append(1 / width)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    return [sum(shares[start:stop]) for start, stop in pairwise(ends)]
