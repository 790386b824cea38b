"""`align`: several models on one vocabulary, row by row the same tokens, for any other merge tool.

The ids are the first model's; what the others have beyond them comes behind, as in `blend`. The
body of each model is copied as bytes, and so is every row that it has; a row that it lacks is the
plain mean of the rows of the models that have it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.adapters.planning import with_tables
from lexigraft.blending.inputs import (
    Aligned,
    Model,
    places_of,
    require_alike,
    vocabulary_tensor,
)
from lexigraft.checkpoints.architectures import is_tied_by_config
from lexigraft.checkpoints.config import edit_config
from lexigraft.checkpoints.fit import require_consistent
from lexigraft.checkpoints.growth import ROW_STEP, Growth
from lexigraft.checkpoints.header import data_bytes, numpy_dtype
from lexigraft.checkpoints.plan import Compute, Plan, PlannedTensor
from lexigraft.checkpoints.rows import grown_shape
from lexigraft.checkpoints.side_files import bytes_beside, copy_side_files
from lexigraft.checkpoints.survey import survey
from lexigraft.checkpoints.token_ids import with_ids
from lexigraft.checkpoints.write import write_plan
from lexigraft.console import note, progress, working
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import copy_tokenizer
from lexigraft.families.tokenmap import TokenMap, aligned
from lexigraft.files import (
    Inputs,
    is_there,
    publish,
    read_object,
    read_settings,
    refuse_existing,
    refuse_overwriting,
    write_json,
)
from lexigraft.hub import local_folder, recorded_name
from lexigraft.manifest import AlignRecord, BaseTokenizer, Manifest, versions

WRITERS = 2


@dataclass(frozen=True)
class AlignResult:
    """What `align` wrote.

    Attributes:
        output: the folder of all.
        models: a folder per model.
        rows: of the vocabulary tensors of each.
        tokens: max id + 1 of the one tokenizer.
        added: per model, how many of its tokens it lacked before.
        left_out: tokens that the first model's merges leave no way to.
        tied: the heads are the input embeddings.
        plan: with `dry_run`, per model every tensor with its old and new shape and bytes.
    """

    output: Path
    models: tuple[Path, ...]
    rows: int
    tokens: int
    added: tuple[int, ...]
    left_out: tuple[str, ...]
    tied: bool
    plan: dict[str, list[dict[str, Any]]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        found = {
            "output": str(self.output),
            "models": [str(model) for model in self.models],
            "rows": self.rows,
            "tokens": self.tokens,
            "added": list(self.added),
            "left_out": list(self.left_out),
            "tied": self.tied,
        }
        return found if self.plan is None else {**found, "plan": self.plan}

    def lines(self) -> list[str]:
        """What a person reads."""
        plan = [
            f"{name}: {entry['tensor']}: {entry['old_shape']} -> {entry['shape']}"
            for name, entries in (self.plan or {}).items()
            for entry in entries
        ]
        from lexigraft.selection.union import left_out_lines

        lost = left_out_lines(self.left_out, "the first model")
        done = "would write" if self.plan is not None else "wrote"
        tie = "tied" if self.tied else "with a head of its own"
        return [
            *plan,
            *lost,
            *(
                f"{done} {model}: {self.rows:,} rows for {self.tokens:,} tokens ({added:,} of them "
                f"it lacked), {tie}"
                for model, added in zip(self.models, self.added, strict=True)
            ),
        ]


@dataclass(frozen=True)
class _Job:
    """An alignment that has been thought through and not yet begun."""

    models: tuple[Model, ...]
    names: tuple[str, ...]
    tokens: TokenMap
    tokenizer: Path
    left_out: tuple[str, ...]
    rows: int
    tied: bool
    plans: tuple[Plan, ...]


@working("aligning")
def align(
    models: Sequence[str | Path],
    *,
    output: str | Path,
    force: bool = False,
    dry_run: bool = False,
) -> AlignResult:
    """Write models of one architecture with one tokenizer and one order of rows.

    Args:
        models: two folders (or hub ids) or more; the ids of the first are kept.
        output: the folder to write a folder per model into, each under its own name.
        force: replace `output` if it exists.
        dry_run: decide everything and write nothing.

    Raises:
        RefusalError: models of different architectures, a quantised one, or a kind of tokenizer
            that cannot be extended.
        LexigraftError: fewer than two models, two of one name, or a file is missing or damaged.
    """
    target = Path(output)
    names, folders = _names(models), [local_folder(model) for model in models]
    if not dry_run:
        refuse_existing(target, force=force)
    refuse_overwriting(target, folders)
    inputs = Inputs(folders)
    with TemporaryDirectory(prefix="lexigraft-") as place:
        job = _prepare([Model.open(folder) for folder in folders], names, Path(place))
        if not dry_run:
            with publish(target, force=force, inputs=inputs) as partial_folder:
                for number, name in enumerate(names):
                    (partial_folder / name).mkdir()
                    _write(job, number, partial_folder / name)
        return AlignResult(
            target,
            tuple(target / name for name in names),
            job.rows,
            job.tokens.tokens,
            tuple(len(job.tokens.texts) - len(_same(job, model)) for model in job.models),
            job.left_out,
            job.tied,
            {n: plan.to_json() for n, plan in zip(names, job.plans, strict=True)}
            if dry_run
            else None,
        )


def _names(models: Sequence[str | Path]) -> tuple[str, ...]:
    """What each model is called in the output: its folder's name, or its name on the hub."""
    names = tuple(
        Path(model).resolve().name
        if is_there(Path(model))
        else str(model).partition("@")[0].rpartition("/")[2]
        for model in models
    )
    if len(names) < 2 or len(set(names)) < len(names):
        raise LexigraftError(
            f"the models are called {', '.join(names) or 'nothing'}",
            needed="two models or more, each with a name of its own: OUT has a folder for each",
            fix="lexigraft align ONE OTHER -o OUT",
        )
    return names


