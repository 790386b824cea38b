"""Documents of text files, and the parts of a file that can be read apart.

| name ends in | document |
|---|---|
| `.txt` | a block between blank lines |
| `.jsonl` | the field `column` of a line |
| `.csv`, `.tsv` | the cell of a row in `column` |
| `.parquet` | the value of a row in `column` |
| `hf:owner/name:config:split` | the value of a row in `column`, streamed by `datasets` |

All but the last two also as `.gz` and `.zst`. Everything is streamed. A document has at most
`DOCUMENT_LIMIT` bytes as stored: a longer one is cut at the last line end within the limit, else
before the last space, else before the last Chinese punctuation mark, else between two characters.

This module is imported by every counting process: it must stay light.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lexigraft.errors import LexigraftError
from lexigraft.hub import HUB

COMPRESSIONS = (".gz", ".zst")
_STREAMED = (".txt", ".jsonl", ".csv", ".tsv")
SUFFIXES = (
    *_STREAMED,
    *(kind + compression for kind in _STREAMED for compression in COMPRESSIONS),
    ".parquet",
)
DOCUMENT_LIMIT = 2**20
# A JSON line, a CSV cell and their text are in memory as a whole.
LINE_LIMIT = 2**27
PART_BYTES = 2**21
_SAMPLE_BYTES = 2**16
# UTF-16 of English text is half NUL bytes; stray ones in UTF-8 are far rarer than one in ten.
_NUL_SHARE = 0.1
# Control characters that no text encoding in use writes often: more of them mean a binary file.
_CONTROL_SHARE = 0.01
_CONTROLS = bytes({*range(0x20), 0x7F} - set(b"\t\n\v\f\r\x1b"))

BOM_DROPPED = "byte order mark dropped"
RETURNS_READ = "CR LF line ends read as LF"
NULS_DROPPED = "NUL bytes dropped"
SURROGATES_REPLACED = "documents held lone surrogates, replaced by '?'"
# What was cleaned in a file: how often, by one of the four texts above.
Remarks = Counter[str]


@dataclass(frozen=True)
class TextFile:
    """A file, or a data set `hf:...`, to be read.

    Attributes:
        path: where it is.
        column: the field that holds the text, of formats with fields.
        weight: how much each of its occurrences counts in `learn`.
    """

    path: str
    column: str = "text"
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The file's name without its path; the whole spec of a data set."""
        return self.path if self.path.startswith(HUB) else Path(self.path).name

    @property
    def size(self) -> int:
        """Stored bytes; 0 for a data set."""
        return 0 if self.path.startswith(HUB) else Path(self.path).stat().st_size

    @property
    def kind(self) -> str:
        """`.txt`, `.jsonl` ..., without compression; `hf:` for a data set."""
        if self.path.startswith(HUB):
            return HUB
        name = self.path.lower()
        for compression in COMPRESSIONS:
            name = name.removesuffix(compression)
        return name[name.rfind(".") :]

    @property
    def compressed(self) -> bool:
        """True where the text may have more bytes than the file."""
        return self.kind in (HUB, ".parquet") or self.path.lower().endswith(COMPRESSIONS)


@dataclass(frozen=True)
class Part:
    """A stretch of a file that holds whole documents: bytes, or row groups of parquet."""

    file: TextFile
    start: int = 0
    end: int | None = None
    size: int = 0


def parts_of(file: TextFile) -> list[Part]:
    """Parts of some `PART_BYTES` each whose documents are together those of the file."""
    if file.kind == ".parquet":
        return _row_groups(file)
    if file.compressed or file.kind not in _BOUNDARIES or file.size <= PART_BYTES:
        return [Part(file, size=file.size)]
    ends = []
    with open(file.path, "rb") as stream:  # noqa: PTH123 - a str, many times
        begin = 0
        while begin + PART_BYTES < file.size:
            begin = _BOUNDARIES[file.kind](stream, begin, begin + PART_BYTES)
            ends.append(begin)
    starts = [0, *ends]
    stops = [*ends, file.size]
    pairs = zip(starts, stops, strict=True)
    return [Part(file, start, stop, stop - start) for start, stop in pairs if start < stop]


