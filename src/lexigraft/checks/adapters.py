"""Does an adapter fit the model that it is to be used on?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lexigraft.checkpoints.header import Tensor
from lexigraft.checks.facts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Facts
from lexigraft.checks.findings import Finding, finding, from_error
from lexigraft.errors import LexigraftError
from lexigraft.families.tokenmap import TokenMap, first_difference, without

# Last part of the names under which models keep input embeddings and heads.
_VOCABULARY_MODULES = frozenset(
    (
        *("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "embedding"),
        *("tok_embeddings", "shared", "lm_head", "embed_out", "output_layer", "output"),
    )
)
# Tensors that are no whole copy of a vocabulary tensor, but have one dimension of its length.
_LONG_AXIS = (
    (re.compile(r"\.lora_embedding_A(\.\w+)?$"), 1),
    (re.compile(r"\.lora_B(\.\w+)?\.weight$"), 0),
)


@dataclass(frozen=True)
class AdapterRows:
    """How long a vocabulary an adapter was trained with.

    Attributes:
        by_tensor: name -> rows, of each tensor with one entry per row of the vocabulary.
        last_id: highest id whose row is stored on its own; -1 if none.
    """

    by_tensor: dict[str, int]
    last_id: int

    @property
    def rows(self) -> int:
        """The number of rows that a model needs to carry the adapter; 0 if it says nothing."""
        return max([self.last_id + 1, *self.by_tensor.values()])


def adapter_rows(adapter: Facts) -> AdapterRows:
    """The vocabulary that the tensors of an adapter imply."""
    by_tensor = {}
    for name, tensor in adapter.adapter.items():
        axis = _vocabulary_axis(name)
        if axis is not None and len(tensor.shape) > axis:
            by_tensor[name] = tensor.shape[axis]
    return AdapterRows(by_tensor, max(_trained_ids(adapter.config[ADAPTER_CONFIG]), default=-1))


def _vocabulary_axis(name: str) -> int | None:
    for pattern, axis in _LONG_AXIS:
        match = pattern.search(name)
        if match:
            return axis if name[: match.start()].rsplit(".", 1)[-1] in _VOCABULARY_MODULES else None
    from lexigraft.adapters.keys import parse

    key = parse(name)
    if key.part not in ("full", "saved", "base"):
        return None
    module, _, leaf = key.target.rpartition(".")
    return 0 if leaf == "weight" and module.rsplit(".", 1)[-1] in _VOCABULARY_MODULES else None


def _trained_ids(config: dict[str, Any]) -> list[int]:
    found = config.get("token_indices") or config.get("trainable_token_indices") or []
    lists = list(found.values()) if isinstance(found, dict) else [found]
    return [i for ids in lists if isinstance(ids, list) for i in ids if isinstance(i, int)]


@dataclass(frozen=True)
class _Stage:
    """A model as it is once some adapters are merged into it; `model.folder` is the model's."""

    model: Facts
    before: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """What it is called."""
        added = ", ".join(map(str, self.before))
        return f"{self.model.folder}" + (f" with {added}" if added else "")

    def merge(self, adapter: Facts, options: str = "") -> str:
        """The command that merges all of it with one adapter more."""
        folders = " ".join(map(str, (self.model.folder, *self.before, adapter.folder)))
        return f"lexigraft merge {folders}{options} -o MERGED"

    def grown(self, adapter: Facts) -> _Stage:
        """With the tokens and rows of an adapter that was trained on it."""
        tokens = max(self.model.tokens, adapter.tokens, key=_length)
        if adapter.replaced(self.model):
            tokens = adapter.tokens
        vocabulary = self.model.vocabulary
        if vocabulary is not None:
            rows = max(vocabulary.rows, adapter_rows(adapter).rows, _length(tokens))
            vocabulary = replace(vocabulary, rows=rows)
        model = replace(self.model, tokens=tokens, vocabulary=vocabulary)
        return _Stage(model, (*self.before, adapter.folder))


