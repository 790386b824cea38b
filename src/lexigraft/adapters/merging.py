"""A merge of one adapter: thought through from headers, then written as a whole model folder.

`merge` puts all of an adapter into the weights; `split` leaves LoRA on linear layers out.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexigraft.adapters.classifier import classifier_config, count_of, without_head
from lexigraft.adapters.expand import expand
from lexigraft.adapters.folder import Adapter, Addition
from lexigraft.adapters.match import Matched, match
from lexigraft.adapters.misfits import Misfits
from lexigraft.adapters.planning import merged_plan
from lexigraft.adapters.rounding import Rounding
from lexigraft.adapters.special import changed_special_ids, with_special_ids
from lexigraft.adapters.tokens import TokenizerChoice, require_recorded
from lexigraft.adapters.vocabulary import WrittenRows
from lexigraft.checkpoints.architectures import VocabularyTensors, is_tied_by_config
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.config import edit_config
from lexigraft.checkpoints.fit import open_whole, require_consistent
from lexigraft.checkpoints.growth import Growth
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.plan import Plan
from lexigraft.checkpoints.side_files import bytes_beside, copy_side_files
from lexigraft.checkpoints.survey import survey
from lexigraft.checkpoints.write import write_plan
from lexigraft.console import note, progress
from lexigraft.errors import RefusalError
from lexigraft.files import read_json, read_object, write_json
from lexigraft.manifest import NEW_TOKENS, Manifest

# Two writers keep the peak below 500 MB, torch's 224 included.
WRITERS = 2
# Characters of a value in a config, where it is told that it changed.
_SHOWN = 40


@dataclass(frozen=True)
class Job:
    """A merge that has been thought through and not yet begun.

    Attributes:
        checkpoint: the base.
        adapters: what goes into it.
        vocabulary: the base's vocabulary tensors, as far as the result has them.
        tokenizer: the result's.
        changed: tensors outside the vocabulary that change, or that the base has not.
        written: the vocabulary tensors that are made.
        growth: from how many rows to how many.
        tied: the head of the result is its input embedding.
        plan: the weights to be written.
        adapter_rows: rows of the model that the adapter was trained on.
        labels: the head over labels of a classifier.
        weights: one per adapter, where several are added together.
        apart: name of a weight -> the LoRA that was left out.
        body_only: what the adapters hold of the vocabulary was left out.
        trimmed: padding rows of the base were left out.
        rounding: what rounding costs, once it is written.
    """

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    vocabulary: VocabularyTensors
    tokenizer: TokenizerChoice
    changed: frozenset[str]
    written: tuple[WrittenRows, ...]
    growth: Growth
    tied: bool
    plan: Plan
    adapter_rows: int = 0
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    apart: Mapping[str, Addition] = field(default_factory=dict)
    body_only: bool = False
    trimmed: bool = False
    rounding: Rounding = field(default_factory=Rounding)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The folders whose vocabulary went into the result: the base's and the adapters'."""
        adapters = () if self.body_only else self.adapters
        return (self.checkpoint.folder, *(adapter.folder for adapter in adapters))

    def records(self) -> list[Any]:
        """The stage records of the sources, each once."""
        records: list[Any] = []
        for manifest in map(Manifest.read, self.sources):
            records += [r for r in (manifest or Manifest()).records if r not in records]
        return records


def prepare(
    base: Path,
    adapter_folder: Path,
    given: Path | None,
    *,
    linear_apart: bool = False,
    body_only: bool = False,
    trim: bool = False,
) -> Job:
    """Decide how one adapter goes into its base.

    Args:
        base: the model that was trained, or the model as it was before it was grafted.
        adapter_folder: the adapter.
        given: the tokenizer that it was trained with, where its folder has none.
        linear_apart: leave LoRA on linear layers outside the vocabulary out.
        body_only: leave out what the adapter holds of the vocabulary.
        trim: leave out padding rows of the base that the adapter was trained without.

    Raises:
        RefusalError: a kind of adapter or base that is not supported.
        LexigraftError: the parts do not fit together, or a file is missing or damaged.
    """
    adapter = Adapter.open(adapter_folder)
    checkpoint, whole = open_whole(base)
    vocabulary = without_head(whole) if adapter.config.classifies else whole
    tokenizer = TokenizerChoice.among(base, base if body_only else adapter_folder, given)
    misfits = Misfits()
    matched = match(adapter, checkpoint, vocabulary, misfits)
    if body_only:
        misfits.require_none()
        matched = body_of(matched, adapter)
    else:
        require_recorded(adapter.manifest, tokenizer, adapter_folder)
    apart: dict[str, Addition] = {}
    if linear_apart:
        apart = {n: one for n, one in matched.linear.items() if not one.low_rank.of_embedding}
        kept = {n: one for n, one in matched.linear.items() if n not in apart}
        matched = dataclasses.replace(matched, linear=kept)
    rounding = Rounding()
    expansion = expand(
        adapter,
        checkpoint,
        vocabulary,
        changes=matched.vocabulary,
        tokenizer=tokenizer,
        misfits=misfits,
        trim=trim,
        rounding=rounding,
    )
    say_if_other_base(checkpoint, adapter, tokenizer)
    dropped = [name for name in whole.names if name not in vocabulary.names]
    return Job(
        checkpoint,
        (adapter,),
        vocabulary,
        tokenizer,
        frozenset((*matched.changes, *matched.labels)),
        expansion.tensors,
        expansion.growth,
        expansion.tied,
        merged_plan(checkpoint, vocabulary, matched, expansion, dropped=dropped, rounding=rounding),
        expansion.adapter_rows,
        matched.labels,
        apart=apart,
        body_only=body_only,
        trimmed=trim,
        rounding=rounding,
    )