def read_part(part: Part, remarks: Remarks) -> Iterator[str]:
    """The documents of `part`, none of them blank; adds what was cleaned to `remarks`.

    Raises:
        LexigraftError: what is read is no text, not UTF-8, damaged, or lacks the column.
    """
    path = part.file.path
    try:
        if part.file.kind == HUB:
            yield from _hub_documents(part.file, remarks)
        elif part.file.kind == ".parquet":
            yield from _parquet_documents(part, remarks)
        else:
            refuse_utf16(path)
            with open_stream(path) as stream:
                if part.start:
                    stream.seek(part.start)
                yield from _READERS[part.file.kind](part, stream, remarks)
    except (OSError, EOFError, zlib.error) as fault:
        raise LexigraftError(
            f"cannot read {path} ({fault})",
            needed="a readable text file, whole if it is compressed",
            fix=f"check it with `file {path}` and copy it again",
        ) from None


# --- bytes ---------------------------------------------------------------------------------------


def open_stream(path: str) -> IO[bytes]:
    """The bytes of a file, decompressed."""
    if path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"), 2**17)
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_Zstandard(path), 2**17)
    return open(path, "rb")  # noqa: PTH123 - the caller closes it


class _Zstandard(io.RawIOBase):
    """A zstd file of one or more frames; one that ends within a frame is an error."""

    def __init__(self, path: str) -> None:
        import zstandard

        self._fault = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._file = open(path, "rb")  # noqa: PTH123, SIM115 - closed by close()
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._file.read(2**17)
            if not block:
                if self._frame is not None:
                    raise EOFError("the zstd stream ends before its frame does")
                return 0
            self._ready = self._decompressed(block)
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def _decompressed(self, block: bytes) -> bytes:
        ready = []
        while block:
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                ready.append(self._frame.decompress(block))
            except self._fault as fault:
                raise EOFError(str(fault)) from None
            block = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        return b"".join(ready)


def sample_of(path: str) -> bytes:
    """The first bytes of a file, decompressed."""
    with open_stream(path) as stream:
        return stream.read(_SAMPLE_BYTES)


