"""Several adapters in one merge, each with a weight, over rows that are aligned by token text.

Rule. Of everything that the base has, W' = W + sum over adapters of w (W_i - W), where W_i is what
adapter i alone makes of W: for LoRA W + sum of w s B A. Weights are taken as they are: they need
not sum to 1, and may be negative. A token that the base lacks has no W: its row is the mean of the
rows of the adapters that have it, weighted, with weights renormalised to 1 for this row (a plain
mean where all of them are 0). Rows without a token stay the base's. A head over labels, which the
base lacks too, is the mean of the adapters' heads in the same way.

Sums run in float64 and are rounded once, whatever the base's type: also where a single merge
rounds twice, as PEFT does for embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.adapters.expand import Expansion
from lexigraft.adapters.finite import all_finite
from lexigraft.adapters.folder import Addition, Scale
from lexigraft.adapters.match import Matched
from lexigraft.adapters.planning import with_labels, with_tables, without
from lexigraft.adapters.rounding import Rounding
from lexigraft.adapters.vocabulary import VocabularyRows
from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.growth import Growth, repeated
from lexigraft.checkpoints.header import Tensor, numpy_dtype, wide_type
from lexigraft.checkpoints.plan import Compute, CopyRows, Plan, PlannedTensor
from lexigraft.checkpoints.rows import (
    block_rows,
    by_row,
    grown_shape,
    in_blocks,
    read_rows,
    runs,
)
from lexigraft.checkpoints.survey import survey
from lexigraft.console import note
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap, aligned

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Weighted:
    """One adapter of several.

    Attributes:
        weight: w.
        tokens: the token map by whose ids its rows go.
        matched: it, by tensors of the base.
        expansion: its vocabulary tensors.
    """

    weight: float
    tokens: TokenMap
    matched: Matched
    expansion: Expansion

    def rows(self, name: str, vocabulary: VocabularyTensors) -> VocabularyRows | None:
        """Its rows of a vocabulary tensor, in a wide type; None where they are the base's."""
        found = {rows.name: rows for rows in self.expansion.tensors}
        if vocabulary.tied and self.expansion.tied and name == vocabulary.head_name:
            name = vocabulary.embeds[0]
        if name not in found:
            return None
        rows = found[name]
        return replace(rows, dtype=wide_type(rows.base.dtype))


