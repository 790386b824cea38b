"""The vocabulary tensors of a merged model: how many rows, tied or not, and each row's source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from lexigraft.adapters.config import AdapterConfig
from lexigraft.adapters.folder import Adapter
from lexigraft.adapters.match import Change
from lexigraft.adapters.misfits import Misfits
from lexigraft.adapters.rebuild import lost_source, rebuilt_rows
from lexigraft.adapters.rounding import Rounding
from lexigraft.adapters.tokens import TokenizerChoice
from lexigraft.adapters.vocabulary import (
    VocabularyRows,
    equal_rows,
    moved_rows,
    vocabulary_rows,
)
from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.fit import ids_in_use
from lexigraft.checkpoints.growth import Growth
from lexigraft.checkpoints.rows import read_rows
from lexigraft.checkpoints.survey import Survey, survey
from lexigraft.console import note
from lexigraft.errors import LexigraftError
from lexigraft.families.tokenmap import TokenMap, aligned
from lexigraft.manifest import ExtractRecord, GraftRecord

NOTHING = Change()


@dataclass(frozen=True)
class Expansion:
    """The vocabulary of the result.

    Attributes:
        tensors: the vocabulary tensors that differ from the base's, to be written.
        growth: from how many rows to how many.
        tied: the head of the result is its input embedding.
        adapter_rows: rows of the model that the adapter was trained on.
    """

    tensors: tuple[VocabularyRows, ...]
    growth: Growth
    tied: bool
    adapter_rows: int


def expand(
    adapter: Adapter,
    checkpoint: Checkpoint,
    vocabulary: VocabularyTensors,
    *,
    changes: Mapping[str, Change],
    tokenizer: TokenizerChoice,
    misfits: Misfits,
    trim: bool = False,
    rounding: Rounding | None = None,
) -> Expansion:
    """Decide the rows of every vocabulary tensor of the result.

    Args:
        adapter: the adapter.
        checkpoint: the base.
        vocabulary: its vocabulary tensors.
        changes: what the adapter does, by name.
        tokenizer: the result's.
        misfits: those that `match` found; numbers of rows are added, and all are raised.
        trim: leave out padding rows of the base that the adapter was trained without.
        rounding: is told what rounding sums to a 16-bit type costs.

    Raises:
        LexigraftError: row counts contradict each other or the tokenizer, there were misfits
            before, or a row has no source.
    """
    head, known = vocabulary.head_name, _rows_of_full(adapter, changes, misfits)
    growth = _growth(adapter, vocabulary, tokenizer, known, misfits)
    _note_unknown_ids(adapter, changes, tokenizer, misfits)
    _note_foreign_rows(adapter, changes, tokenizer, misfits)
    misfits.require_none()
    if trim:
        _require_spare_rows(adapter, checkpoint, growth, known)
        growth = replace(growth, rows=known)
    # An older tokenizer knows less than the base: its adapter's further rows are padding.
    trained = tokenizer.trained
    full_rows = known if trained is None or trained >= tokenizer.base.tokens else trained

    @cache
    def known_rows(stored: str) -> Survey:
        return survey(checkpoint.tensors[stored], growth.first_id, growth.replaced)

    def rows(name: str, change: Change) -> VocabularyRows:
        stored = _stored(name, checkpoint, vocabulary)
        return vocabulary_rows(
            name,
            checkpoint.tensors[stored],
            change,
            growth,
            full_rows=full_rows,
            rebuilt=rebuilt.get(stored),
            lost=lost_source(adapter.manifest),
            mean=lambda: known_rows(stored).mean,
            rounding=rounding,
        )

    new_ids = set(growth.new_ids)
    lacking = [
        name
        for name in vocabulary.names
        if (change := changes.get(name, NOTHING)).full is None and new_ids - set(change.ids)
    ]
    rebuilt = rebuilt_rows(
        lacking, adapter.manifest, checkpoint, vocabulary, tokenizer, known=known_rows
    )
    written, tied = _settle_ties(vocabulary, changes, adapter.config)
    tensors = {n: rows(n, change) for n, change in written.items() if growth.grows or change}
    if vocabulary.tied and not tied:
        embedding = tensors.get(vocabulary.embeds[0]) or rows(vocabulary.embeds[0], NOTHING)
        separate = rows(head, written[head])
        if equal_rows(embedding, separate):
            tied = True
            tensors.pop(head, None)
        else:
            tensors[head] = separate
    return Expansion(tuple(tensors.values()), growth, tied, known or growth.rows)


def expand_moved(
    adapter: Adapter,
    checkpoint: Checkpoint,
    vocabulary: VocabularyTensors,
    *,
    changes: Mapping[str, Change],
    own: TokenMap,
    base: TokenMap,
    misfits: Misfits,
) -> Expansion:
    """The vocabulary tensors of an adapter that was trained with a sibling of the base's tokenizer.

    Rows go by the ids of `own`: see `moved_rows`. `misfits` are treated as by `expand`.

    Raises:
        RefusalError: a form that needs rows which nobody holds.
        LexigraftError: row counts contradict each other or `own`, or a row has no source.
    """
    known = _rows_of_full(adapter, changes, misfits)
    highest = _highest_id(changes)
    if (known and known < own.tokens) or highest >= own.tokens:
        misfits.add(
            str(adapter.weights),
            f"has {known or highest + 1:,} rows for a tokenizer of {own.tokens:,} tokens",
            "the tokenizer that the adapter was trained with",
            "name it with --tokenizer FOLDER",
        )
    misfits.require_none()
    places = aligned(own, base)
    written, tied = _settle_ties(vocabulary, changes, adapter.config)
    lacks = bool(own.texts.keys() - places.keys())
    tensors = {
        name: moved_rows(
            name, checkpoint.tensors[_stored(name, checkpoint, vocabulary)], change, own, places
        )
        for name, change in written.items()
        if lacks or change or (vocabulary.tied and not tied)
    }
    embedding, head = vocabulary.embeds[0], vocabulary.head_name
    if vocabulary.tied and not tied and equal_rows(tensors[embedding], tensors[head]):
        tied = True
        del tensors[head]
    growth = Growth(own.tokens, own.tokens, own.tokens, own.tokens)
    return Expansion(tuple(tensors.values()), growth, tied, known or own.tokens)


def _stored(name: str, checkpoint: Checkpoint, vocabulary: VocabularyTensors) -> str:
    """The tensor of the base that `name` starts from: a tied head is not stored."""
    return name if name in checkpoint.tensors else vocabulary.embeds[0]


def _rows_of_full(adapter: Adapter, changes: Mapping[str, Change], misfits: Misfits) -> int:
    """The rows of the adapter's whole matrices and of its LoRA; 0 where it holds none."""
    counts = {name: change.rows for name, change in changes.items() if change.rows}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items()))
        misfits.add(
            f"vocabulary tensors of {adapter.weights}",
            f"have different numbers of rows ({found})",
            "the same number in each",
            "save the adapter again with model.save_pretrained",
        )
    return min(counts.values(), default=0)


