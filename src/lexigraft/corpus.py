"""Texts to learn from and to measure on, as documents.

A document is a blank-line block of a `.txt` file or one line of a `.jsonl` file (its `text`);
both may be gzipped. Files are streamed: memory does not grow with the corpus.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from lexigraft.console import note
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import sha256_file
from lexigraft.manifest import TextSource

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
HELD_OUT_SHARE = 0.05
# Longer documents are cut at line ends, so that one file without blank lines stays streamable.
DOCUMENT_LIMIT = 2**20
_GLOB_CHARACTERS = frozenset("*?[")


def text_files(specs: Sequence[str | Path]) -> list[Path]:
    """The files that `specs` name: files, folders (searched to any depth) and quoted globs.

    Raises:
        RefusalError: a spec of a kind that is not supported.
        LexigraftError: a spec that matches nothing.
    """
    found = dict.fromkeys(chain.from_iterable(map(_files_of, specs)))
    return sorted(found, key=lambda path: (path.name, str(path)))


def _files_of(spec: str | Path) -> list[Path]:
    text = str(spec)
    if text.startswith("hf:"):
        raise RefusalError(
            f"{text}: data sets of the hub are not read yet",
            needed="text files",
            fix="export the data set to .jsonl with a `text` field and name that file",
        )
    path = Path(text)
    if path.is_dir():
        matches = [p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()]
    elif path.is_file():
        matches = [path]
    elif _GLOB_CHARACTERS & set(text):
        matches = [p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file()]  # noqa: PTH207
    else:
        matches = []
    if not matches:
        what = f"no text file in {text}" if path.is_dir() else f"no file {text}"
        raise LexigraftError(
            what,
            needed=f"one or more files ending in {', '.join(SUFFIXES)}",
            fix=f"ls {path if path.is_dir() else path.parent}",
        )
    for match in matches:
        if not match.name.endswith(SUFFIXES):
            raise RefusalError(
                f"{match}: not a kind of text file that is read",
                needed=f"a name ending in {', '.join(SUFFIXES)}",
                fix="rename or convert the file",
            )
    return matches


def sources(specs: Sequence[str | Path]) -> list[TextSource]:
    """Name, content hash and size of every file, in an order that depends on content alone."""
    found = [
        TextSource(name=path.name, sha256=sha256_file(path), bytes=path.stat().st_size)
        for path in text_files(specs)
    ]
    return sorted(found, key=lambda source: (source.sha256, source.name))


def read_documents(specs: Sequence[str | Path]) -> Iterator[str]:
    """All documents of all files, streamed, the files in the order of their names.

    A byte order mark is dropped, CR LF becomes LF; blank documents are skipped.

    Raises:
        LexigraftError: nothing to read, text that is not UTF-8, NUL bytes, or bad JSON lines.
    """
    empty = True
    files = text_files(specs)
    for path in files:
        for document in _read_file(path):
            empty = False
            yield document
    if empty:
        raise LexigraftError(
            f"no text in {', '.join(str(path) for path in files[:3])}",
            needed="at least one document",
            fix="check that the files are not empty (a jsonl line needs a `text` field)",
        )


def held_out(document: str, share: float = HELD_OUT_SHARE) -> bool:
    """True for a fixed `share` of all documents, chosen by their content hash.

    The choice depends neither on order nor on the other documents, so a text that is held out
    in `learn` is held out in `train` and `eval` too.
    """
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _read_file(path: Path) -> Iterator[str]:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as stream:
            lines = _text_lines(path, stream)
            if ".jsonl" in path.suffixes:
                yield from _json_documents(path, lines)
            else:
                yield from _blocks(lines)
    except (OSError, EOFError) as fault:
        raise LexigraftError(
            f"cannot read {path} ({fault})",
            needed="a readable text file, whole if it is gzipped",
            fix=f"check it with `file {path}` and copy it again",
        ) from None


def _text_lines(path: Path, stream: Iterable[bytes]) -> Iterator[str]:
    """Decoded lines without their ends; says once per file what was cleaned."""
    returns = 0
    for number, raw in enumerate(stream, 1):
        line = raw
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            note(f"{path.name}: byte order mark dropped")
            line = line[3:]
        if b"\x00" in line:
            raise LexigraftError(
                f"{path}: a NUL byte on line {number}",
                needed="text in UTF-8 (UTF-16 and binary files hold NUL bytes)",
                fix=f"iconv -f UTF-16 -t UTF-8 {path} > clean.txt, "
                f"or tr -d '\\000' < {path} > clean.txt",
            )
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as fault:
            raise LexigraftError(
                f"{path}: line {number} is not UTF-8 (byte 0x{line[fault.start]:02X} "
                f"at column {fault.start + 1})",
                needed="text in UTF-8",
                fix=f"iconv -f GB18030 -t UTF-8 {path} > clean.txt (or from the encoding it has)",
            ) from None
        if "\r" in text:
            returns += text.endswith("\r\n")
            text = text.replace("\r\n", "\n")
        yield text.rstrip("\n")
    if returns:
        note(f"{path.name}: {returns:,} CR LF line ends read as LF")


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for line in lines:
        blank = not line.strip()
        if block and (blank or size + len(line) > DOCUMENT_LIMIT):
            yield "\n".join(block)
            block, size = [], 0
        if not blank:
            block.append(line)
            size += len(line) + 1
    if block:
        yield "\n".join(block)


def _json_documents(path: Path, lines: Iterable[str]) -> Iterator[str]:
    surrogates = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as fault:
            raise LexigraftError(
                f"{path}: line {number} has no text ({type(fault).__name__}: {fault})",
                needed='one JSON object per line, like {"text": "..."}',
                fix=f"sed -n {number}p {path}",
            ) from None
        if not isinstance(text, str):
            raise LexigraftError(
                f"{path}: line {number}: `text` is a {type(text).__name__}",
                needed='a string, like {"text": "..."}',
                fix=f"sed -n {number}p {path}",
            )
        clean = text.encode("utf-8", "replace").decode("utf-8")
        surrogates += clean != text
        clean = clean.replace("\r\n", "\n").replace("\x00", "")
        if clean.strip():
            yield clean
    if surrogates:
        note(f"{path.name}: {surrogates:,} documents held lone surrogates, replaced by '?'")
