"""Where each row of a merged vocabulary tensor comes from: base, adapter, rebuilt, or padding.

Rows are addressed by token id. A tensor is a list of spans, one after another, over which the
rows of single trained tokens are laid. No row is guessed: a new id without a source is a fault.
Letters: V base tokens, T tokens of the result, R rows, D width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from lexigraft.adapters.finite import all_finite
from lexigraft.adapters.folder import LowRank
from lexigraft.adapters.match import Change
from lexigraft.adapters.rounding import Rounding
from lexigraft.checkpoints.growth import Growth, repeated
from lexigraft.checkpoints.header import Tensor, numpy_dtype
from lexigraft.checkpoints.plan import Compute, CopyRows, PlannedTensor
from lexigraft.checkpoints.rows import (
    block_rows,
    by_row,
    grown_shape,
    read_ids,
    read_rows,
    runs,
)
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap

if TYPE_CHECKING:
    from lexigraft.adapters.delta import Delta

Array = npt.NDArray[Any]
RowReader = Callable[[int, int], Array]

_SHOWN_SPANS = 8


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of the result.

    Attributes:
        start: first row.
        stop: one past the last row.
        origin: where they come from, in words.
        read: gives rows [start, stop) by id, in any float type.
        copied: the base tensor that holds these rows under the same ids; None if computed.
    """

    start: int
    stop: int
    origin: str
    read: RowReader
    copied: Tensor | None = None


class WrittenRows(Protocol):
    """A vocabulary tensor of a result."""

    @property
    def name(self) -> str:
        """Under which it is written."""

    def line(self) -> str:
        """Where each row comes from, for a person to read."""

    def planned(self) -> PlannedTensor:
        """The tensor to be written."""


