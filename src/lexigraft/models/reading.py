"""The order in which texts are read in training: the same for every tokenizer.

Documents are ordered by a hash of seed, pass and content, general text is mixed in by bytes,
and everything is cut at the same byte, so that two models with different vocabularies read the
same text at the same point.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import overload

import numpy as np

from lexigraft.corpus import content_digest, held_out, read_documents
from lexigraft.families import Family
from lexigraft.models.bits import windows

# General documents can be whole chapters; in pieces of this size they mix evenly.
GENERAL_PIECE_BYTES = 1024
# Of the bytes, while replay is early. Replay in the first tenth of the steps alone did as well as a
# fifth of general text throughout (2506.00288).
EARLY_SHARE = 0.5
_IN_MEMORY = 2**24  # bytes of documents that need no file
_BATCH = 256  # documents per call of the tokenizer's parallel encoder


class Documents(Sequence[str]):
    """Texts kept outside memory, of which only the places are held; each may be there repeatedly.

    They are kept in memory as long as they are few, then in a file without a name, which is gone
    with the process whatever ends it.
    """

    def __init__(
        self, documents: Iterable[tuple[str, float]] = (), near: Path | None = None
    ) -> None:
        """Documents with their weights; the file lies on the disk of the folder `near`.

        A weight of 2 is a document that is there twice; of 0.25, one of four documents is there,
        chosen by their content.
        """
        where = None if near is None else str(near)
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=where)  # noqa: SIM115
        self._begins, self._sizes = array("q"), array("q")
        self._copies = array("l")
        self._end = self.bytes = 0
        for document, weight in documents:
            self.add(document, weight)

    def add(self, document: str, weight: float = 1.0) -> None:
        """One document more, as often as `weight` says."""
        times = int(weight)
        if times < weight:
            fraction = int.from_bytes(content_digest(document)[8:16], "big") / 2**64
            times += fraction < weight - times
        if not times:
            return
        data = document.encode()
        self._file.seek(self._end)
        self._file.write(data)
        self._begins.extend([self._end] * times)
        self._sizes.extend([len(data)] * times)
        self._copies.extend(range(times))
        self._end += len(data)
        self.bytes += len(data) * times

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        begin, size = self._begins[place], self._sizes[place]
        self._file.seek(begin)
        return self._file.read(size).decode()

    def copy(self, place: int) -> int:
        """Which of its copies a document is, from 0."""
        return self._copies[place]


def in_order(documents: Sequence[str], seed: int, turn: int = 0) -> Iterator[str]:
    """`documents` in an order that depends on `seed`, `turn` and their content alone."""
    copy_of = documents.copy if isinstance(documents, Documents) else lambda place: 0

    def key(place: int, document: str) -> bytes:
        copy = copy_of(place)
        turns = f"{turn}.{copy}" if copy else f"{turn}"
        return hashlib.sha256(f"{seed}:{turns}:{document}".encode()).digest()

    # 32 bytes for each document, however long it is.
    keys = b"".join(key(place, document) for place, document in enumerate(documents))
    for place in np.argsort(np.frombuffer(keys, dtype="S32"), kind="stable").tolist():
        yield documents[place]


def shuffled(documents: Iterable[str], seed: int, turn: int = 0) -> list[str]:
    """A list of `in_order`."""
    return list(in_order(list(documents), seed, turn))


def pieces(documents: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """General documents with their weights, cut so small that they mix evenly."""
    for document, weight in documents:
        for piece in windows(document, GENERAL_PIECE_BYTES):
            yield piece, weight


def held_out_general(specs: Sequence[str | Path]) -> list[str]:
    """General documents that `train` holds out; of a few long ones, those of their pieces."""
    whole = [document for document in read_documents(specs) if held_out(document)]
    if whole:
        return whole
    cut = pieces((document, 1.0) for document in read_documents(specs))
    return [piece for piece, _ in cut if held_out(piece)]


def reading(
    domain: Sequence[str],
    general: Sequence[str] = (),
    *,
    seed: int,
    max_bytes: int,
    skipped: int = 0,
    replay: float = 0.1,
    early: int | None = None,
) -> Iterator[str]:
    """Texts up to `max_bytes` of UTF-8, passes repeated as often as needed.

    The last text is cut where a window of what is left would end.

    Args:
        general: in the `pieces` that are mixed in.
        skipped: bytes at the beginning that are left to others: what reads up to there, and this,
            part a text between them where a window of it would end.
        replay: the share of general text among all bytes, where general text is given.
        early: how many bytes there will be about: then all general text comes first, half of the
            bytes until its share of these is read. Without it, it is spread evenly.
    """
    replayed = _endless(general, seed)
    total = of_general = 0
    for document in _endless(domain, seed):
        texts = [document]
        size = len(document.encode())
        while general and of_general < _due(total + size, replay, early):
            texts.append(next(replayed))
            added = len(texts[-1].encode())
            of_general += added
            size += added
        for text in texts:
            if total >= max_bytes:
                return
            if part := _up_to(text, max_bytes - total)[len(_up_to(text, skipped - total)) :]:
                yield part
            total += len(text.encode())


def _up_to(text: str, size: int) -> str:
    """The beginning of a text: at most so many bytes of UTF-8, cut as a window is."""
    return windows(text, size)[0] if size > 0 else ""


def _due(read: int, replay: float, early: int | None) -> float:
    """Bytes of general text that should be among the first `read` bytes."""
    if early is None:
        return replay * read
    return min(max(EARLY_SHARE, replay) * read, replay * max(early, read))


def _endless(documents: Sequence[str], seed: int) -> Iterator[str]:
    for turn in count() if documents else ():
        yield from in_order(documents, seed, turn)


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