def is_binary(path: str) -> bool:
    """True for a file that is no text in any encoding."""
    data = sample_of(path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16: text, but of another encoding
        return False
    controls = len(data) - len(data.translate(None, _CONTROLS))
    return controls > _CONTROL_SHARE * len(data) and not _stray_nuls(data)


def _stray_nuls(data: bytes) -> bool:
    """True for UTF-8 with a few NUL bytes."""
    if data.count(0) > _NUL_SHARE * len(data):
        return False
    plain = data.replace(b"\0", b"")
    controls = len(plain) - len(plain.translate(None, _CONTROLS))
    try:
        plain[: _whole_characters(plain)].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return controls <= _CONTROL_SHARE * len(plain)


def refuse_utf16(path: str) -> None:
    """Stop at a file whose beginning holds NUL bytes as UTF-16 and binary files do."""
    data = sample_of(path)
    nuls = data.count(0)
    if nuls > _NUL_SHARE * len(data):
        raise LexigraftError(
            f"{path}: {nuls:,} NUL bytes among the first {len(data):,}",
            needed="text in UTF-8 (UTF-16 and binary files hold NUL bytes)",
            fix=f"iconv -f UTF-16 -t UTF-8 {path} > clean.txt, "
            f"or tr -d '\\000' < {path} > clean.txt",
        )


def _decoded(part: Part, data: bytes, place: int) -> str:
    """`data`, which stands at byte `place` of the text, as characters."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as fault:
        line_start = data.rfind(b"\n", 0, fault.start) + 1
        line = _lines_before(part.file.path, place + fault.start) + 1
        raise LexigraftError(
            f"{part.file.path}: line {line} is not UTF-8 (byte 0x{data[fault.start]:02X} "
            f"at column {fault.start - line_start + 1})",
            needed="text in UTF-8",
            fix=f"iconv -f GB18030 -t UTF-8 {part.file.path} > clean.txt "
            "(or from the encoding it has)",
        ) from None


def _lines_before(path: str, place: int) -> int:
    lines = 0
    with open_stream(path) as stream:
        while place > 0 and (block := stream.read(min(place, 2**20))):
            lines += block.count(b"\n")
            place -= len(block)
    return lines


def _clean(text: str, remarks: Remarks, *, returns: bool = True) -> str:
    """`text` without NUL characters, its CR LF as LF; says the latter only if `returns`."""
    text = _without_nuls(text, remarks)
    if "\r\n" in text:
        remarks[RETURNS_READ] += text.count("\r\n") if returns else 0
        text = text.replace("\r\n", "\n")
    return text


def _without_nuls(text: str, remarks: Remarks) -> str:
    if "\0" not in text:
        return text
    remarks[NULS_DROPPED] += text.count("\0")
    return text.replace("\0", "")


def _without_mark(data: bytes, remarks: Remarks) -> bytes:
    if data.startswith(b"\xef\xbb\xbf"):
        remarks[BOM_DROPPED] += 1
        return data[3:]
    return data


# --- blocks of .txt ------------------------------------------------------------------------------

_BLANK_LINE = re.compile(r"\n\s*\n")
_BLANK_LINE_BYTES = re.compile(rb"\n[ \t\r\v\f]*\n")
_LEADING_BLANK_LINE = re.compile(rb"[ \t\r\v\f]*\n")
_CHINESE_MARKS = tuple(mark.encode() for mark in "。，；、！？：")


def _txt_documents(part: Part, stream: IO[bytes], remarks: Remarks) -> Iterator[str]:
    """Blocks of a window of `DOCUMENT_LIMIT` bytes at a time.

    A window ends behind a blank line, so the blocks in it are whole. Only a window that begins
    where a block begins and holds no blank line is cut elsewhere: so the documents depend on
    each block alone, not on where reading began.
    """
    place = part.start
    data = b""
    while True:
        # Beyond the end of the part too: where a window ends depends on what follows.
        data += stream.read(DOCUMENT_LIMIT - len(data))
        left = len(data) if part.end is None else part.end - place
        if not data or not left:
            return
        size = min(left, len(data) if len(data) < DOCUMENT_LIMIT else _window(data))
        window = _without_mark(data[:size], remarks) if place == 0 else data[:size]
        dropped = size - len(window)
        yield from _blocks(_clean(_decoded(part, window, place + dropped), remarks))
        place += size
        data = data[size:]


def _window(data: bytes) -> int:
    """How many bytes of a full window to read as whole documents."""
    end = data.rfind(b"\n\n")
    if end >= 0:
        return end + 2
    ends = [match.end() for match in _BLANK_LINE_BYTES.finditer(data)]
    if ends:
        return ends[-1]
    leading = _LEADING_BLANK_LINE.match(data)
    return leading.end() if leading else _cut(data)


def _cut(data: bytes) -> int:
    """Where to cut a document that is longer than `data`: see the head of this module."""
    line_end = data.rfind(b"\n") + 1
    if line_end:
        return line_end
    space = data.rfind(b" ")
    if space > 0:
        return space
    mark = max(map(data.rfind, _CHINESE_MARKS))
    return mark if mark > 0 else _whole_characters(data)


def _whole_characters(data: bytes) -> int:
    """Bytes of `data` without a character that is cut off at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
    return len(data)


def _blocks(text: str) -> Iterator[str]:
    blocks = _BLANK_LINE.split(text)
    last = len(blocks) - 1
    for number, block in enumerate(blocks):
        document = block
        if number == 0:
            body = document.lstrip()
            document = document[: len(document) - len(body)].rpartition("\n")[2] + body
        if number == last:
            body = document.rstrip()
            document = body + document[len(body) :].partition("\n")[0]
        if document and not document.isspace():
            yield document


def _txt_boundary(stream: IO[bytes], begin: int, target: int) -> int:
    """The first place from `target` on where reading may begin, given that it may at `begin`."""
    stream.seek(target)
    data = stream.read(_SAMPLE_BYTES)
    match = _BLANK_LINE_BYTES.search(data)
    if match is None:
        data += stream.read(DOCUMENT_LIMIT - len(data))
        match = _BLANK_LINE_BYTES.search(data)
    if match is not None:
        return target + match.end()
    place = begin
    while place < target:
        stream.seek(place)
        data = stream.read(DOCUMENT_LIMIT)
        place += len(data) if len(data) < DOCUMENT_LIMIT else _window(data)
    return place


def _line_boundary(stream: IO[bytes], begin: int, target: int) -> int:
    stream.seek(target)
    stream.readline(LINE_LIMIT + 1)
    return stream.tell()


_BOUNDARIES: dict[str, Callable[[IO[bytes], int, int], int]] = {
    ".txt": _txt_boundary,
    ".jsonl": _line_boundary,
}


# --- formats with fields -------------------------------------------------------------------------


def _lines(part: Part, stream: IO[bytes], remarks: Remarks) -> Iterator[tuple[int, str]]:
    """Byte offset and text of each line."""
    place = part.start
    while part.end is None or place < part.end:
        line = stream.readline(LINE_LIMIT + 1)
        if not line:
            return
        if len(line) > LINE_LIMIT:
            raise LexigraftError(
                f"{part.file.path}: line {_lines_before(part.file.path, place) + 1} has more than "
                f"{LINE_LIMIT:,} bytes",
                needed="records that fit the memory",
                fix="write its text to a .txt file: that is streamed, however long its lines are",
            )
        start, place = place, place + len(line)
        yield start, _decoded(part, _without_mark(line, remarks) if start == 0 else line, start)


def _json_documents(part: Part, stream: IO[bytes], remarks: Remarks) -> Iterator[str]:
    path, column = part.file.path, part.file.column
    for place, line in _lines(part, stream, remarks):
        if line.isspace():
            continue
        try:
            text = json.loads(line)[column]
        except (ValueError, KeyError, TypeError, RecursionError) as fault:
            number = _lines_before(path, place) + 1
            raise LexigraftError(
                f"{path}: line {number} has no {column} ({type(fault).__name__}: {fault})",
                needed=f'one JSON object per line, like {{"{column}": "..."}}',
                fix=f"sed -n {number}p {path} (another field: {path}#column=NAME)",
            ) from None
        if not isinstance(text, str):
            number = _lines_before(path, place) + 1
            raise LexigraftError(
                f"{path}: line {number}: `{column}` is a {type(text).__name__}",
                needed=f'a string, like {{"{column}": "..."}}',
                fix=f"sed -n {number}p {path}",
            )
        line = ""  # noqa: PLW2901 - it may be as large as the text
        yield from _field_documents(text, remarks)


def _table_documents(part: Part, stream: IO[bytes], remarks: Remarks) -> Iterator[str]:
    file = part.file
    csv.field_size_limit(LINE_LIMIT)
    lines = (_without_nuls(text, remarks) for _, text in _lines(part, stream, remarks))
    rows = csv.reader(lines, delimiter="\t" if file.kind == ".tsv" else ",")
    place: int | None = None
    try:
        for row in rows:
            if not row:
                continue
            if place is None:
                place = _column(file, row)
            elif place < len(row):
                yield from _field_documents(row[place], remarks)
    except csv.Error as fault:
        raise LexigraftError(
            f"{file.path}: line {rows.line_num}: {fault}",
            needed="a table as RFC 4180 has it: quotes closed, doubled inside a cell",
            fix=f"sed -n {rows.line_num}p {file.path}",
        ) from None


def _column(file: TextFile, names: Iterable[str]) -> int:
    found = list(names)
    if file.column not in found:
        raise LexigraftError(
            f"{file.path}: no column {file.column}, but {', '.join(found[:20])}",
            needed="the name of the column that holds the text",
            fix=f"{file.path}#column={found[0] if len(found) == 1 else 'NAME'}",
        )
    return found.index(file.column)


def _parquet_documents(part: Part, remarks: Remarks) -> Iterator[str]:
    from pyarrow import ArrowException

    try:
        with _parquet_file(part.file) as table:
            _column(part.file, table.schema_arrow.names)
            last = table.num_row_groups if part.end is None else part.end
            batches = table.iter_batches(
                batch_size=256, row_groups=range(part.start, last), columns=[part.file.column]
            )
            for batch in batches:
                yield from _values(part.file, batch.column(0).to_pylist(), remarks)
    except (ArrowException, UnicodeDecodeError) as fault:
        raise LexigraftError(
            f"cannot read {part.file.path} ({fault})",
            needed="a whole parquet file with text in UTF-8",
            fix="copy or write the file again",
        ) from None


def _parquet_file(file: TextFile) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file.path)


