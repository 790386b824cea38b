"""Units: the stretches of text in which new tokens may arise, as counted rows of symbols.

A unit is a run of base tokens that are letters of one script, or parts of such letters. It ends
where the pre-tokenizer splits, before a space, at everything that is no letter, and between
scripts. A punctuation mark or symbol that the base spells in parts is a unit of its own.

Symbols are base ids; a character that the base spells in byte pieces (SentencePiece) is a symbol
of its own, *pending* until it is adopted as a token.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lexigraft.families.spelling import is_symbol, script_of

Text = TypeVar("Text", str, bytes)
Unit = tuple[str, ...]
Ints = npt.NDArray[np.int64]
Symbols = npt.NDArray[np.int32]

# Above this many symbols the rarer units are sampled: some 50 bytes of memory go with each.
MOST_SYMBOLS = 12_000_000
_RARE = 4  # occurrences below which a unit may be sampled
_BAD, _NEUTRAL, _MARK = -1, 0, 2**13
_BATCH = 32_768


@dataclass(frozen=True)
class Units:
    """Distinct units with their counts.

    Attributes:
        symbols: (n,) all units one after the other.
        starts: (u + 1,) where each unit begins; the last entry is n.
        weights: (u,) how often each unit occurs.
        texts: symbol -> token as the files spell it.
        pending: symbol of a letter without a token -> base tokens that spell it now.
        sampled: of the rare units, one in so many was taken (its weight multiplied).
        total: all base tokens of the text, those outside units too; 0 if nobody counted them.
    """

    symbols: Symbols
    starts: Ints
    weights: Ints
    texts: Mapping[int, str]
    pending: Mapping[int, int]
    sampled: int = 1
    total: int = 0

    @property
    def next_symbol(self) -> int:
        """The lowest number that is no symbol yet."""
        return max(self.texts, default=-1) + 1

    @property
    def tokens(self) -> int:
        """Base tokens that spell all units, counted with their weights."""
        width = np.ones(self.next_symbol, dtype=np.int64)
        for symbol, pieces in self.pending.items():
            width[symbol] = pieces
        if not len(self.weights):
            return 0
        lengths = np.add.reduceat(width[self.symbols], self.starts[:-1])
        return int(lengths @ self.weights)

    @classmethod
    def from_tuples(
        cls, counted: Mapping[Unit, int], ids: Mapping[str, int], pending: Mapping[str, int]
    ) -> Units:
        """Units given as token strings.

        Args:
            counted: unit -> occurrences.
            ids: token -> base id.
            pending: letter without a token -> base tokens that spell it now.
        """
        first = max(ids.values(), default=-1) + 1
        numbers = {letter: first + place for place, letter in enumerate(sorted(pending))}
        number = {**ids, **numbers}
        rows = {
            np.array([number[token] for token in unit], dtype=np.int32).tobytes(): weight
            for unit, weight in counted.items()
        }
        texts = {symbol: text for text, symbol in number.items()}
        waiting = {numbers[letter]: pieces for letter, pieces in pending.items()}
        return _assemble(rows, texts, waiting)

    def to_tuples(self) -> Counter[Unit]:
        """The same as token strings: for reading and for slow references."""
        counted: Counter[Unit] = Counter()
        for start, end, weight in zip(self.starts, self.starts[1:], self.weights, strict=False):
            counted[tuple(self.texts[int(s)] for s in self.symbols[start:end])] += int(weight)
        return counted


class UnitCounter:
    """Collects units from encoded chunks of text.

    Args:
        texts: base id -> token.
        bytes_of: base id -> the UTF-8 bytes that it stands for; a word mark counts as a space.
        excluded: ids that are never part of a new token (added tokens, control tokens).
        byte_pieces: ids of pieces that stand for one byte, where letters without a piece are
            spelled by them and may be adopted (SentencePiece); none for byte-level families.
    """

    def __init__(
        self,
        texts: Mapping[int, str],
        bytes_of: Callable[[int], bytes],
        *,
        excluded: Iterable[int] = (),
        byte_pieces: Iterable[int] = (),
    ) -> None:
        self._texts = texts
        self._bytes_of = bytes_of
        self._tokens = max(texts, default=-1) + 1
        self._excluded = np.zeros(self._tokens, dtype=bool)
        self._excluded[list(excluded)] = True
        self._is_byte = np.zeros(self._tokens, dtype=bool)
        self._is_byte[list(byte_pieces)] = True
        self._known = np.zeros(self._tokens, dtype=bool)
        self._lengths = np.zeros(self._tokens, dtype=np.int64)
        self._places = np.zeros(self._tokens, dtype=np.int64)
        self._blob = bytearray()
        self._rows: dict[bytes, int] = {}
        self._total = 0

    def add(
        self,
        ids: Sequence[Sequence[int]],
        weights: Sequence[int],
        words: Sequence[Sequence[int | None]] | None = None,
    ) -> None:
        """Count the units of encoded chunks.

        Args:
            ids: the base ids of each chunk.
            weights: how often each chunk occurs.
            words: for each token the number of its pre-token, where the family has such.
        """
        counts = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        total = int(counts.sum())
        if not total:
            return
        tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=total)
        edges = np.zeros(total, dtype=bool)
        filled = counts > 0
        edges[(np.cumsum(counts) - counts)[filled]] = True
        if words is not None:
            numbers = np.fromiter(
                (-1 if w is None else w for w in chain.from_iterable(words)),
                dtype=np.int64,
                count=total,
            )
            edges[1:] |= numbers[1:] != numbers[:-1]
        of_chunk = np.repeat(np.asarray(weights, dtype=np.int64), counts)
        self._count(tokens, edges, of_chunk)

    def add_words(self, tokens: Ints, lengths: Ints, weights: Sequence[int]) -> None:
        """Count the units of encoded words: (n,) ids, (w,) ids of each word, (w,) occurrences.

        Every word has at least one id.
        """
        if not len(tokens):
            return
        edges = np.zeros(len(tokens), dtype=bool)
        edges[np.cumsum(lengths) - lengths] = True
        self._count(tokens, edges, np.repeat(np.asarray(weights, dtype=np.int64), lengths))

    def _count(self, tokens: Ints, edges: npt.NDArray[np.bool_], weights: Ints) -> None:
        self._total += int(weights.sum())
        self._learn_bytes(tokens)
        lengths = self._lengths[tokens]
        firsts = np.cumsum(lengths) - lengths
        blob = np.frombuffer(bytes(self._blob), dtype=np.uint8)
        size = int(lengths.sum())
        data = blob[np.repeat(self._places[tokens] - firsts, lengths) + np.arange(size)]
        text = data.tobytes().decode("utf-8", "surrogateescape")
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        widths = _utf8_widths(points)
        kinds = np.repeat(_scripts(points), widths)
        # A space is part of a word where it begins a token.
        spaced = data[firsts] == 0x20
        kinds[firsts[spaced]] = _NEUTRAL
        lowest = np.minimum.reduceat(kinds, firsts)
        highest = np.maximum.reduceat(kinds, firsts)
        lowest_script = np.minimum.reduceat(np.where(kinds > 0, kinds, np.int16(2**14)), firsts)
        good = (lowest > _BAD) & ~self._excluded[tokens]
        good &= (highest == _NEUTRAL) | (lowest_script == highest)
        edges = edges | spaced
        # A mark is completed, but joined to nothing.
        edges |= (kinds[firsts] == _MARK) & ((data[firsts] & 0xC0) != 0x80)
        edges[1:] |= (highest[1:] != highest[:-1]) & (highest[1:] > 0) & (highest[:-1] > 0)
        edges[1:] |= good[1:] != good[:-1]
        symbols = tokens
        spelled = self._is_byte[tokens]
        if spelled.any():
            leads = (data[firsts] & 0xC0) != 0x80
            letters = np.repeat(points, widths)[firsts].astype(np.int64)
            symbols = np.where(spelled, self._tokens + letters, tokens)
            kept = ~spelled | leads | ~good  # of a letter in byte pieces the first one stays
            # An edge at a dropped piece cannot be: a unit never ends inside a character.
            symbols, edges, good, weights = (x[kept] for x in (symbols, edges, good, weights))
        self._collect(symbols, edges, good, weights)

    def _collect(
        self,
        symbols: Ints,
        edges: npt.NDArray[np.bool_],
        good: npt.NDArray[np.bool_],
        weights: Ints,
    ) -> None:
        starts = np.flatnonzero(edges)
        ends = np.append(starts[1:], len(symbols))
        useful = good[starts] & ((ends - starts > 1) | (symbols[starts] >= self._tokens))
        buffer = symbols.astype(np.int32).tobytes()
        rows = self._rows
        for start, end, weight in zip(
            (starts[useful] * 4).tolist(),
            (ends[useful] * 4).tolist(),
            weights[starts[useful]].tolist(),
            strict=True,
        ):
            row = buffer[start:end]
            rows[row] = rows.get(row, 0) + weight

    def _learn_bytes(self, tokens: Ints) -> None:
        present = np.zeros(self._tokens, dtype=bool)
        present[tokens] = True
        for token_id in np.flatnonzero(present & ~self._known).tolist():
            data = self._bytes_of(token_id) or b"\x00"  # nothing: no letter
            self._places[token_id], self._lengths[token_id] = len(self._blob), len(data)
            self._blob += data
        self._known |= present

    def units(self) -> Units:
        """All that was counted."""
        rows, sampled = _thinned(self._rows)
        buffer = np.frombuffer(b"".join(rows), dtype=np.int32)
        letters = np.unique(buffer[buffer >= self._tokens])
        numbers = {int(s): self._tokens + place for place, s in enumerate(letters)}
        texts = dict(self._texts)
        pending = {}
        for symbol, number in numbers.items():
            letter = chr(symbol - self._tokens)
            texts[number], pending[number] = letter, len(letter.encode())
        dense = buffer.copy()
        outside = dense >= self._tokens
        dense[outside] = self._tokens + np.searchsorted(letters, dense[outside])
        units = _assemble(rows, texts, pending, symbols=dense, sampled=sampled)
        return replace(units, total=self._total)


def batches(chunks: Mapping[Text, int]) -> Iterator[tuple[list[Text], list[int]]]:
    """Chunks and their counts, some thousand at a time: what one call of an engine gets."""
    stream = iter(chunks.items())
    while batch := list(islice(stream, _BATCH)):
        yield [text for text, _ in batch], [count for _, count in batch]


def _assemble(
    rows: Mapping[bytes, int],
    texts: Mapping[int, str],
    pending: Mapping[int, int],
    *,
    symbols: Symbols | None = None,
    sampled: int = 1,
) -> Units:
    lengths = np.fromiter((len(row) // 4 for row in rows), dtype=np.int64, count=len(rows))
    if symbols is None:
        symbols = np.frombuffer(b"".join(rows), dtype=np.int32)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    weights = np.fromiter(rows.values(), dtype=np.int64, count=len(rows))
    return Units(symbols, starts, weights, texts, pending, sampled)


def _thinned(rows: dict[bytes, int]) -> tuple[dict[bytes, int], int]:
    """`rows`, or all frequent and every m-th rare one (by content hash) where they are too many.

    The weight of a sampled unit is multiplied by m, so that counts stay true on average. What
    is taken depends on content alone, not on the order of the text.
    """
    if sum(map(len, rows)) <= 4 * MOST_SYMBOLS:
        return rows, 1
    frequent = sum(len(row) for row, weight in rows.items() if weight >= _RARE)
    every = 2
    room = max(4 * MOST_SYMBOLS - frequent, MOST_SYMBOLS)
    while (sum(map(len, rows)) - frequent) / every > room:
        every *= 2
    taken = {
        row: weight if weight >= _RARE else weight * every
        for row, weight in rows.items()
        if weight >= _RARE or zlib.crc32(row) % every == 0
    }
    return taken, every


def _utf8_widths(points: npt.NDArray[np.uint32]) -> Ints:
    """Bytes of each character; an escaped byte (a lone surrogate) is one."""
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    widths[(points >= 0xD800) & (points < 0xE000)] = 1
    return widths


_UNSEEN = -2
_kinds = np.full(0x110000, _UNSEEN, dtype=np.int16)
_script_numbers: dict[str, int] = {"": _NEUTRAL}


def _scripts(points: npt.NDArray[np.uint32]) -> npt.NDArray[np.int16]:
    """The number of each character's script; 0 for combining marks, -1 for what is left out."""
    unseen = points[_kinds[points] == _UNSEEN]
    for point in np.unique(unseen).tolist():
        script = script_of(chr(point))
        if script is None:
            _kinds[point] = _MARK if is_symbol(chr(point)) else _BAD
        else:
            _kinds[point] = _script_numbers.setdefault(script, len(_script_numbers))
    return _kinds[points]