def _growth(
    adapter: Adapter,
    vocabulary: VocabularyTensors,
    tokenizer: TokenizerChoice,
    known: int,
    misfits: Misfits,
) -> Growth:
    first, tokens, before = tokenizer.base.tokens, tokenizer.map.tokens, vocabulary.rows
    if before < first:
        raise LexigraftError(
            f"the base has {before:,} rows and a tokenizer of {first:,} tokens",
            needed="a row for every token",
            fix="lexigraft check BASE",
        )
    if known > before and tokenizer.trained is None:
        misfits.add(
            str(adapter.folder),
            f"has {known:,} rows and no tokenizer; the base has {before:,}",
            "the tokenizer that the adapter was trained with, to know what the new rows are",
            "add --tokenizer FOLDER, or copy its tokenizer files into the adapter folder",
        )
    needed = tokenizer.trained if tokenizer.trained is not None else first
    if known and known < needed:
        file = tokenizer.file if tokens == needed else adapter.folder
        misfits.add(
            str(adapter.weights),
            f"has {known:,} rows for a tokenizer of {needed:,} tokens ({file})",
            "a row for every token",
            "name the tokenizer that the adapter was trained with: --tokenizer FOLDER",
        )
    if tokenizer.trained == tokens and known > max(before, tokens):
        note(
            f"{adapter.weights} has {known:,} rows, {tokenizer.file} {tokens:,} tokens: the rows "
            "beyond them are taken for padding; if they were trained, that is another model's "
            "tokenizer"
        )
    return Growth(
        before,
        first,
        tokens,
        max(before, tokens, known or _grafted_rows(adapter, tokenizer)),
        tokenizer.replaced,
    )


def _require_spare_rows(
    adapter: Adapter, checkpoint: Checkpoint, growth: Growth, known: int
) -> None:
    """The rows from `known` on are padding that nothing uses."""
    if not 0 < known < growth.rows_before:
        held = f"has {known:,} rows" if known else "holds no whole vocabulary matrix"
        raise LexigraftError(
            f"--trim: {adapter.weights} {held}, the base has {growth.rows_before:,} rows",
            needed="an adapter that was trained with fewer rows than the base has",
            fix="leave --trim out",
        )
    used = {*ids_in_use(checkpoint.folder), growth.tokens - 1}
    if max(used) >= known:
        raise LexigraftError(
            f"--trim: {adapter.weights} has {known:,} rows, and id {max(used):,} of "
            f"{checkpoint.folder} is in use",
            needed="padding rows alone beyond the adapter's",
            fix="leave --trim out",
        )


def _grafted_rows(adapter: Adapter, tokenizer: TokenizerChoice) -> int:
    """Rows of the model that it was trained on or extracted from, where the manifest tells."""
    records = adapter.manifest.records if adapter.manifest else []
    known = [record for record in records if isinstance(record, GraftRecord | ExtractRecord)]
    record = known[-1] if known else None
    if record is None or record.token_map != tokenizer.map.hash:
        return 0
    return int(record.rows)