def _prepare(models: Sequence[Model], names: tuple[str, ...], scratch: Path) -> _Job:
    from lexigraft.selection.union import write_union  # imports what `learn` needs

    first = models[0]
    require_alike(first, models[1:])
    union = write_union(first.folder, [model.folder for model in models[1:]], scratch)
    tokens, most = union.map, max(model.vocabulary.rows for model in models)
    step = ROW_STEP if tokens.tokens > most else 1
    rows = Growth.to(most, first.tokens.tokens, tokens.tokens, step).rows
    tied = all(model.vocabulary.tied for model in models)
    places = places_of(models, tokens, rows)
    used = np.isin(np.arange(rows), list(tokens.texts))
    plans = tuple(_plan(models, n, places, used, tied=tied) for n in range(len(models)))
    return _Job(tuple(models), names, tokens, scratch, union.left_out, rows, tied, plans)


def _plan(
    models: Sequence[Model],
    number: int,
    places: tuple[npt.NDArray[np.int64], ...],
    used: npt.NDArray[np.bool_],
    *,
    tied: bool,
) -> Plan:
    """Every tensor of one model under the new ids, of which `used` have a token."""
    model, rows = models[number], len(used)
    vocabulary, checkpoint = model.vocabulary, model.checkpoint
    untied = vocabulary.tied and not tied
    same = rows == vocabulary.rows and np.array_equal(places[number], np.arange(rows))
    if same and not untied:
        return Plan.of(checkpoint)
    heads = (vocabulary.head_name,) if untied else ()
    tables = []
    for name in (*vocabulary.names, *heads):
        like = checkpoint.tensors[name if name in checkpoint.tensors else vocabulary.embeds[0]]
        shape = grown_shape(like, rows)
        tensor = vocabulary_tensor(name, models, places)
        blocks = partial(_blocks, tensor, model, number, used, like.dtype)
        made = Compute(data_bytes(like.dtype, shape), blocks)
        tables.append(PlannedTensor(name, like.dtype, shape, (made,)))
    return with_tables(Plan.of(checkpoint), tables, vocabulary, tied=tied)


