"""The learning text of a family: counted chunks, their units, and what was left out."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lexigraft.console import note
from lexigraft.counting import CHUNK, Counted, count_chunks
from lexigraft.families import Family
from lexigraft.families.spelling import is_mojibake, is_symbol, script_of
from lexigraft.families.units import Units, batches

# Words in an address are not words of the text: `www.medlineplus.gov` teaches no `medlineplus`.
_ADDRESS = re.compile(r"://|\bwww\.|[\w.+-]@[\w-]+\.", re.ASCII)

# UTF-8 that was read as Windows-1252 or Latin-1: a letter that stands for the first byte of a
# character, then those of its other bytes. The single letters are words of no known language, but
# each alone might be one. Letters that end words before a quotation mark stay out (`É”`, `ß“`).
_OTHERS = bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + bytes(range(0x80, 0xC0)).decode(
    "latin-1"
)
_DAMAGED = re.compile(
    f"[\u00c2-\u00c5\u00ce-\u00d1\u00d7-\u00db][{_OTHERS}]"
    f"|[\u00e0-\u00ef](?:(?![\u00a0\u00ab\u00bb])[{_OTHERS}]){{2}}"
)


def is_damaged(text: str) -> bool:
    """True where a stretch of `text` is UTF-8 that was read in another encoding.

    Written back, the stretch must be a whole character; and it must hold what no word holds, a
    control character or a symbol, or be one of two: `Úž` begins Slovak words.

    >>> is_damaged("crÃ¨me"), is_damaged("Úžasný"), is_damaged("TROMSØ»")
    (True, False, False)
    """
    found = [match.group() for match in _DAMAGED.finditer(text) if is_mojibake(match.group())]
    odd = any(unicodedata.category(c)[0] not in "LP" for part in found for c in part)
    return odd or len(found) > 1


@dataclass(frozen=True)
class Gathered:
    """A text as a family reads it.

    Attributes:
        counted: held-out documents and sizes.
        chunks: the chunks that are learned from.
        units: their stretches.
        addresses: occurrences of chunks left out because they are URLs or e-mail addresses.
    """

    counted: Counted
    chunks: Mapping[str, int]
    units: Units
    addresses: int

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the documents that may be learned from."""
        return self.counted.bytes


def gather(
    family: Family,
    specs: Sequence[str | Path],
    *,
    measured: int,
    special: Sequence[str] = (),
    engine: str = "local",
    workers: int | None = None,
) -> Gathered:
    """Count a corpus for `family`; see `counting.count_chunks` for the other arguments.

    Args:
        special: new special tokens: what is written so is no text, and ends what stands before.
    """
    counted = count_chunks(
        specs, prefix=family.prefix, measured=measured, engine=engine, workers=workers
    )
    chunks = counted.chunks  # changed in place: a second table would be most of the memory
    counted = replace(counted, chunks={})
    addresses = sum(chunks.pop(text) for text in list(filter(_ADDRESS.search, chunks)))
    damaged = {text: chunks.pop(text) for text in list(filter(is_damaged, chunks))}
    if damaged:
        first = min(damaged).strip()
        note(
            f"{sum(damaged.values()):,} words are UTF-8 that was read in another encoding, such as "
            f"{first[:40]!r}: not learned from (mend the text for these)"
        )
    if special:
        parts: Counter[str] = Counter()
        for text, n in chunks.items():
            for part in between([text], special):
                parts[part] += n
        chunks = dict(sorted(parts.items()))
    return Gathered(counted, chunks, family.count_units(chunks), addresses)


def units_of_texts(family: Family, texts: Sequence[str]) -> Units:
    """The units of some texts, cut as a corpus is."""
    chunks: Counter[str] = Counter()
    for text in texts:
        chunks.update(CHUNK.findall(family.prefix + text))
    chunks.pop("", None)
    return family.count_units(chunks)


def between(texts: Iterable[str], special: Sequence[str]) -> list[str]:
    """What stands between special tokens in `texts`; of several at one place, the longest counts.

    >>> between(["<a>one<b>two", "three"], ["<a>", "<b>"])
    ['one', 'two', 'three']
    """
    if not special:
        return list(texts)
    longest_first = sorted(special, key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, longest_first)))
    return [part for text in texts for part in found.split(text) if part]


def characters_in_parts(family: Family, chunks: Mapping[str, int]) -> list[tuple[str, int]]:
    """Letters and symbols of a text that are no token of `family`, the most frequent first.

    They are spelled in bytes, or not at all; each comes with its occurrences.
    """
    totals = np.zeros(0x110000)
    for texts, counts in batches(chunks):
        text = "".join(texts).encode("utf-32-le", "surrogatepass")
        weights = np.repeat(np.array(counts, dtype=np.float64), [len(one) for one in texts])
        totals += np.bincount(np.frombuffer(text, np.uint32), weights, minlength=len(totals))
    found = np.flatnonzero(totals)
    left = []
    for point, count in zip(found.tolist(), totals[found].tolist(), strict=True):
        character = chr(point)
        if point < 0x80 or not (script_of(character) or is_symbol(character)):
            continue
        pieces = family.pieces(family.written(character)[0])
        if len(pieces) > 1 or family.unknown_id in pieces:
            left.append((character, int(count)))
    return sorted(left, key=lambda row: (-row[1], row[0]))