@dataclass(frozen=True)
class WeightedRows:
    """A vocabulary tensor of the result.

    Attributes:
        name: under which it is written.
        base: the base's tensor.
        growth: from how many rows to how many.
        parts: weight, rows and place of each adapter: id of the result -> its own id, or -1.
        rounding: is told what rounding costs.
    """

    name: str
    base: Tensor
    growth: Growth
    parts: Sequence[tuple[float, VocabularyRows, npt.NDArray[np.int64]]]
    rounding: Rounding

    def line(self) -> str:
        """Where its rows come from, for a person to read."""
        growth = self.growth
        new = growth.tokens - growth.first_id
        tail = f", {new:,} new ones the weighted mean of those that have them" if new else ""
        return (
            f"{self.name}: {growth.rows:,} rows: old tokens the base's, changed by "
            f"{len(self.parts)} adapters{tail}"
        )

    def planned(self) -> PlannedTensor:
        """The tensor to be written."""
        growth, view = self.growth, by_row(self.base)
        tail = growth.rows_before - growth.tokens
        parts: list[CopyRows | Compute] = [Compute(growth.tokens * view.row_bytes, self._blocks)]
        if tail > 0:
            parts.append(CopyRows(view, growth.tokens, growth.rows_before))
        if growth.new_padding:
            parts.append(Compute(growth.new_padding * view.row_bytes, self._padding))
        shape = grown_shape(self.base, growth.rows)
        return PlannedTensor(self.name, self.base.dtype, shape, tuple(parts))

    def _padding(self) -> Iterator[Array]:
        yield repeated(self._mean, self.growth.new_padding).astype(numpy_dtype(self.base.dtype))

    @cached_property
    def _mean(self) -> Array:
        return survey(self.base, self.growth.first_id).mean

    def _blocks(self) -> Iterator[Array]:
        view, growth = by_row(self.base), self.growth
        step = max(1, block_rows(view) // 4)  # of which there are several in float64
        for start, stop in (
            *_ranges(0, growth.first_id, step),
            *_ranges(growth.first_id, growth.tokens, step),
        ):
            is_new = start >= growth.first_id
            total = np.zeros((stop - start, *view.shape[1:]))
            weights = np.zeros((stop - start, *(1 for _ in view.shape[1:])))
            for weight, rows, places in self._weights(start, stop, is_new=is_new):
                here = np.flatnonzero(places >= 0)
                total[here] += weight[here] * _gathered(rows, places[here])
                weights[here] += weight[here]
            if is_new:
                holes = weights.reshape(-1) == 0  # ids without a token are padding
                if holes.any():
                    total[holes], weights[holes] = self._mean, 1
                total /= weights
            else:
                total += (1 - weights) * read_rows(view, start, stop).astype(np.float64)
            yield _stored(total, view, self.name, self.rounding)

    def _weights(
        self, start: int, stop: int, *, is_new: bool
    ) -> Iterator[tuple[Array, VocabularyRows, npt.NDArray[np.int64]]]:
        """Weight of each row, rows and places of each adapter; of new rows, never all 0."""
        shape = (stop - start, *(1 for _ in by_row(self.base).shape[1:]))
        given = [np.full(stop - start, weight) for weight, _, _ in self.parts]
        if is_new:
            has = np.array([places[start:stop] >= 0 for _, _, places in self.parts])
            silent = ~np.any(has & (np.array(given) != 0), axis=0)
            for weight in given:
                weight[silent] = 1.0
        for weight, (_, rows, places) in zip(given, self.parts, strict=True):
            yield weight.reshape(shape), rows, places[start:stop]


def weighted_plan(
    checkpoint: Checkpoint,
    vocabulary: VocabularyTensors,
    adapters: Sequence[Weighted],
    growth: Growth,
    tokens: TokenMap,
    *,
    rounding: Rounding,
    dropped: Iterable[str] = (),
) -> tuple[Plan, tuple[WeightedRows, ...], bool]:
    """The base with every adapter in it; the vocabulary tensors that are made; and if it is tied.

    Args:
        checkpoint: the base.
        vocabulary: its vocabulary tensors.
        adapters: each with its weight.
        growth: from how many rows to how many.
        tokens: the tokenizer of the result.
        rounding: is told what rounding costs.
        dropped: tensors of the base that the result has not.

    Raises:
        RefusalError: the weights of a new token's adapters, or of classifiers, sum to 0 or less;
            classifiers have heads of different sizes.
    """
    tied = vocabulary.tied and all(adapter.expansion.tied for adapter in adapters)
    names = dict.fromkeys(name for adapter in adapters for name in adapter.matched.changes)
    plan = without(Plan.of(checkpoint), dropped).replace(
        _planned(
            checkpoint.tensors[name],
            [
                (adapter.weight, adapter.matched.changes[name])
                for adapter in adapters
                if name in adapter.matched.changes
            ],
            rounding,
        )
        for name in names
    )
    untied = (vocabulary.head_name,) if vocabulary.tied and not tied else ()
    written = []
    places = [_places(tokens, adapter.tokens) for adapter in adapters]
    for name in (*vocabulary.names, *untied):
        stored = name if name in vocabulary.names else vocabulary.embeds[0]
        parts = [
            (adapter.weight, its_rows, its_places)
            for adapter, its_places in zip(adapters, places, strict=True)
            if (its_rows := adapter.rows(name, vocabulary)) is not None
        ]
        if parts or growth.grows or name in untied:
            written.append(WeightedRows(name, checkpoint.tensors[stored], growth, parts, rounding))
    for rows in written:
        _require_rows(rows, tokens)
    _say_shared(written, tokens)
    tables = [rows.planned() for rows in written]
    plan = with_tables(plan, tables, vocabulary, tied=tied)
    return with_labels(plan, _heads(adapters, rounding)), tuple(written), tied


def _heads(adapters: Sequence[Weighted], rounding: Rounding) -> Iterator[PlannedTensor]:
    """The weighted mean of the classifiers' heads."""
    shapes = [{n: t.shape for n, t in adapter.matched.labels.items()} for adapter in adapters]
    if any(found != shapes[0] for found in shapes):
        raise RefusalError(
            f"classifiers with different heads: {', '.join(map(str, shapes))}",
            needed="the same labels in all: the heads are averaged label by label",
            fix="merge each classifier by itself",
        )
    weights = [adapter.weight for adapter in adapters]
    if shapes[0] and any(weights) and sum(weights) <= 0:
        raise RefusalError(
            f"the weights of the classifiers sum to {sum(weights):g}",
            needed="a sum above 0: the base has no head over labels to be changed",
            fix="weigh the adapters with positive numbers",
        )
    used = weights if any(weights) else [1.0] * len(weights)
    for name, first in adapters[0].matched.labels.items():
        heads = [(w, a.matched.labels[name]) for w, a in zip(used, adapters, strict=True)]
        blocks = partial(_mean_blocks, heads, rounding)
        yield PlannedTensor(name, first.dtype, first.shape, (Compute(first.bytes, blocks),))


def _mean_blocks(heads: Sequence[tuple[float, Tensor]], rounding: Rounding) -> Iterator[Array]:
    total = sum(weight * read_rows(head).astype(np.float64) for weight, head in heads)
    first, weights = heads[0][1], sum(weight for weight, _ in heads)
    yield _stored(np.asarray(total) / weights, first, first.name, rounding)


def _require_rows(rows: WeightedRows, tokens: TokenMap) -> None:
    for token_id in range(rows.growth.first_id, rows.growth.tokens):
        weights = [weight for weight, _, places in rows.parts if places[token_id] >= 0]
        if token_id in tokens.texts and any(weights) and sum(weights) <= 0:
            raise RefusalError(
                f"the weights of the adapters that have the new token "
                f"{tokens.texts[token_id]!r} sum to {sum(weights):g}",
                needed="a sum above 0: the base has no row of it to be changed",
                fix="weigh these adapters with positive numbers",
            )


def _say_shared(written: Sequence[WeightedRows], tokens: TokenMap) -> None:
    """Tell of new tokens with a row in several adapters: none of these rows stays as it is."""
    shared = {
        token_id
        for rows in written
        for token_id in range(rows.growth.first_id, rows.growth.tokens)
        if token_id in tokens.texts
        and sum(weight != 0 and places[token_id] >= 0 for weight, _, places in rows.parts) > 1
    }
    if shared:
        first = ", ".join(repr(tokens.texts[token_id]) for token_id in sorted(shared)[:5])
        note(
            f"{len(shared):,} new tokens have rows in several adapters and get their weighted "
            f"mean: {first}"
        )


def _places(result: TokenMap, own: TokenMap) -> npt.NDArray[np.int64]:
    """Id of the result -> the adapter's own id of the same token, or -1."""
    places = np.full(result.tokens, -1, np.int64)
    for token_id, own_id in aligned(result, own).items():
        places[token_id] = own_id
    return places


def _gathered(rows: VocabularyRows, ids: npt.NDArray[np.int64]) -> Array:
    """Rows `ids` in their order; neighbours are read together."""
    found = [rows.read(start, stop) for start, stop in runs(ids.tolist())]
    return np.concatenate(found) if found else np.zeros((0, *by_row(rows.base).shape[1:]))


def _ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def _planned(
    tensor: Tensor,
    changes: Sequence[tuple[float, Addition | Scale | Tensor]],
    rounding: Rounding,
) -> PlannedTensor:
    blocks = partial(_changed_blocks, tensor, changes, rounding)
    return PlannedTensor(tensor.name, tensor.dtype, tensor.shape, (Compute(tensor.bytes, blocks),))


def _changed_blocks(
    tensor: Tensor,
    changes: Sequence[tuple[float, Addition | Scale | Tensor]],
    rounding: Rounding,
) -> Iterator[Array]:
    from lexigraft.adapters.delta import block_rows as tile_rows
    from lexigraft.adapters.delta import changer

    made = [(weight, changer(tensor, change, wide=True)) for weight, change in changes]
    wide, rest = numpy_dtype(wide_type(tensor.dtype)), 1 - sum(weight for weight, _ in made)
    for start, block in in_blocks(tensor, step=tile_rows(tensor)):
        total = rest * block.astype(np.float64)
        for weight, change in made:
            total += weight * change(block.astype(wide), start)
        yield _stored(total, tensor, tensor.name, rounding)


def _stored(rows: Array, tensor: Tensor, name: str, rounding: Rounding) -> Array:
    with np.errstate(over="ignore"):  # found here, with its name
        stored = rows.astype(numpy_dtype(tensor.dtype))
    if not all_finite(stored, tensor.dtype):
        raise LexigraftError(
            f"{name} is not finite after the merge",
            needed="finite numbers in the adapters, and a result within the range of the base's "
            "type",
            fix="look at the training runs of the adapters, and at the weights",
        )
    rounding.see(float(np.abs(rows - stored.astype(np.float64)).max(initial=0.0)))
    return stored