def _blocks(
    tensor: Aligned, model: Model, number: int, used: npt.NDArray[np.bool_], dtype: str
) -> Iterator[npt.NDArray[Any]]:
    """The rows of one model: its own; of tokens that it lacks the mean of those that have them.

    New padding rows are the mean of its own used ones (law 9). Values pass through float64, which
    holds every stored type, so that its own rows stay bit for bit.
    """
    mean: npt.NDArray[Any] | None = None
    for start, stop in tensor.ranges:
        values, has = tensor.read(start, stop)  # 0 where a model has no row
        counts = _column(np.sum(has, axis=0), values[0])
        rows = np.sum(values, axis=0) / np.maximum(counts, 1)
        padding = ~used[start:stop] & ~has[number]
        if padding.any():
            if mean is None:
                mean = survey(model.table(tensor.name), model.tokens.tokens).mean
            rows[padding] = mean
        rows[has[number]] = values[number][has[number]]
        yield np.ascontiguousarray(rows.astype(numpy_dtype(dtype)))


def _column(per_row: npt.NDArray[Any], rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """One number a row, shaped to go with `rows`."""
    return per_row.reshape(-1, *(1 for _ in rows.shape[1:]))


def _same(job: _Job, model: Model) -> dict[int, int]:
    """Id of the result -> the model's own id of the same token."""
    return aligned(job.tokens, model.tokens)


def _write(job: _Job, number: int, folder: Path) -> None:
    model, plan = job.models[number], job.plans[number]
    with progress(f"aligning {job.names[number]}", sum(f.bytes for f in plan.files)) as advance:
        write_plan(
            plan,
            folder,
            threads=WRITERS,
            advance=advance,
            beside=bytes_beside(model.checkpoint),
        )
    for name in copy_side_files(model.checkpoint, folder):
        note(f"left out: {name} (it holds weights, or a tokenizer, of the old vocabulary)")
    copy_tokenizer(job.tokenizer, folder)
    _keep_settings(model, folder)
    _write_configs(job, model, folder)
    record = AlignRecord(
        models=[
            BaseTokenizer(
                name=recorded_name(one.folder), token_map=one.tokens.hash, tokens=one.tokens.tokens
            )
            for one in job.models
        ],
        place=number,
        token_map=job.tokens.hash,
        rows=job.rows,
        tied=job.tied,
        versions=versions(["lexigraft", "numpy"]),
    )
    Manifest(records=[record]).begin(folder)
    require_consistent(folder, rows=job.rows, tokens=job.tokens, vocabulary=model.vocabulary)


def _keep_settings(model: Model, folder: Path) -> None:
    """The chat template of the model, and its begin, end and padding tokens, by their texts."""
    for path in folder.glob("chat_template.*"):
        path.unlink()
    for path in model.folder.glob("chat_template.*"):
        shutil.copyfile(path, folder / path.name)
    own = read_settings(model.folder / "tokenizer_config.json")
    settings = read_settings(folder / "tokenizer_config.json")
    for key in ("chat_template", "bos_token", "eos_token", "pad_token"):
        settings.pop(key, None)
        if own.get(key) is not None:
            settings[key] = own[key]
    write_json(folder / "tokenizer_config.json", settings)


def _write_configs(job: _Job, model: Model, folder: Path) -> None:
    there = {own: token_id for token_id, own in _same(job, model).items()}

    def moved(token_id: int) -> int:
        if token_id in there:
            return there[token_id]
        if token_id in model.tokens.texts:
            raise RefusalError(
                f"a config of {model.folder} names {model.tokens.texts[token_id]!r}, which the "
                "union leaves out",
                needed="every token that a config names",
                fix="name another model first, whose ids are kept",
            )
        return token_id  # of no token

    comes_apart = is_tied_by_config(model.checkpoint.config) and not job.tied
    config = edit_config(
        model.checkpoint.config,
        model.vocabulary,
        rows=job.rows,
        tokens=job.tokens.tokens,
        tied=False if comes_apart else None,
    )
    write_json(folder / "config.json", with_ids(config, moved))
    if (model.folder / "generation_config.json").is_file():
        generation = read_object(model.folder / "generation_config.json")
        write_json(folder / "generation_config.json", with_ids(generation, moved))