def _row_groups(file: TextFile) -> list[Part]:
    from pyarrow import ArrowException

    try:
        with _parquet_file(file) as table:
            groups = table.num_row_groups
    except (ArrowException, OSError):
        return [Part(file, size=file.size)]  # the reader says what is wrong with it
    share = file.size // max(groups, 1)
    return [Part(file, number, number + 1, share) for number in range(groups)]


def _values(file: TextFile, values: Iterable[Any], remarks: Remarks) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield from _field_documents(value, remarks)
        elif value is not None:
            raise LexigraftError(
                f"{file.path}: column {file.column} holds a {type(value).__name__}",
                needed="a column of strings",
                fix=f"{file.path}#column=NAME",
            )


def _hub_documents(file: TextFile, remarks: Remarks) -> Iterator[str]:
    checked = False
    for row in hub_rows(file):
        if not checked:
            _column(file, row)
            checked = True
        yield from _values(file, [row[file.column]], remarks)


def split_hub_spec(path: str) -> tuple[str, str | None, str]:
    """Name (and revision), config and split of `hf:name[@revision][:config][:split]`.

    The split is `train` by default.

    >>> split_hub_spec("hf:owner/name::test")
    ('owner/name', None, 'test')
    """
    name, _, rest = path.removeprefix(HUB).partition(":")
    config, _, split = rest.partition(":")
    return name, config or None, split or "train"