def _length(tokens: TokenMap | None) -> int:
    return tokens.tokens if tokens is not None else 0


def stack_findings(
    model: Facts, adapters: Sequence[Facts]
) -> Iterator[tuple[Facts, list[Finding]]]:
    """Faults of each adapter that is to be used on a model, on the result of those before it.

    An adapter that cannot have been trained so is held against the model alone.
    """
    stages = [_Stage(model)]
    for adapter in adapters:
        if ADAPTER_CONFIG not in adapter.config:
            continue
        apart = list(_apart(stages, adapter))
        stage = stages[0] if apart or _moved(stages[-1].model, adapter) is not None else stages[-1]
        yield adapter, [*apart, *adapter_findings(adapter), *_on_model(stage, adapter)]
        stages.append(stage.grown(adapter))


def _apart(stages: Sequence[_Stage], adapter: Facts) -> Iterator[Finding]:
    """An adapter that fits the model, and was not trained on the adapters named before it."""
    first, last = stages[0].model.tokens, stages[-1].model.tokens
    own = adapter.tokens
    if first is None or last is None or own is None or _moved(stages[0].model, adapter) is not None:
        return
    beside = _moved(stages[-1].model, adapter)
    other = stages[-1].before[-1] if stages[-1].before else None
    if beside is not None:
        there = repr(last.texts[beside]) if beside in last.texts else "none"
        found = (
            f"gives id {beside} to {own.texts.get(beside)!r}, {other} gives it to {there}: each "
            "was trained on the model, neither on the result of the other"
        )
        needed = "one of them at a time, or a merge side by side, which goes by the text of tokens"
        fix = stages[-1].merge(adapter, f" --weights {','.join('1' * len(stages))}")
    elif first.tokens < own.tokens < last.tokens:
        found = (
            f"has {own.tokens:,} of the {last.tokens:,} tokens of {other}, which was trained on "
            "its result and is named before it"
        )
        needed = "adapters in the order in which they were trained"
        fix = f"lexigraft merge {stages[0].model.folder} {adapter.folder} {other} -o MERGED"
    else:
        return
    yield finding("LG412", str(adapter.folder), found, needed=needed, fix=fix)


def adapter_findings(adapter: Facts) -> Iterator[Finding]:
    """Faults of an adapter by itself."""
    if ADAPTER_CONFIG not in adapter.config:
        return
    empty = _empty_tensors(adapter)
    if empty:
        yield _empty(empty)
        return
    yield from _unsupported(adapter)
    if adapter.adapter:
        yield from _own_rows(adapter, adapter_rows(adapter))


def _on_model(stage: _Stage, adapter: Facts) -> Iterator[Finding]:
    """Faults between an adapter and the model that it is to be used on."""
    needed, rows = adapter_rows(adapter), stage.model.rows
    if rows is None or not adapter.adapter or _empty_tensors(adapter):
        return
    moved = _moved(stage.model, adapter)
    if moved is not None:
        yield _stranger(stage.model, adapter, moved)
    else:
        yield from _given_away(stage.model, adapter)
        yield from _against_rows(stage, rows, adapter, needed)
    yield from _shapes(stage.model, adapter)


def _empty_tensors(adapter: Facts) -> list[Tensor]:
    return [tensor for tensor in adapter.adapter.values() if 0 in tensor.shape]


def _empty(empty: list[Tensor]) -> Finding:
    return finding(
        "LG403",
        empty[0].name,
        f"has shape {list(empty[0].shape)} ({len(empty)} tensors are empty): the adapter was saved "
        "from one rank of DeepSpeed ZeRO-3 without gathering the others",
        needed="whole tensors",
        fix="python zero_to_fp32.py in the training folder, or save with "
        "stage3_gather_16bit_weights_on_model_save",
    )


