"""The order in which texts are read in training: the same for every tokenizer.

Documents are ordered by a hash of seed, pass and content, general text is mixed in by bytes,
and everything is cut at the same byte, so that two models with different vocabularies read the
same text at the same point.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice

from lexigraft.families import Family
from lexigraft.models.bits import windows

# General documents can be whole chapters; in pieces of this size they mix evenly.
GENERAL_PIECE_BYTES = 1024
_BATCH = 256  # documents per call of the tokenizer's parallel encoder


def shuffled(documents: Iterable[str], seed: int, turn: int = 0) -> list[str]:
    """`documents` in an order that depends on `seed`, `turn` and their content alone."""

    def key(document: str) -> bytes:
        return hashlib.sha256(f"{seed}:{turn}:{document}".encode()).digest()

    return sorted(documents, key=key)


def reading(
    domain: Sequence[str],
    general: Sequence[str] = (),
    *,
    seed: int,
    max_bytes: int,
    replay: float = 0.1,
) -> Iterator[str]:
    """Texts up to `max_bytes` of UTF-8, passes repeated as often as needed.

    The last text is cut where a window of what is left would end.

    Args:
        replay: the share of general text among all bytes, where general text is given.
    """
    pieces = [piece for document in general for piece in windows(document, GENERAL_PIECE_BYTES)]
    replayed = _endless(pieces, seed)
    total = of_general = 0
    for document in _endless(domain, seed):
        texts = [document]
        size = len(document.encode())
        while pieces and of_general < replay * (total + size):
            texts.append(next(replayed))
            added = len(texts[-1].encode())
            of_general += added
            size += added
        for text in texts:
            left = max_bytes - total
            if left <= 0:
                return
            kept = text if len(text.encode()) <= left else windows(text, left)[0]
            total += len(kept.encode())
            yield kept
            if kept is not text:
                return


def _endless(documents: Sequence[str], seed: int) -> Iterator[str]:
    for turn in count() if documents else ():
        yield from shuffled(documents, seed, turn)


def encoded(
    texts: Iterable[str], family: Family, *, max_tokens: int | None = None
) -> Iterator[tuple[list[int], int]]:
    """(ids, UTF-8 bytes) of each text, until `max_tokens` ids have been given out."""
    given = 0
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH)):
        for text, ids in zip(batch, family.encode_batch(batch), strict=True):
            if max_tokens is not None and given >= max_tokens:
                return
            given += len(ids)
            yield ids, len(text.encode())
