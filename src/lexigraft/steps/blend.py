"""`blend`: whole models of one architecture become one, their vocabularies aligned by token text.

Tensors are streamed: memory is a few blocks whatever the model's size. The tokenizer is the union
that keeps the base's ids, in which every added token really comes out.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.adapters.finite import all_finite
from lexigraft.adapters.planning import with_tables
from lexigraft.blending.inputs import (
    Aligned,
    Model,
    body_tensor,
    is_blendable,
    places_of,
    require_alike,
    vocabulary_tensor,
)
from lexigraft.blending.settings import Settings, depths, from_options, from_recipe
from lexigraft.blending.streams import Blended
from lexigraft.checkpoints.architectures import is_tied_by_config
from lexigraft.checkpoints.config import edit_config
from lexigraft.checkpoints.fit import require_consistent
from lexigraft.checkpoints.growth import Growth
from lexigraft.checkpoints.header import data_bytes, numpy_dtype
from lexigraft.checkpoints.plan import Compute, Plan, PlannedTensor
from lexigraft.checkpoints.rows import grown_shape
from lexigraft.checkpoints.side_files import bytes_beside, copy_side_files
from lexigraft.checkpoints.write import write_plan
from lexigraft.console import note, progress, working
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import copy_tokenizer
from lexigraft.families.tokenmap import TokenMap, token_text
from lexigraft.files import (
    Inputs,
    publish,
    read_object,
    read_settings,
    refuse_existing,
    refuse_overwriting,
    write_json,
)
from lexigraft.hub import local_folder, recorded_name
from lexigraft.manifest import BaseTokenizer, BlendRecord, Manifest, versions

WRITERS = 2
_TYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Formats:
    """In which files a tokenizer is written.

    Attributes:
        files: their names.
        why: what decided it.
    """

    files: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class BlendResult:
    """What `blend` wrote.

    Attributes:
        output: the blended model.
        method: how.
        rows: rows of its vocabulary tensors.
        tokens: max id + 1 of its tokenizer.
        added: tokens that the base (chat-vector: the trained model) lacks.
        left_out: tokens that its merges leave no way to.
        tied: its head is its input embedding.
        tensors: how many tensors were blended.
        formats: the files of its tokenizer, and why these.
        plan: with `dry_run`, every tensor with its old and new shape and bytes.
    """

    output: Path
    method: str
    rows: int
    tokens: int
    added: int
    left_out: tuple[str, ...]
    tied: bool
    tensors: int
    formats: Formats
    plan: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        found = {
            "output": str(self.output),
            "method": self.method,
            "rows": self.rows,
            "tokens": self.tokens,
            "added": self.added,
            "left_out": list(self.left_out),
            "tied": self.tied,
            "tensors": self.tensors,
            "formats": {"files": list(self.formats.files), "why": self.formats.why},
        }
        return found if self.plan is None else {**found, "plan": self.plan}

    def lines(self) -> list[str]:
        """What a person reads."""
        plan = [
            f"{entry['tensor']}: {entry['old_shape']} -> {entry['shape']}, "
            f"{entry['bytes_written']:,} bytes"
            for entry in self.plan or ()
        ]
        from lexigraft.selection.union import left_out_lines

        lost = left_out_lines(self.left_out)
        tie = "tied" if self.tied else "with a head of its own"
        done = "would write" if self.plan is not None else "wrote"
        return [
            *plan,
            *lost,
            f"tokenizer in {', '.join(self.formats.files)}: {self.formats.why}",
            f"{done} {self.output}: {self.method} of {self.tensors} tensors, {self.rows:,} rows "
            f"for {self.tokens:,} tokens ({self.added:,} of them added), {tie}",
        ]


@dataclass(frozen=True)
class _Job:
    """A blend that has been thought through and not yet begun."""

    settings: Settings
    models: tuple[Model, ...]
    base: Model
    anchor: Model
    tokens: TokenMap
    tokenizer: Path
    left_out: tuple[str, ...]
    formats: Formats
    growth: Growth
    tied: bool
    plan: Plan
    blended: int


@working("preparing the blend")
def blend(
    models: Sequence[str | Path],
    *,
    output: str | Path,
    base: str | Path | None = None,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    density: Sequence[float] | None = None,
    t: float | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
) -> BlendResult:
    """Blend whole models into one, rows of their vocabularies aligned by token text.

    Args:
        models: folders (or hub ids); or one mergekit recipe, a `.yml` file, which then says all
            but the output.
        output: the folder to write.
        base: what the models were made from; its ids are kept.
        method: a name of `blending.methods.METHODS`.
        weights: one per model; 1 by default.
        density: the share of each model's changes that stays (ties, dare, della); one number for
            all models, or one per model.
        t: where between the base (0) and the other model (1) slerp goes.
        seed: of what dare and della draw.
        force: replace `output` if it exists.
        dry_run: decide everything and write nothing.

    Raises:
        RefusalError: models of different architectures, a quantised one, or a recipe that would
            mean something else.
        LexigraftError: unusable numbers, or a file is missing or damaged.
    """
    settings = _settings(
        models, base=base, method=method, weights=weights, density=density, t=t, seed=seed
    )
    target = Path(output)
    folders = [local_folder(name) for name in (*settings.models, settings.base)]
    if not dry_run:
        refuse_existing(target, force=force)
    refuse_overwriting(target, folders)
    inputs = Inputs(folders)
    with TemporaryDirectory(prefix="lexigraft-") as scratch:
        opened = {folder: Model.open(folder) for folder in dict.fromkeys(folders)}
        job = _prepare(settings, [opened[folder] for folder in folders], Path(scratch))
        result = BlendResult(
            target,
            settings.method,
            job.growth.rows,
            job.tokens.tokens,
            job.tokens.tokens - job.anchor.tokens.tokens,
            job.left_out,
            job.tied,
            job.blended,
            job.formats,
            job.plan.to_json() if dry_run else None,
        )
        if not dry_run:
            with publish(target, force=force, inputs=inputs) as partial:
                _write(job, partial)
    return result


def _settings(
    models: Sequence[str | Path],
    *,
    base: str | Path | None,
    method: str | None,
    weights: Sequence[float] | None,
    density: Sequence[float] | None,
    t: float | None,
    seed: int,
) -> Settings:
    names = [str(model) for model in models]
    recipes = [name for name in names if name.endswith((".yml", ".yaml"))]
    given = [x for x in (base, method, weights, density, t) if x is not None]
    if recipes:
        if len(names) > 1 or given:
            raise LexigraftError(
                f"the recipe {recipes[0]} together with models or options",
                needed="the recipe alone: it says all of it",
                fix=f"lexigraft blend {recipes[0]} -o OUT",
            )
        return from_recipe(Path(recipes[0]), seed=seed)
    if base is None or method is None:
        raise LexigraftError(
            "no --base or no --method",
            needed="the model that the others were made from, and how to blend",
            fix="lexigraft blend MODEL... --base BASE --method linear -o OUT",
        )
    return from_options(
        names, base=str(base), method=method, weights=weights, density=density, t=t, seed=seed
    )


def _prepare(settings: Settings, models: Sequence[Model], scratch: Path) -> _Job:
    from lexigraft.selection.union import write_union  # imports what `learn` needs

    *others, base = models
    anchor = others[0] if settings.how.kind == "chat-vector" else base
    require_alike(anchor, [model for model in models if model is not anchor])
    _say_other_settings(anchor, models)
    union = write_union(
        anchor.folder, [m.folder for m in models if m.folder != anchor.folder], scratch
    )
    more = union.map.tokens - anchor.tokens.tokens
    if settings.base_tokens_only and more:
        raise RefusalError(
            f"tokenizer source base, and the models have {more:,} tokens more",
            needed="union: rows that were trained are not thrown away",
            fix="set the tokenizer source to union in the recipe",
        )
    vocabulary = anchor.vocabulary
    tied = all(model.vocabulary.tied for model in models)
    growth = Growth.to(
        vocabulary.rows,
        anchor.tokens.tokens,
        union.map.tokens,
        settings.pad_to if union.map.tokens > vocabulary.rows else 1,
    )
    plan, blended = _plan(settings, models, anchor, union.map, growth, tied=tied)
    return _Job(
        settings,
        tuple(others),
        base,
        anchor,
        union.map,
        scratch,
        union.left_out,
        Formats(
            tuple(sorted(path.name for path in scratch.iterdir())),
            f"copied from {union.copied}, whose tokenizer is the union"
            if union.copied
            else f"those that {anchor.folder} has, each extended to the union",
        ),
        growth,
        tied,
        plan,
        blended,
    )


def _say_other_settings(anchor: Model, models: Sequence[Model]) -> None:
    """Notice settings of the body that differ: tensors alone cannot be blended into the same."""
    keys = ("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "rms_norm_eps")
    for model in models:
        config, other = anchor.checkpoint.config, model.checkpoint.config
        apart = [key for key in keys if config.get(key) != other.get(key)]
        if apart:
            note(
                f"config.json of {model.folder} differs from that of {anchor.folder} in "
                f"{', '.join(apart)}: the latter's is taken"
            )


def _plan(
    settings: Settings,
    models: Sequence[Model],
    anchor: Model,
    tokens: TokenMap,
    growth: Growth,
    *,
    tied: bool,
) -> tuple[Plan, int]:
    """Every tensor of the result, and how many of them are blended."""
    checkpoint, vocabulary = anchor.checkpoint, anchor.vocabulary
    place = depths(list(checkpoint.tensors))
    chat_ids = _chat_ids(models[1], tokens) if settings.how.kind == "chat-vector" else frozenset()

    def planned(
        aligned: Aligned, dtype: str, shape: tuple[int, ...], new_padding: int = 0
    ) -> PlannedTensor:
        name, kind = aligned.name, settings.dtype or dtype
        numbers = settings.of(name, place.get(name, 0.0))
        blended = Blended(aligned, settings, numbers, anchor, new_padding, chat_ids)
        made = Compute(data_bytes(kind, shape), partial(_stored, blended, kind, tokens))
        return PlannedTensor(name, kind, shape, (made,))

    body = [
        planned(body_tensor(name, models), tensor.dtype, tensor.shape)
        for name, tensor in anchor.body.items()
        if is_blendable(name, models)
    ]
    stored = [name for name in vocabulary.names if name != vocabulary.head_name]
    heads = [] if tied or not _has_head(models) else [vocabulary.head_name]
    places = places_of(models, tokens, growth.rows - growth.new_padding)
    tables = []
    for name in (*stored, *heads):
        like = checkpoint.tensors.get(name, checkpoint.tensors[vocabulary.embeds[0]])
        aligned = vocabulary_tensor(name, models, places)
        shape = grown_shape(like, growth.rows)
        tables.append(planned(aligned, like.dtype, shape, growth.new_padding))
    plan = with_tables(Plan.of(checkpoint).replace(body), tables, vocabulary, tied=tied)
    return plan, len(body) + len(tables)


def _has_head(models: Sequence[Model]) -> bool:
    return any(model.vocabulary.heads or model.vocabulary.tied for model in models)


def _stored(blended: Blended, dtype: str, tokens: TokenMap) -> Iterator[npt.NDArray[Any]]:
    """The data of one tensor of the result, block by block."""
    for rows in blended.blocks():
        with np.errstate(over="ignore"):  # found here, with its name
            stored = np.ascontiguousarray(rows.astype(numpy_dtype(dtype)))
        if not all_finite(stored, dtype):
            raise LexigraftError(
                _not_finite(blended, tokens)
                or f"{blended.aligned.name} is not finite after the blend",
                needed=f"finite numbers in every model, and a result within {dtype}",
                fix="lexigraft check MODEL --deep for each of the models",
            )
        yield stored


def _not_finite(blended: Blended, tokens: TokenMap) -> str | None:
    """Which model brings a number that is not finite, and in which row; None where none does."""
    aligned, names = blended.aligned, (*blended.settings.models, blended.settings.base)
    for start, stop in aligned.ranges:
        for name, rows in zip(names, aligned.read(start, stop)[0], strict=True):
            bad = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))
            if len(bad):
                row = start + int(bad[0])
                text = None if aligned.places is None else tokens.texts.get(row)
                where = f"row {row}" if text is None else f"the row of {text!r}"
                return f"{aligned.name} is not finite in {where} of {name}"
    return None


def _chat_ids(chat: Model, tokens: TokenMap) -> frozenset[int]:
    """Ids of the special tokens that the chat template writes, or that end an answer."""
    settings = read_settings(chat.folder / "tokenizer_config.json")
    template = str(settings.get("chat_template") or "")
    for path in chat.folder.glob("chat_template.*"):
        template += path.read_text("utf-8", "replace")
    texts = [chat.tokens.texts[i] for i in chat.tokens.special | chat.tokens.added]
    named = {text for text in texts if text in template}
    named |= {token_text(settings.get("eos_token")) or ""}
    return frozenset(tokens.ids[text] for text in named if text in tokens.ids)


def _write(job: _Job, folder: Path) -> None:
    with progress("blending", total=sum(file.bytes for file in job.plan.files)) as advance:
        write_plan(
            job.plan,
            folder,
            threads=WRITERS,
            advance=advance,
            beside=bytes_beside(job.anchor.checkpoint),
        )
    for name in copy_side_files(job.anchor.checkpoint, folder):
        note(f"left out: {name} (it holds weights, or a tokenizer, of the old vocabulary)")
    copy_tokenizer(job.tokenizer, folder)
    _write_config(job, folder)
    if job.settings.how.kind == "chat-vector":
        _take_chat(job, folder)
    _write_manifest(job, folder)
    require_consistent(
        folder, rows=job.growth.rows, tokens=job.tokens, vocabulary=job.anchor.vocabulary
    )


def _write_config(job: _Job, folder: Path) -> None:
    config = job.anchor.checkpoint.config
    comes_apart = is_tied_by_config(config) and not job.tied
    if comes_apart:
        note(
            f"not all models are tied: {job.anchor.vocabulary.head_name} is written, and "
            "tie_word_embeddings becomes false"
        )
    changed = edit_config(
        config,
        job.anchor.vocabulary,
        rows=job.growth.rows,
        tokens=job.growth.tokens,
        tied=False if comes_apart else None,
    )
    if job.settings.dtype is not None:
        for key in ("torch_dtype", "dtype"):
            if key in changed:
                changed[key] = _TYPE_NAMES[job.settings.dtype]
    write_json(folder / "config.json", changed)


def _take_chat(job: _Job, folder: Path) -> None:
    """Template and end tokens of the chat model, its ids by their texts."""
    chat = job.models[1]
    for path in chat.folder.glob("chat_template.*"):
        shutil.copyfile(path, folder / path.name)
    theirs = read_settings(chat.folder / "tokenizer_config.json")
    ours = read_settings(folder / "tokenizer_config.json")
    for key in ("chat_template", "bos_token", "eos_token", "pad_token"):
        if theirs.get(key) is not None:
            ours[key] = theirs[key]
    write_json(folder / "tokenizer_config.json", ours)
    for name in ("config.json", "generation_config.json"):
        if not (chat.folder / name).is_file():
            continue
        content = read_object(folder / name) if (folder / name).is_file() else {}
        for key, value in read_object(chat.folder / name).items():
            if re.fullmatch(r"(bos|eos|pad)_token_id", key) and value is not None:
                content[key] = _moved(value, chat.tokens, job.tokens)
        write_json(folder / name, content)


def _moved(value: Any, old: TokenMap, new: TokenMap) -> Any:
    if isinstance(value, list):
        return [_moved(one, old, new) for one in value]
    return new.ids.get(old.texts.get(value, ""), value)


def _write_manifest(job: _Job, folder: Path) -> None:
    def named(model: Model) -> BaseTokenizer:
        return BaseTokenizer(
            name=recorded_name(model.folder),
            token_map=model.tokens.hash,
            tokens=model.tokens.tokens,
        )

    settings = job.settings
    record = BlendRecord(
        base=named(job.base),
        models=[named(model) for model in job.models],
        method=settings.method,
        settings={
            "shared": dict(settings.shared),
            "own": list(map(dict, settings.own)),
            "dtype": settings.dtype,
            "pad_to": settings.pad_to,
            "seed": settings.seed,
        },
        token_map=job.tokens.hash,
        rows=job.growth.rows,
        tied=job.tied,
        versions=versions(["lexigraft", "numpy"]),
    )
    Manifest(records=[record]).begin(folder)