@dataclass(frozen=True)
class VocabularyRows:
    """A vocabulary tensor of the result.

    Attributes:
        name: under which it is written.
        base: the base tensor that it takes type and width from.
        spans: its rows, in order, without a hole.
        change: whose single rows lie over the spans, and whose LoRA is added to them.
        added_rows: how many rows LoRA is added to, from the first.
        dtype: the type in which rows are made: that of `base`, or a wider one to go on from.
        rounding: is told what rounding sums to a 16-bit type costs.
    """

    name: str
    base: Tensor
    spans: tuple[Span, ...]
    change: Change
    added_rows: int
    dtype: str
    rounding: Rounding | None = None

    @property
    def rows(self) -> int:
        """R."""
        return self.spans[-1].stop

    def read(self, start: int, stop: int) -> Array:
        """Rows [start, stop) as they are written.

        Raises:
            LexigraftError: a row of the adapter is not finite in the base's type.
        """
        return np.concatenate(
            [
                self._rows(span, max(start, span.start), min(stop, span.stop))
                for span in self.spans
                if max(start, span.start) < min(stop, span.stop)
            ]
        )

    def blocks(self) -> Iterator[Array]:
        """All rows, a block at a time."""
        for span in self.spans:
            yield from self._blocks(span)

    def planned(self) -> PlannedTensor:
        """The tensor to be written: untouched spans of the base are copied as bytes."""
        row_bytes = by_row(self.base).row_bytes
        parts = tuple(
            CopyRows(span.copied, span.start, span.stop)
            if span.copied is not None and not self._is_changed(span)
            else Compute((span.stop - span.start) * row_bytes, partial(self._blocks, span))
            for span in self.spans
        )
        return PlannedTensor(self.name, self.base.dtype, grown_shape(self.base, self.rows), parts)

    def line(self) -> str:
        """Where each row comes from, for a person to read."""
        spans = ", ".join(self._places())
        single = f"; {len(self.change.ids):,} single rows the adapter's" if self.change.ids else ""
        added = f"; LoRA on rows {_ids(0, self.added_rows)}" if self.added_rows else ""
        return f"{self.name}: {self.rows:,} rows: {spans}{single}{added}"

    def _places(self) -> Iterator[str]:
        """Each span in words, or of many spans how many rows each origin gives."""
        if len(self.spans) <= _SHOWN_SPANS:
            yield from (f"{_ids(span.start, span.stop)} {span.origin}" for span in self.spans)
            return
        rows: Counter[str] = Counter()
        for span in self.spans:
            rows[span.origin] += span.stop - span.start
        yield from (f"{count:,} {origin}" for origin, count in rows.items())

    def _blocks(self, span: Span) -> Iterator[Array]:
        step = block_rows(by_row(self.base))
        for start in range(span.start, span.stop, step):
            yield self._rows(span, start, min(start + step, span.stop))

    def _rows(self, span: Span, start: int, stop: int) -> Array:
        with np.errstate(over="ignore"):  # found below, with the name of the file
            rows = np.array(span.read(start, stop), dtype=numpy_dtype(self.dtype))
            self._lay_single_rows(rows, start, stop)
            if self.change.added is not None and start < self.added_rows:
                changed = rows[: self.added_rows - start]
                changed[:] = self._delta.onto(changed, start)
        if (span.copied is None or self.added_rows) and not all_finite(rows, self.dtype):
            raise LexigraftError(
                f"{self.name}: rows {_ids(start, stop)} are not finite after the merge",
                needed=f"finite numbers within the range of {self.dtype}",
                fix="look at the training run of the adapter: its loss became NaN or infinite",
            )
        return rows

    @cached_property
    def _delta(self) -> Delta:
        from lexigraft.adapters.delta import Delta

        assert self.change.added is not None
        return Delta(self.change.added, self._trained_on, self.dtype, self.rounding)

    def _trained_on(self, start: int, stop: int) -> Array:
        """Rows of the matrix that LoRA was trained on; `vocabulary_rows` has seen to it."""
        source = self.base if self.change.full is None else self.change.full
        return read_rows(by_row(source), start, stop).astype(numpy_dtype(self.dtype))

    def _is_changed(self, span: Span) -> bool:
        return bool(self._touched(span.start, span.stop).size) or span.start < self.added_rows

    def _touched(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Places in `change.ids` whose id lies in [start, stop), ascending."""
        ids = np.asarray(self.change.ids, np.int64)
        return np.flatnonzero((ids >= start) & (ids < stop))

    def _lay_single_rows(self, rows: Array, start: int, stop: int) -> None:
        places = self._touched(start, stop)
        if not places.size or self.change.values is None:
            return
        ids = np.asarray(self.change.ids, np.int64)
        # Values are read in runs, so that neighbours cost one read.
        for first, end in runs(places.tolist()):
            values = read_rows(self.change.values, first, end)
            if not all_finite(values, self.change.values.dtype):
                raise LexigraftError(
                    f"{self.change.values.name} holds numbers that are not finite",
                    needed="finite rows",
                    fix="look at the training run of the adapter: its loss became NaN",
                )
            rows[ids[first:end] - start] = values.astype(rows.dtype)


def vocabulary_rows(
    name: str,
    base: Tensor,
    change: Change,
    growth: Growth,
    *,
    full_rows: int = 0,
    rebuilt: RowReader | None = None,
    lost: str | None = None,
    mean: Callable[[], Array],
    rounding: Rounding | None = None,
) -> VocabularyRows:
    """The rows of one vocabulary tensor of the result.

    Args:
        name: under which it is written.
        base: the base's tensor, R rows before.
        change: what the adapter does to it; its single ids must lie below `growth.tokens`.
        growth: from how many rows to how many.
        full_rows: how many rows of `change.full` and of its LoRA count.
        rebuilt: gives rows [start, stop) of the new ones, counted from 0, where they can be
            made again exactly.
        lost: what a manifest names as their source and does not hold, if any.
        mean: the row of new padding (`growth.survey`), asked for only where there is some.
        rounding: see `VocabularyRows`.

    Raises:
        LexigraftError: no source holds the row of a new id.
    """
    view = by_row(base)
    if change.added is not None and change.full is None:
        _require_rows_of_norm(name, change.added.low_rank, growth)
    spans: list[Span] = []

    def add(stop: int, origin: str, read: RowReader, copied: Tensor | None = None) -> None:
        start = spans[-1].stop if spans else 0
        if start < stop:
            spans.append(Span(start, stop, origin, read, copied))

    def from_base(start: int, stop: int) -> Array:
        return read_rows(view, start, stop)

    if change.full is not None:
        trained = by_row(change.full)
        add(full_rows, "the adapter's", lambda start, stop: read_rows(trained, start, stop))
    elif growth.new_ids:
        origin, read = _new_rows(name, change, growth, view, rebuilt or lost)
        for start, stop in runs(growth.new_ids):
            add(start, "the base's", from_base, view)
            add(stop, origin, read)
    add(min(growth.rows_before, growth.rows), "the base's", from_base, view)
    add(growth.rows, "padding (mean)", lambda start, stop: repeated(mean(), stop - start))
    added_rows = full_rows if change.added else 0
    return VocabularyRows(name, base, tuple(spans), change, added_rows, base.dtype, rounding)


def moved_rows(
    name: str, base: Tensor, change: Change, own: TokenMap, places: Mapping[int, int]
) -> VocabularyRows:
    """The rows of an adapter of a sibling vocabulary, by its own ids.

    Args:
        name: of the vocabulary tensor.
        base: the base's tensor, whose ids mean other tokens.
        change: what the adapter does to it.
        own: the tokenizer that the adapter was trained with.
        places: id there -> id of the same token in the base.

    Raises:
        RefusalError: DoRA of an embedding, which scales by norms over rows that nobody holds.
        LexigraftError: a token that the base lacks has no row in the adapter.
    """
    view = by_row(base)
    lost = own.texts.keys() - places.keys() - set(change.ids)
    if change.full is None:
        if change.added is not None and change.added.low_rank.is_scaled_by_column:
            raise RefusalError(
                f"DoRA on {name} was trained with the norms of all rows of another vocabulary",
                needed="the model that it was trained on: one of its rows changes all",
                fix="merge the adapter into that model, then lexigraft blend the two models",
            )
        if lost:
            first = min(lost)
            raise LexigraftError(
                f"no row of {name} for {len(lost):,} tokens that the base lacks (id {first} is "
                f"{own.texts[first]!r} in the adapter's tokenizer): the adapter holds none",
                needed=f"{name} in the adapter",
                fix="merge the adapter into the model that it was trained on, then lexigraft blend "
                "the two models",
            )

    def from_base(start: int, stop: int) -> Array:
        rows = np.zeros((stop - start, *view.shape[1:]), numpy_dtype(view.dtype))
        here = [own_id for own_id in range(start, stop) if own_id in places]
        rows[[own_id - start for own_id in here]] = read_ids(view, [places[i] for i in here])
        return rows

    if change.full is None:
        span = Span(0, own.tokens, "the base's", from_base)
    else:
        span = Span(0, own.tokens, "the adapter's", partial(read_rows, by_row(change.full)))
    added_rows = own.tokens if change.added else 0
    return VocabularyRows(name, base, (span,), change, added_rows, base.dtype)


def _require_rows_of_norm(name: str, low_rank: LowRank, growth: Growth) -> None:
    """DoRA of an embedding scales by norms over all rows that it was trained on."""
    if not low_rank.is_scaled_by_column:
        return
    if not low_rank.shape[0] == growth.rows_before == growth.rows or growth.new_ids:
        raise RefusalError(
            f"DoRA on {name} was trained with the norms of {low_rank.shape[0]:,} rows, which the "
            f"adapter does not hold; the base has {growth.rows_before:,}",
            needed="the rows that it was trained with: one of them changes all",
            fix="lexigraft merge MODEL ADAPTER -o MERGED; MODEL is the model that was trained",
        )


def _new_rows(
    name: str, change: Change, growth: Growth, view: Tensor, rebuilt: RowReader | str | None
) -> tuple[str, RowReader]:
    """Where new rows come from, and what gives those of ids that follow one another."""
    ids = growth.new_ids
    if callable(rebuilt):

        def made_again(start: int, stop: int) -> Array:
            place = bisect_left(ids, start)
            return rebuilt(place, place + stop - start)

        return "rebuilt", made_again
    lost = sorted(set(ids) - set(change.ids))
    if lost:
        why = f": {rebuilt}" if rebuilt else ""
        raise LexigraftError(
            f"no row of {name} for {len(lost):,} new tokens (first id {lost[0]}): the adapter "
            f"holds none, and they cannot be rebuilt from a manifest{why}",
            needed=f"{name} in the adapter, or the grafted model that it was trained on",
            fix="lexigraft merge MODEL ADAPTER -o MERGED, where MODEL is the model that was "
            "trained (its model.safetensors holds these rows)",
        )

    def laid_over(start: int, stop: int) -> Array:
        return np.zeros((stop - start, *view.shape[1:]), numpy_dtype(view.dtype))

    return "the adapter's", laid_over


def _ids(start: int, stop: int) -> str:
    return f"{start:,}-{stop - 1:,}"


def equal_rows(one: VocabularyRows, other: VocabularyRows) -> bool:
    """True when two tensors of the result hold the same rows; read in blocks."""
    if (one.rows, one.base.dtype) != (other.rows, other.base.dtype):
        return False
    step = block_rows(by_row(one.base))
    return all(
        one.read(start, min(start + step, one.rows)).tobytes()
        == other.read(start, min(start + step, one.rows)).tobytes()
        for start in range(0, one.rows, step)
    )
