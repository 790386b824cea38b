"""Texts to learn from and to measure on: what a text spec names, read as documents.

A spec is a file, a folder (searched to any depth), a quoted glob or a data set
`hf:owner/name[@revision][:config][:split]`; `#weight=2,column=findings` behind it says how much its
occurrences count in `learn`, how often `train` reads it, and which field holds the text. The
formats are those of `lexigraft.text_formats`. Files are streamed: memory does not grow with the
corpus.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from lexigraft.console import note
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import is_there, sha256_bytes, sha256_file, sha256_json
from lexigraft.hub import HUB
from lexigraft.manifest import TextSource
from lexigraft.text_formats import (
    BOM_DROPPED,
    COMPRESSIONS,
    DOCUMENT_LIMIT,
    SUFFIXES,
    Part,
    Remarks,
    TextFile,
    is_binary,
    read_part,
    split_hub_spec,
    split_revision,
)

__all__ = [
    "DOCUMENT_LIMIT",
    "HELD_OUT_SHARE",
    "OF_TOKENIZERS",
    "SUFFIXES",
    "beginning",
    "content_digest",
    "held_out",
    "inputs",
    "is_held_out",
    "read_documents",
    "say_remarks",
    "sources",
    "text_files",
    "weighted_documents",
]

HELD_OUT_SHARE = 0.05
# Files of tokenizers, ours among them, whose names end as those of texts do.
OF_TOKENIZERS = frozenset({"merges.txt", "vocab.txt", "new_tokens.jsonl"})
_GLOB_CHARACTERS = frozenset("*?[")
_FRAGMENT = re.compile(r"#(\w+=[^#/]*)$")
_NAMES_SHOWN = 3
# Outside, counts round to 0 or make all others vanish beside them.
_LEAST_WEIGHT, _MOST_WEIGHT = 0.001, 1000.0


def inputs(specs: Sequence[str | Path]) -> list[TextFile]:
    """What `specs` name, each file once, sorted by name.

    Raises:
        RefusalError: a spec of a kind that is not supported.
        LexigraftError: a spec that matches nothing, or a file with two weights.
    """
    found: dict[tuple[str, str], TextFile] = {}
    for spec in specs:
        for file in _files_of(str(spec)):
            before = found.setdefault((file.path, file.column), file)
            if before != file:
                raise LexigraftError(
                    f"{file.path} is named with weight {before.weight:g} and {file.weight:g}",
                    needed="one weight for each file",
                    fix="name it once, or write the weight behind both specs",
                )
    return sorted(found.values(), key=lambda file: (file.name, file.path, file.column))


def text_files(specs: Sequence[str | Path]) -> list[Path]:
    """The local files that `specs` name; of a local folder named as `hf:folder`, the folder.

    Raises:
        RefusalError: a spec of a kind that is not supported.
        LexigraftError: a spec that matches nothing.
    """
    paths = (_local_path(file) for file in inputs(specs))
    return list(dict.fromkeys(path for path in paths if path is not None))


def sources(specs: Sequence[str | Path]) -> list[TextSource]:
    """Name, content hash and size of every input, in an order that depends on content alone."""
    found = [_source(file) for file in inputs(specs)]
    return sorted(found, key=lambda source: (source.sha256, source.name, source.column))


def read_documents(specs: Sequence[str | Path]) -> Iterator[str]:
    """All documents of all files, streamed, the files in the order of their names.

    A byte order mark and stray NUL bytes are dropped, CR LF becomes LF, and a note says so;
    blank documents are skipped. Weights do not matter here.

    Raises:
        LexigraftError: nothing to read, text that is not UTF-8, or damaged records.
    """
    return (document for document, _ in weighted_documents(specs))


def weighted_documents(specs: Sequence[str | Path]) -> Iterator[tuple[str, float]]:
    """`read_documents`, each with the weight of its file."""
    empty = True
    files = inputs(specs)
    for file in files:
        remarks = Remarks()
        for document in read_part(Part(file), remarks):
            empty = False
            yield document, file.weight
        say_remarks(file.name, remarks)
    if empty:
        raise nothing_to_read(files)


def beginning(specs: Sequence[str | Path], limit: int) -> list[str]:
    """The first documents of some texts, up to the one that reaches `limit` UTF-8 bytes."""
    texts: list[str] = []
    size = 0
    for document in read_documents(specs):
        if size >= limit:
            break
        texts.append(document)
        size += len(document.encode())
    return texts


def held_out(document: str, share: float = HELD_OUT_SHARE) -> bool:
    """True for a fixed `share` of all documents, chosen by their content hash.

    The choice depends neither on order nor on the other documents, so a text that is held out
    in `learn` is held out in `train` and `eval` too.
    """
    return is_held_out(content_digest(document), share)


def content_digest(document: str) -> bytes:
    """The hash by which a document is chosen."""
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()


def is_held_out(digest: bytes, share: float = HELD_OUT_SHARE) -> bool:
    """`held_out` of the document that has this `content_digest`."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


def nothing_to_read(files: Sequence[TextFile]) -> LexigraftError:
    """The error of a corpus without a document."""
    return LexigraftError(
        f"no text in {', '.join(file.path for file in files[:_NAMES_SHOWN])}",
        needed="at least one document",
        fix="check that the files are not empty (a jsonl line needs a `text` field, or name "
        "another with FILE#column=NAME)",
    )