def _highest_id(changes: Mapping[str, Change]) -> int:
    """The highest id whose row was trained singly; -1 where there is none."""
    return max((max(change.ids, default=-1) for change in changes.values()), default=-1)


def _note_unknown_ids(
    adapter: Adapter, changes: Mapping[str, Change], tokenizer: TokenizerChoice, misfits: Misfits
) -> None:
    limit = tokenizer.base.tokens if tokenizer.trained is None else tokenizer.trained
    highest = _highest_id(changes)
    if highest >= limit:
        misfits.add(
            str(adapter.folder),
            f"trained the row of id {highest:,}; its tokenizer has {limit:,} tokens",
            "the tokenizer that the adapter was trained with",
            "add --tokenizer FOLDER, or copy its tokenizer files into the adapter folder",
        )


def _note_foreign_rows(
    adapter: Adapter, changes: Mapping[str, Change], tokenizer: TokenizerChoice, misfits: Misfits
) -> None:
    """An older adapter must leave the rows alone that belong to other words by now."""
    foreign = tokenizer.foreign
    for name, change in changes.items():
        whole = change.full is not None or change.added is not None
        lost = foreign if whole else sorted(set(foreign).intersection(change.ids))
        if lost:
            misfits.add(
                str(adapter.folder),
                f"trained rows of {name} whose ids have other tokens in the base since "
                f"({len(lost):,} ids, the first {lost[0]}: now {tokenizer.map.texts[lost[0]]!r})",
                "an adapter that trained no row of an id that was replaced",
                "merge it into the model that it was trained on, or train it again on this one",
            )


def _settle_ties(
    vocabulary: VocabularyTensors,
    changes: Mapping[str, Change],
    config: AdapterConfig,
) -> tuple[dict[str, Change], bool]:
    """The change of each tensor of the result, and whether embedding and head share theirs.

    In a tied model an adapter may hold one of the two or both. One alone stands for both, unless
    it was trained as a copy of its own (`modules_to_save` without `ensure_weight_tying`, or rows
    of the head only). LoRA is added to the one that it was trained on; with
    `ensure_weight_tying` one LoRA is that of both, and is added once.
    """
    written = {name: changes.get(name, NOTHING) for name in vocabulary.names}
    if not vocabulary.tied:
        return written, False
    embedding, head = vocabulary.embeds[0], vocabulary.head_name
    in_embedding, in_head = written[embedding], changes.get(head, NOTHING)
    shared = _shared_change(vocabulary, in_embedding, in_head, config)
    if shared is not None:
        return {**written, embedding: shared}, True
    one, other = _separate_changes(in_embedding, in_head)
    return {**written, embedding: one, head: other}, False


def _shared_change(
    vocabulary: VocabularyTensors, in_embedding: Change, in_head: Change, config: AdapterConfig
) -> Change | None:
    """The one change of an embedding and the head that is tied to it; None where they differ."""
    embedding, head = vocabulary.embeds[0], vocabulary.head_name
    if in_embedding.added or in_head.added:
        if not _is_one(in_embedding, in_head, config):
            return None
        return in_embedding if in_embedding.added else in_head
    if not in_head:
        is_own = in_embedding and _is_copy(embedding, config) and not _is_copy(head, config)
        return None if is_own else in_embedding
    if not in_embedding and not _is_copy(head, config) and in_head.full is not None:
        return in_head
    return in_embedding if in_embedding == in_head else None


def _separate_changes(in_embedding: Change, in_head: Change) -> tuple[Change, Change]:
    """The changes of an embedding and of the head that was tied to it, each complete.

    PEFT stores the weight that LoRA was trained on where the vocabulary was resized: here it is
    the other's weight too. A head with LoRA goes on reading the rows that were trained on the
    embedding.
    """
    added = [change for change in (in_embedding, in_head) if change.added]
    if in_head.added and in_embedding.values and not in_head.values:
        in_head = replace(in_head, ids=in_embedding.ids, values=in_embedding.values)
    before = next((change.full for change in added if change.full is not None), None)
    one, other = (replace(change, full=change.full or before) for change in (in_embedding, in_head))
    return one, other


def _is_one(in_embedding: Change, in_head: Change, config: AdapterConfig) -> bool:
    """True when one LoRA was trained for both.

    With `ensure_weight_tying` PEFT stores it twice. On a 16-bit base the two are cast apart and
    trained apart nevertheless: then each counts where it is.
    """
    if not config.shared_when_tied or in_embedding.added is None or in_head.added is None:
        return config.shared_when_tied
    one, other = in_embedding.added.low_rank, in_head.added.low_rank
    if one.magnitude is not None or other.magnitude is not None:
        return False  # DoRA scales an embedding by column and a head by row
    return all(
        np.array_equal(read_rows(this).T, read_rows(that))
        for this, that in ((one.a, other.b), (one.b, other.a))
    )


def _is_copy(name: str, config: AdapterConfig) -> bool:
    module = name.removesuffix(".weight")
    return config.names_saved_module(module) and not config.shared_when_tied