def body_of(matched: Matched, adapter: Adapter) -> Matched:
    """An adapter without what it holds of the vocabulary; what that is, is told.

    Raises:
        RefusalError: nothing is left.
    """
    if not matched.changes and not matched.labels:
        raise RefusalError(
            f"{adapter.folder} changes only vocabulary tensors, and --body-only leaves them out",
            needed="LoRA on the layers of the model",
            fix="leave --body-only out; with the tokenizers of both, --remap moves rows by text",
        )
    if matched.vocabulary:
        note(f"left out of {adapter.folder}: {', '.join(matched.vocabulary)}")
    return dataclasses.replace(matched, vocabulary={})


def say_if_other_base(checkpoint: Checkpoint, adapter: Adapter, tokenizer: TokenizerChoice) -> None:
    """Notice old rows that are not those that the trained model was grafted from."""
    record = adapter.manifest.last("graft") if adapter.manifest else None
    if record is None or record.base.token_map != tokenizer.base.hash:
        return
    for name, sha256 in record.base_rows.items():
        tensor = checkpoint.tensors.get(name)
        left_out = record.new_ids.replaced
        if tensor is not None and survey(tensor, record.first_id, left_out).sha256 != sha256:
            note(
                f"{name} of {checkpoint.folder} is not that of the model which was grafted and "
                f"trained ({record.base.name}): the result is that of another base"
            )


def write(job: Job, folder: Path, record: Any, *, replay: bool = False) -> None:
    """Write the model into `folder`: weights, configs, tokenizer, and a manifest with `record`.

    Args:
        job: what to write.
        folder: an existing, empty folder.
        record: what the manifest tells of it.
        replay: read the weights back: see `write_plan`.

    Raises:
        LexigraftError: a result is not finite or not what was planned, the disk is full, or an
            input changed meanwhile.
    """
    with progress("merging", total=sum(file.bytes for file in job.plan.files)) as advance:
        write_plan(
            job.plan,
            folder,
            threads=WRITERS,
            advance=advance,
            beside=bytes_beside(job.checkpoint),
            replay=replay,
        )
    for name in copy_side_files(job.checkpoint, folder):
        note(f"left out: {name} (it holds weights, or a tokenizer, of the old vocabulary)")
    _write_configs(job, folder)
    job.tokenizer.copy(job.checkpoint.folder, folder)
    for name in job.tokenizer.missing(job.checkpoint.folder):
        note(
            f"{name} is not written: no copy with the new tokens is at hand, and the base's is "
            f"stale. Name a folder that has it with --tokenizer."
        )
    Manifest(records=job.records()).plus(record).write(folder)
    _copy_new_tokens(job, folder)
    require_consistent(
        folder, rows=job.growth.rows, tokens=job.tokenizer.map, vocabulary=job.vocabulary
    )


def _write_configs(job: Job, folder: Path) -> None:
    source = job.checkpoint.folder
    ids = changed_special_ids(source, job.tokenizer.folder, job.tokenizer.map)
    for key, token_id in ids.items():
        note(f"{key} becomes {token_id} ({job.tokenizer.map.texts[token_id]}), as it was trained")
    comes_apart = is_tied_by_config(job.checkpoint.config) and not job.tied
    untied = False if comes_apart and not job.adapters[0].config.classifies else None
    if untied is False:
        note(
            f"head and embedding differ now: {job.vocabulary.head_name} is written, and "
            "tie_word_embeddings becomes false"
        )
    config = edit_config(
        job.checkpoint.config,
        job.vocabulary,
        rows=job.growth.rows,
        tokens=job.growth.tokens,
        tied=untied,
    )
    if job.labels:
        config = classifier_config(config, count_of(job.labels))
        note(
            f"the result is a classifier of {len(config['id2label'])} labels: "
            f"{', '.join(config['architectures'])}; the adapter does not hold their names"
        )
    _write_if_changed(source, folder, "config.json", with_special_ids(config, ids))
    if (source / "generation_config.json").is_file():
        generation = read_object(source / "generation_config.json")
        _write_if_changed(
            source, folder, "generation_config.json", with_special_ids(generation, ids)
        )


def _write_if_changed(source: Path, target: Path, name: str, content: dict[str, Any]) -> None:
    before = read_json(source / name)
    if content == before:
        shutil.copyfile(source / name, target / name)
        return
    note(f"{name}: {', '.join(_changed_keys(before, content))}")
    write_json(target / name, content)


def _changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Each key that differs, nested ones by their path, with its two values.

    >>> list(_changed_keys({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}))
    ['b.c 2 -> 3', 'd none -> 4']
    """
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{key}.{inner}" for inner in _changed_keys(old, new))
        elif old != new or (key in before) != (key in after):
            yield f"{key} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _copy_new_tokens(job: Job, folder: Path) -> None:
    # Of several vocabularies none lists the tokens of the result.
    base, *adapters = job.sources
    named = (job.tokenizer.folder, *adapters[:1], base)
    for source in named if job.weights is None else job.tokenizer.spare:
        if (source / NEW_TOKENS).is_file():
            shutil.copyfile(source / NEW_TOKENS, folder / NEW_TOKENS)
            break