def _unsupported(adapter: Facts) -> Iterator[Finding]:
    from lexigraft.adapters.config import AdapterConfig

    try:
        AdapterConfig.read(adapter.folder)
    except LexigraftError as fault:
        yield from_error("LG410", ADAPTER_CONFIG, fault)


def _own_rows(adapter: Facts, needed: AdapterRows) -> Iterator[Finding]:
    """The adapter against its own tokenizer."""
    lengths = sorted(set(needed.by_tensor.values()))
    if len(lengths) > 1:
        shortest = min(needed.by_tensor, key=lambda name: needed.by_tensor[name])
        yield finding(
            "LG408",
            shortest,
            f"has {lengths[0]:,} rows, another vocabulary tensor of the adapter has "
            f"{lengths[-1]:,}",
            needed="vocabulary tensors of one length",
            fix="save the adapter again with model.save_pretrained",
        )
    tokens = adapter.tokens.tokens if adapter.tokens else 0
    if lengths and tokens > lengths[-1]:
        yield finding(
            "LG407",
            ADAPTER_WEIGHTS,
            f"holds {lengths[-1]:,} rows, its tokenizer has {tokens:,} tokens",
            needed=f"the tokenizer that it was trained with, of at most {lengths[-1]:,} tokens",
            fix=f"copy that tokenizer into {adapter.folder}",
        )
    elif adapter.tokens and needed.last_id >= tokens:
        yield finding(
            "LG411",
            ADAPTER_CONFIG,
            f"trains the row of id {needed.last_id:,}, its tokenizer has {tokens:,} tokens",
            needed=f"ids below {tokens:,}",
            fix="train again with the ids of the new tokens",
        )


def _moved(model: Facts, adapter: Facts) -> int | None:
    """The lowest id that means one thing to the model and another to the adapter."""
    if model.tokens is None or adapter.tokens is None:
        return None
    moved = first_difference(without(model.tokens, adapter.replaced(model)), adapter.tokens)
    foreign = model.replaced(adapter)
    if moved is not None and (adapter.tokens.tokens < model.tokens.tokens or foreign):
        # An adapter from before the model was extended is no stranger.
        moved = first_difference(without(adapter.tokens, foreign), model.tokens)
    return moved


def _given_away(model: Facts, adapter: Facts) -> Iterator[Finding]:
    """An adapter from before the model's tokens were replaced, with rows of the old ones."""
    foreign = model.replaced(adapter)
    rows = adapter_rows(adapter)
    trained = sorted(set(foreign).intersection(_trained_ids(adapter.config[ADAPTER_CONFIG])))
    lost = list(foreign) if rows.by_tensor else trained
    if lost and model.tokens is not None and adapter.tokens is not None:
        first = lost[0]
        yield finding(
            "LG404",
            str(adapter.folder),
            f"trained rows of {len(lost):,} ids to which {model.folder} gave other tokens since: "
            f"id {first} is {model.tokens.texts.get(first)!r} there and "
            f"{adapter.tokens.texts.get(first)!r} here",
            needed="an adapter that trained no row of these ids",
            fix="merge it into the model that it was trained on, or train it again on this one",
        )


def _stranger(model: Facts, adapter: Facts, moved: int) -> Finding:
    here, there = (
        repr(facts.tokens.texts[moved]) if facts.tokens and moved in facts.tokens.texts else "none"
        for facts in (model, adapter)
    )
    return finding(
        "LG404",
        str(adapter.folder),
        f"its tokenizer is no extension of that of {model.folder}: id {moved} is {there} there "
        f"and {here} here, so its rows belong to other words",
        needed="an adapter that was trained on this model or on an extension of it",
        fix=f"lexigraft check OTHER --adapter {adapter.folder} (OTHER: the model named in its "
        f"{ADAPTER_CONFIG})",
    )


