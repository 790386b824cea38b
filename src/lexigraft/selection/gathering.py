"""The learning text of a family: counted chunks, their units, and what was left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lexigraft.counting import CHUNK, Counted, count_chunks
from lexigraft.families import Family
from lexigraft.families.units import Units

# Words in an address are not words of the text: `www.medlineplus.gov` teaches no `medlineplus`.
_ADDRESS = re.compile(r"://|\bwww\.|[\w.+-]@[\w-]+\.", re.ASCII)


@dataclass(frozen=True)
class Gathered:
    """A text as a family reads it.

    Attributes:
        counted: chunks, held-out documents and sizes.
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
    engine: str = "local",
    workers: int | None = None,
) -> Gathered:
    """Count a corpus for `family`; see `counting.count_chunks` for the arguments."""
    counted = count_chunks(
        specs, prefix=family.prefix, measured=measured, engine=engine, workers=workers
    )
    chunks = {text: n for text, n in counted.chunks.items() if not _ADDRESS.search(text)}
    left_out = sum(counted.chunks.values()) - sum(chunks.values())
    return Gathered(counted, chunks, family.count_units(chunks), left_out)


def units_of_texts(family: Family, texts: Sequence[str]) -> Units:
    """The units of some texts, cut as a corpus is."""
    chunks: Counter[str] = Counter()
    for text in texts:
        chunks.update(CHUNK.findall(family.prefix + text))
    chunks.pop("", None)
    return family.count_units(chunks)