def say_remarks(name: str, remarks: Remarks) -> None:
    """One notice for each kind of thing that was cleaned in a file."""
    for remark, count in sorted(remarks.items()):
        if count:
            note(f"{name}: {remark}" if remark == BOM_DROPPED else f"{name}: {count:,} {remark}")


def _files_of(spec: str) -> list[TextFile]:
    place, column, weight = _parsed(spec)
    if place.startswith(HUB):
        return [TextFile(place, column, weight)]
    path = Path(place)
    there = is_there(path)
    if there and path.is_dir():
        matches = _texts_in(path)
    elif there and path.is_file():
        matches = [path]
    elif _GLOB_CHARACTERS & set(place):
        matches = [p for p in map(Path, glob.glob(place, recursive=True)) if p.is_file()]  # noqa: PTH207
    else:
        matches = []
    if not matches:
        is_folder = there and path.is_dir()
        what = f"no text file in {place}" if is_folder else f"no file {place}"
        raise LexigraftError(
            what,
            needed=f"one or more files ending in {', '.join(SUFFIXES)}",
            fix=f"ls {path if is_folder else path.parent}",
        )
    for match in matches:
        if not _is_readable(match):
            raise RefusalError(
                f"{match}: not a kind of text file that is read",
                needed=f"a name ending in {', '.join(SUFFIXES)}",
                fix="rename or convert the file",
            )
    return [TextFile(str(match), column, weight) for match in matches]


def _parsed(spec: str) -> tuple[str, str, float]:
    """Place, column and weight of a spec; a file whose own name holds a # is that file."""
    fragment = _FRAGMENT.search(spec)
    if fragment is None or is_there(Path(spec)):
        return spec, "text", 1.0
    options = dict(option.partition("=")[::2] for option in fragment[1].split(","))
    unknown = options.keys() - {"weight", "column"}
    try:
        weight = float(options.get("weight", 1))
    except ValueError:
        weight = 0.0
    if unknown or not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
        raise LexigraftError(
            f"{spec}: {fragment[0]}",
            needed=f"#weight=NUMBER from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}, #column=NAME, or "
            "both with a comma between",
            fix=f"{spec[: fragment.start()]}#weight=2,column=text",
        )
    return spec[: fragment.start()], options.get("column") or "text", weight


def _is_readable(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _texts_in(folder: Path) -> list[Path]:
    """The text files of a folder; says which files of it are none.

    Files of a tokenizer are read where they are named themselves: a folder may be a model's.
    """
    kinds = ("of other kinds", "of a tokenizer", "empty", "binary")
    skipped: dict[str, list[str]] = {kind: [] for kind in kinds}
    texts = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not _is_readable(path):
            skipped["of other kinds"].append(path.name)
        elif _without_compression(path.name.lower()) in OF_TOKENIZERS:
            skipped["of a tokenizer"].append(path.name)
        elif not path.stat().st_size:
            skipped["empty"].append(path.name)
        elif path.suffix.lower() != ".parquet" and _looks_binary(path):
            skipped["binary"].append(path.name)
        else:
            texts.append(path)
    groups = [f"{len(names):,} {why} ({_some(names)})" for why, names in skipped.items() if names]
    if groups:
        _note_once(f"{folder}: files that are not read: {', '.join(groups)}")
    return texts


def _without_compression(name: str) -> str:
    return next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)


def _looks_binary(path: Path) -> bool:
    try:
        return is_binary(str(path))
    except (OSError, EOFError):  # a damaged archive is no reason to skip: reading it says so
        return False


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_NAMES_SHOWN]) + (", ..." if len(listed) > _NAMES_SHOWN else "")


@cache
def _note_once(text: str) -> None:
    """A notice about specs, which a verb resolves several times."""
    note(text)


def _local_path(file: TextFile) -> Path | None:
    if not file.path.startswith(HUB):
        return Path(file.path)
    folder = Path(split_hub_spec(file.path)[0])
    return folder if folder.exists() else None


def _source(file: TextFile) -> TextSource:
    path = _local_path(file)
    if path is None:
        pinned = _pinned(file)
        rest = file.path.partition(":")[2].partition(":")[1:]
        name, sha256, size = "".join((HUB, pinned, *rest)), sha256_bytes(pinned.encode()), 0
    elif file.path.startswith(HUB):
        _, config, split = split_hub_spec(file.path)
        members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        hashes = [[p.relative_to(path).as_posix(), sha256_file(p)] for p in members]
        name = f"{HUB}{path.name}:{config or ''}:{split}"
        sha256, size = sha256_json(hashes), sum(p.stat().st_size for p in members)
    else:
        name, sha256, size = path.name, sha256_file(path), path.stat().st_size
    return TextSource(name=name, sha256=sha256, bytes=size, weight=file.weight, column=file.column)


def _pinned(file: TextFile) -> str:
    """Name and commit of a data set of the hub."""
    from huggingface_hub import HfApi

    name, revision = split_revision(split_hub_spec(file.path)[0])
    try:
        return f"{name}@{HfApi().dataset_info(name, revision=revision).sha}"
    except Exception as fault:  # huggingface_hub passes on errors of its HTTP library
        raise LexigraftError(
            f"cannot ask the hub for the revision of {file.path} ({type(fault).__name__})",
            needed="the network, while a data set of the hub is read",
            fix="try again, or export it to .parquet or .jsonl and name that file",
        ) from None