def _against_rows(
    stage: _Stage, rows: int, adapter: Facts, needed: AdapterRows
) -> Iterator[Finding]:
    own = adapter.tokens.tokens if adapter.tokens else 0
    before = stage.model.tokens.tokens if stage.model.tokens else rows
    merge = stage.merge(adapter)
    if needed.rows > rows and own:
        yield finding(
            "LG401",
            ADAPTER_WEIGHTS,
            f"has {needed.rows:,} rows, {stage.name} has {rows:,}: {own - before:,} tokens were "
            f"added before the adapter was trained ({before:,} -> {own:,}), and this model was not "
            "grown with them; loading it with PEFT ends in a size mismatch",
            needed=f"a model with {needed.rows:,} rows; merge grows it from the adapter",
            fix=merge,
        )
    elif needed.rows > rows:
        yield finding(
            "LG405",
            str(adapter.folder),
            f"has {needed.rows:,} rows, {stage.name} has {rows:,}, and no tokenizer lies beside "
            "the adapter that says which tokens the new rows belong to",
            needed="the tokenizer that the adapter was trained with",
            fix=stage.merge(adapter, " --tokenizer TOKENIZER"),
        )
    elif own > rows:
        yield _rows_unsaved(stage, rows, adapter, own)
    elif own > before:
        yield finding(
            "LG406",
            str(adapter.folder),
            f"was trained with {own:,} tokens, the tokenizer of {stage.name} has {before:,}: "
            "with that one the new tokens never occur",
            needed="the adapter's tokenizer beside the weights",
            fix=merge,
        )
    elif replaced := adapter.replaced(stage.model):
        yield finding(
            "LG406",
            str(adapter.folder),
            f"was trained with new tokens on {len(replaced):,} ids of {stage.name} (from id "
            f"{replaced[0]} on): with that tokenizer they never occur",
            needed="the adapter's tokenizer and rows",
            fix=merge,
        )
    if needed.by_tensor and needed.rows < rows:
        yield finding(
            "LG402",
            ADAPTER_WEIGHTS,
            f"has {needed.rows:,} rows, {stage.name} has {rows:,}: the trainer cut padding rows "
            "off, or the model was extended later",
            needed="the same number of rows",
            fix=merge,
        )


def _rows_unsaved(stage: _Stage, rows: int, adapter: Facts, own: int) -> Finding:
    """The tokenizer grew, but no tensor holds the new rows; a manifest may rebuild them."""
    rebuilt = adapter.manifest is not None and adapter.manifest.last("graft") is not None
    return finding(
        "LG401" if rebuilt else "LG407",
        str(adapter.folder),
        f"its tokenizer has {own:,} tokens, {stage.name} has {rows:,} rows, and the adapter "
        "stores no rows for the others"
        + (": they are those of graft, which its manifest describes" if rebuilt else ""),
        needed=f"a model with {own:,} rows",
        fix=stage.merge(adapter)
        if rebuilt
        else "merge it into the resized model that it was trained on",
    )


def _shapes(model: Facts, adapter: Facts) -> Iterator[Finding]:
    """Tensors of the adapter that have no place in the model, or another shape: all in one."""
    if model.checkpoint is None or model.vocabulary is None:
        return
    from lexigraft.adapters.classifier import without_head
    from lexigraft.adapters.folder import Adapter
    from lexigraft.adapters.match import match
    from lexigraft.adapters.misfits import Misfits
    from lexigraft.checkpoints.config import refuse_quantised

    misfits = Misfits()
    try:
        refuse_quantised(model.checkpoint)  # whose weights are packed
        opened = Adapter.open(adapter.folder)
        vocabulary = model.vocabulary
        if opened.config.classifies:
            vocabulary = without_head(vocabulary)
        match(opened, model.checkpoint, vocabulary, misfits)
    except LexigraftError:  # a finding already, or what only merge refuses
        pass
    if misfits.found:
        first = misfits.found[0]
        yield finding(
            "LG408",
            ADAPTER_WEIGHTS if len(misfits.found) > 1 else first.tensor,
            misfits.told() if len(misfits.found) > 1 else first.found,
            needed=first.needed,
            fix=first.fix,
        )