def split_revision(name: str) -> tuple[str, str | None]:
    """Name and revision of `name@revision`; a local folder has none, whatever it is called.

    >>> split_revision("owner/name@v2"), split_revision("owner/name")
    (('owner/name', 'v2'), ('owner/name', None))
    """
    if Path(name).exists():
        return name, None
    plain, _, revision = name.partition("@")
    return plain, revision or None


def hub_rows(file: TextFile) -> Iterator[dict[str, Any]]:
    """The rows of a data set of the hub, or of a local folder in one of its layouts."""
    import datasets

    place, config, split = split_hub_spec(file.path)
    name, revision = split_revision(place)
    try:
        yield from datasets.load_dataset(
            name, config, split=split, revision=revision, streaming=True
        )
    except LexigraftError:
        raise
    except Exception as fault:  # datasets raises errors of every library below it
        raise LexigraftError(
            f"cannot read {file.path} ({type(fault).__name__}: {str(fault).strip()[:300]})",
            needed="a data set that `datasets` can stream: "
            "hf:OWNER/NAME[@REVISION][:CONFIG][:SPLIT], and the network unless it is a local "
            "folder",
            fix="check name, config and split at https://huggingface.co/datasets, unset "
            "HF_HUB_OFFLINE, or export it to .parquet or .jsonl and name that file",
        ) from None


def _field_documents(text: str, remarks: Remarks) -> Iterator[str]:
    """The document in a field, cut where it is longer than `DOCUMENT_LIMIT`."""
    text = _clean(text, remarks, returns=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        remarks[SURROGATES_REPLACED] += 1
        data = text.encode("utf-8", "replace")
        text = data.decode()
    if len(data) <= DOCUMENT_LIMIT:
        if text and not text.isspace():
            yield text
        return
    del text
    place = 0
    while place < len(data):
        window = data[place : place + DOCUMENT_LIMIT]
        size = len(window) if place + len(window) == len(data) else _cut(window)
        document = window[:size].decode().removesuffix("\n" if place + size < len(data) else "")
        if document and not document.isspace():
            yield document
        place += size


_READERS: dict[str, Callable[[Part, IO[bytes], Remarks], Iterator[str]]] = {
    ".txt": _txt_documents,
    ".jsonl": _json_documents,
    ".csv": _table_documents,
    ".tsv": _table_documents,
}
