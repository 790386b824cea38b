r"""Word lists: terms to teach, words to ban or pin, new special tokens.

Lists are made by hand, so nothing on a line is fatal: each line that is dropped or changed is
reported with its number and the reason, and the summary counts them. The forms that are read:

- `.txt`, `.tsv`, and anything else: one term a line, with an optional weight after a TAB;
- `.csv`, or any file named with `#column=NAME`: a table with a header, fields separated by TABs if
  the header has one, else by commas; a column `weight` is used if there is one;
- `.model` (SentencePiece) and `.vocab` (its text form): every ordinary piece, `▁` as a space.

Each may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import math
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lexigraft.errors import LexigraftError
from lexigraft.families.tokenmap import parse_sentencepiece

_ORDINARY = 1  # sentencepiece_model.proto, ModelProto.SentencePiece.Type
_SPACE_MARK = "▁"
_BYTE_ORDER_MARK = "\ufeff"
_COLUMN = "#column="
# What stands unseen at the ends of words that were copied from documents: `str.strip` leaves the
# zero-width space and the byte order mark.
_AROUND = (
    string.whitespace
    + "\x85\xa0\u2028\u2029\u202f\u3000\ufeff"
    + "".join(map(chr, range(0x2000, 0x200C)))
)


@dataclass(frozen=True)
class Term:
    """One word of a list."""

    text: str
    weight: float = 1.0
    line: int = 0


class Note(NamedTuple):
    """One line that was changed, or dropped (`kept` is false).

    What stands before a colon in `reason` is its kind, the same for all lines that share it.
    """

    line: int
    text: str
    reason: str
    kept: bool = False


@dataclass(frozen=True)
class WordList:
    """The words of one file, in the order of its lines, and what was done to them.

    Attributes:
        source: the file's name.
        lines: how many lines (of a `.model`: pieces) it has.
        words: what was kept.
        report: what was changed or dropped.
    """

    source: str
    lines: int
    words: list[Term] = field(default_factory=list)
    report: list[Note] = field(default_factory=list)

    def summary(self) -> str:
        """One sentence of counts, with the first line of each kind as an example."""
        parts = [f"{self.source}: {self.lines:,} lines: {len(self.words):,} terms"]
        for kept, verb in ((False, "dropped"), (True, "changed")):
            notes = [note for note in self.report if note.kept is kept]
            if notes:
                kinds = Counter(_kind(note) for note in notes)
                first = {_kind(note): note for note in reversed(notes)}
                parts.append(
                    f"{verb} "
                    + ", ".join(
                        f"{count:,} {kind}{_example(first[kind])}"
                        for kind, count in kinds.most_common()
                    )
                )
        weights = [word.weight for word in self.words]
        if weights and min(weights) < max(weights):
            parts.append(f"weights {min(weights):,g} to {max(weights):,g}")
        return "; ".join(parts)


def read_words(spec: str | Path) -> WordList:
    """The words of a list of terms, banned or pinned words.

    Spaces around a word are removed (the spellings with a leading space are looked for anyway), and
    words are normalised to NFC, as nearly all text is. A repeated word keeps its first line.

    Args:
        spec: a file, or `FILE#column=NAME`.

    Raises:
        LexigraftError: a file that cannot be read as text, or a column that is not there.
    """
    path, column = _column_of(str(spec))

    def word_of(text: str) -> str:
        return unicodedata.normalize("NFC", text.strip(_AROUND))

    return _collected(path.name, _entries(path, column), word_of, change=_change)


def read_special(path: str | Path, existing: Collection[str]) -> WordList:
    """New special tokens, one a line, such as `<|diagnosis|>`; spaces inside one are its own.

    They stand in texts as they are written here, so that nothing but spaces at the ends is changed.

    Args:
        path: the file.
        existing: tokens that the base has; a special token of the same text is dropped.

    Raises:
        LexigraftError: a file that cannot be read as text.
    """
    path = Path(path)
    entries = ((number, text, None) for number, text in enumerate(_lines(path), 1))
    return _collected(
        path.name, entries, lambda text: text.strip(_AROUND), change=lambda *_: "spaces removed",
        existing=existing,
    )  # fmt: skip


def _collected(
    source: str,
    entries: Iterable[tuple[int, str, str | None]],
    word_of: Callable[[str], str],
    *,
    change: Callable[[str, str], str],
    existing: Collection[str] = (),
) -> WordList:
    """The words of a list, each once; every line that is dropped or changed is reported.

    Args:
        source: the file's name.
        entries: line number, text and weight of each line.
        word_of: the text of a line -> the word.
        change: (text, word) -> what was done to the text.
        existing: words that may not be taken again.
    """
    words: list[Term] = []
    report: list[Note] = []
    seen: dict[str, int] = {}
    number = 0
    for number, text, weight in entries:
        word = word_of(text)
        fault = _fault(word, weight)
        if fault is None and word in existing:
            fault = "clash: the base has this token"
        if fault is None and word in seen:
            fault = f"duplicate: of line {seen[word]:,}"
        if fault is not None:
            report.append(Note(number, text, fault))
            continue
        if word != text:
            report.append(Note(number, text, change(text, word), kept=True))
        seen[word] = number
        words.append(Term(word, float(weight or 1), number))
    return WordList(source, number, words, report)


def _fault(word: str, weight: str | None) -> str | None:
    """Why a line is dropped, if it is."""
    if not word:
        return "blank"
    categories = {unicodedata.category(character) for character in word}
    if categories & {"Zl", "Zp"} or any(character in word for character in "\n\r\v\f\x85"):
        return "line break inside"
    if categories & {"Cc", "Cs"}:
        return "control character"
    if categories <= {"Cf", "Zs", "Mn", "Me"}:
        return "nothing visible"
    if weight is not None and not _is_positive(weight):
        return f"weight is no positive number: {weight}"
    return None


def _is_positive(weight: str) -> bool:
    try:
        return 0 < float(weight) < math.inf
    except ValueError:
        return False


def _change(text: str, word: str) -> str:
    changes = []
    bare = text.strip(_AROUND)
    if text != bare:
        changes.append("spaces removed")
    if bare != word:
        changes.append("normalised to NFC")
    return " and ".join(changes)


def _kind(note: Note) -> str:
    return note.reason.partition(":")[0]


def _example(note: Note) -> str:
    text = note.text.strip()
    return f" (first: line {note.line:,}{' ' + text if text else ''})"


def _column_of(spec: str) -> tuple[Path, str | None]:
    """The file and the column that `FILE#column=NAME` names; a file of just that name wins."""
    name, mark, column = spec.rpartition(_COLUMN)
    if mark and not Path(spec).exists():
        return Path(name), column
    return Path(spec), None


def _entries(path: Path, column: str | None) -> Iterator[tuple[int, str, str | None]]:
    """(line, text, weight if there is one) of each line, whatever the form of the file."""
    suffix = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if suffix == "model":
        for number, piece in enumerate(parse_sentencepiece(_bytes(path), path).pieces, 1):
            if piece.type == _ORDINARY:
                yield number, _unmarked(piece.piece), None
    elif suffix == "csv" or column is not None:
        yield from _table(path, column)
    else:
        for number, line in enumerate(_lines(path), 1):
            text, tab, second = line.partition("\t")
            if suffix == "vocab":
                yield number, _unmarked(text), None
            else:
                yield number, text, second.strip() if tab and second.strip() else None


def _unmarked(piece: str) -> str:
    """A piece as text; that it begins a word is said by no spelling of a list."""
    return piece.removeprefix(_SPACE_MARK).replace(_SPACE_MARK, " ")


def _table(path: Path, column: str | None) -> Iterator[tuple[int, str, str | None]]:
    lines = _lines(path)
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    rows = _rows(lines, delimiter, path)
    _, header = next(rows, (0, []))
    header = [name.strip() for name in header]
    if column is None and len(header) == 1:  # one term a line, which needs no header
        rows, place, weight = _rows(lines, delimiter, path), 0, None
    elif column in header:
        place = header.index(column)
        weight = header.index("weight") if "weight" in header and column != "weight" else None
    else:
        missing = "which column holds the terms?" if column is None else f"no column {column!r}"
        raise LexigraftError(
            f"{path}: {missing}",
            needed=f"one of its columns: {', '.join(header)}",
            fix=f"{path}{_COLUMN}{header[-1] if header else 'NAME'}",
        )
    for number, row in rows:
        value = row[weight].strip() if weight is not None and weight < len(row) else ""
        yield number, row[place] if place < len(row) else "", value or None


def _rows(lines: list[str], delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, each with the number of its last line."""
    rows = csv.reader(lines, delimiter=delimiter)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as fault:
        raise LexigraftError(
            f"{path}: {fault}",
            needed="a table of short fields; a quotation mark inside a field is doubled",
            fix="name a text file with one term a line instead",
        ) from None


def _lines(path: Path) -> list[str]:
    """The lines without their ends, and without a byte order mark."""
    data = _bytes(path)
    try:
        if b"\x00" in data:
            raise UnicodeError("it holds NUL bytes, as UTF-16 and binary files do")
        text = data.decode("utf-8")
    except UnicodeError as fault:
        raise LexigraftError(
            f"{path} is not UTF-8 text ({fault})",
            needed="a word list: one term a line, in UTF-8",
            fix=f"iconv -f GB18030 -t UTF-8 {path} > terms.txt (or from the encoding it has)",
        ) from None
    lines = text.removeprefix(_BYTE_ORDER_MARK).split("\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line end is no line
    return [line.removesuffix("\r") for line in lines]


def _bytes(path: Path) -> bytes:
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path) as stream:
                return stream.read()
        return path.read_bytes()
    except (OSError, EOFError) as fault:
        raise LexigraftError(
            f"cannot read {path} ({fault})",
            needed="a word list: one term a line",
            fix=f"ls {path.parent}",
        ) from None
