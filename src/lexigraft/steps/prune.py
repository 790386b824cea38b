"""`prune`: a model without the tokens that it does not need, and the model it came from again.

Tokens are dropped leaf by leaf (`selection.pruning`), the others are numbered anew in their order.
Rows, tokenizer files, templates, settings and adapters move together; the weights are streamed.
What is removed is kept in the folder `undo`, from which `unprune` makes the base again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lexigraft import families
from lexigraft.adapters.folder import Adapter
from lexigraft.adapters.remapping import Moving, remap_adapter, trained_ids
from lexigraft.checkpoints.architectures import (
    VocabularyTensors,
    recorded_roles,
    vocabulary_of,
)
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.config import (
    edit_config,
    refuse_quantised,
    refuse_ungathered,
)
from lexigraft.checkpoints.fit import require_computable, require_consistent
from lexigraft.checkpoints.gather import Ids, gathered, interleaved
from lexigraft.checkpoints.header import Tensor, read_header
from lexigraft.checkpoints.nested import paths_to, put
from lexigraft.checkpoints.plan import (
    DEFAULT_METADATA,
    Compute,
    Plan,
    PlannedFile,
    PlannedTensor,
)
from lexigraft.checkpoints.rows import in_blocks, runs
from lexigraft.checkpoints.side_files import bytes_beside, copy_side_files
from lexigraft.checkpoints.survey import Survey, require_finite, survey
from lexigraft.checkpoints.token_ids import stated_ids, with_ids
from lexigraft.checkpoints.tying import with_copies
from lexigraft.checkpoints.write import write_plan
from lexigraft.console import note, progress, working
from lexigraft.corpus import sources, text_files
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import Family, TokenMap
from lexigraft.families.tokenmap import (
    TOKENIZER_FILES,
    first_difference,
    joined,
    read_token_maps,
    readable,
)
from lexigraft.files import (
    MANIFEST,
    NEW_TOKENS,
    Inputs,
    publish,
    read_object,
    read_settings,
    refuse_existing,
    refuse_overwriting,
    sha256_file,
    write_json,
)
from lexigraft.hub import local_folder, recorded_name
from lexigraft.manifest import BaseTokenizer, Manifest, PruneRecord, versions
from lexigraft.selection.pruning import (
    Pruning,
    Reading,
    choose,
    count_tokens,
    documents,
    proof_documents,
    prove,
    read_list,
    require_scripts,
    template_ids,
)

UNDO, ROWS, DROPPED = "undo", "rows.safetensors", "dropped_tokens.jsonl"
_IDS = "lexigraft.ids"  # the tensor in ROWS that names the rows beside it
_SETTINGS = ("config.json", "generation_config.json")
_SAVED = (*TOKENIZER_FILES, *_SETTINGS, MANIFEST, NEW_TOKENS)


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did, or with a dry run would do.

    Attributes:
        output: the new model folder.
        tokens_before: tokens of the base.
        tokens_after: tokens that stay.
        rows_before: rows of its vocabulary tensors.
        rows_after: rows of the new ones.
        bytes_saved: of the weights.
        dropped: reason -> how many tokens went.
        kept_back: how many that were asked for stay: others need them, or the corpus uses them.
        domain: the corpus before and after; None without one.
        general: the general text before and after; None without one.
        adapters: folders of the adapters' copies, inside the output.
        plan: with a dry run, every tensor; else empty.
    """

    output: Path
    tokens_before: int
    tokens_after: int
    rows_before: int
    rows_after: int
    bytes_saved: int
    dropped: Mapping[str, int]
    kept_back: int
    domain: Reading | None
    general: Reading | None
    adapters: tuple[str, ...] = ()
    plan: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        result = {
            "output": str(self.output),
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "rows_before": self.rows_before,
            "rows_after": self.rows_after,
            "bytes_saved": self.bytes_saved,
            "dropped": dict(self.dropped),
            "kept_back": self.kept_back,
            "domain": None if self.domain is None else self.domain.to_json(),
            "general": None if self.general is None else self.general.to_json(),
            "adapters": list(self.adapters),
        }
        return {**result, "plan": self.plan} if self.plan else result

    def lines(self) -> list[str]:
        """What a person reads."""
        why = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        back = (
            [f"{self.kept_back:,} tokens that were asked for stay: the corpus or others need them"]
            if self.kept_back
            else []
        )
        return [
            *_changes(self.plan),
            f"{self.tokens_before:,} -> {self.tokens_after:,} tokens ({why})",
            *back,
            *([] if self.domain is None else [self.domain.line("corpus")]),
            *([] if self.general is None else [self.general.line("general")]),
            f"{self.rows_before:,} -> {self.rows_after:,} rows, {self.bytes_saved / 1e6:,.1f} MB "
            + ("would be saved" if self.plan else "saved"),
            *(f"adapter: {self.output / name}" for name in self.adapters),
            f"would be written: {self.output}" if self.plan else f"model: {self.output}",
        ]


@dataclass(frozen=True)
class UndoResult:
    """What `unprune` did, or with a dry run would do.

    Attributes:
        output: the base.
        tokens: of its tokenizer.
        rows: of its vocabulary tensors.
        exact: its old rows are the base's, bit for bit; False where the pruned model was trained,
            None with a dry run, for it is seen in what was written.
        plan: with a dry run, every tensor; else empty.
    """

    output: Path
    tokens: int
    rows: int
    exact: bool | None
    plan: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        result = {
            "output": str(self.output),
            "tokens": self.tokens,
            "rows": self.rows,
            "exact": self.exact,
        }
        return {**result, "plan": self.plan} if self.plan else result

    def lines(self) -> list[str]:
        """What a person reads."""
        size = f"{self.rows:,} rows, {self.tokens:,} tokens"
        if self.plan:
            return [*_changes(self.plan), size, f"would be written: {self.output}"]
        said = (
            "its rows are the base's, bit for bit"
            if self.exact
            else "rows of tokens that were kept are those of the pruned model, trained since"
        )
        return [f"{size}; {said}", f"model: {self.output}"]


@working("pruning")
def prune(
    model: str | Path,
    *,
    output: str | Path,
    corpus: Sequence[str | Path] = (),
    general: Sequence[str | Path] = (),
    keep: int | None = None,
    drop: str | int | None = None,
    min_count: int = 1,
    scripts: Sequence[str] = (),
    listed: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    pad_to: int = 64,
    tensor_roles: Mapping[str, str] | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> PruneResult:
    """Write `model` without tokens that it does not need to the folder `output`.

    Tokens that no text becomes and those whose rows training never moved always go. Texts whose
    tokens all stay are read as before, proved on `corpus` and `general` before anything is
    published. Rows that stay are bit-identical, every other tensor is byte-identical.

    Args:
        model: a model folder with safetensors and its tokenizer.
        output: the folder to write.
        corpus: text whose tokens stay; alone, every token that it never uses goes.
        general: text that is only measured, before and after.
        keep: how many tokens are left at least.
        drop: how many go at most: a number, or a share such as `30%`.
        min_count: tokens that the corpus has fewer of may go too.
        scripts: tokens with letters of other scripts go (`Latin`, `Han` ...).
        listed: a file of tokens that go.
        adapters: adapter folders of this model, whose copies for the result are written into
            `adapters` in the output.
        pad_to: the number of rows is a multiple of this, unless that is more than before.
        tensor_roles: tensor name -> `embed`, `head` or `bias`, where the layout is unknown.
        force: replace an existing output.
        dry_run: return the plan, write nothing.

    Raises:
        LexigraftError: a damaged or contradictory input, an existing output, a number of tokens
            that cannot be reached, nothing to drop.
        RefusalError: weights, tokenizer or adapter of a kind that is not supported.
    """
    folder, target = local_folder(model), Path(output)
    adapter_folders = [Path(one).expanduser() for one in adapters]
    inputs = Inputs([folder, *adapter_folders, *text_files(corpus), *text_files(general)])
    if not dry_run:
        refuse_existing(target, force=force)
        refuse_overwriting(target, [folder, *adapter_folders])
    if pad_to < 1:
        raise LexigraftError(f"--pad-to {pad_to}", needed="1 or more", fix="--pad-to 64")
    checkpoint, vocabulary = _open(folder, tensor_roles)
    family = families.load(folder)
    most = _most(family, keep, drop, corpus)
    require_scripts(scripts, family)
    opened = [Adapter.open(one) for one in adapter_folders]
    _require_names(opened)
    _require_same_ids(opened, family)
    surveys = _surveys(checkpoint, vocabulary, family)
    counts = count_tokens(family, documents(corpus)) if corpus else None
    pruning = choose(
        family,
        protected=_named(checkpoint, family) | {i for one in opened for i in trained_ids(one)},
        counts=counts,
        min_count=min_count,
        untrained=surveys[vocabulary.embeds[0]].untrained.tolist(),
        scripts=scripts,
        listed=_listed(listed, family),
        most=most,
    )
    _require_enough(pruning, family, keep, drop, most)
    job = _Job(
        checkpoint,
        vocabulary,
        family,
        surveys,
        pruning,
        pad_to,
        tensor_roles or recorded_roles(checkpoint),
    )
    settings = {
        "keep": keep,
        "drop": drop,
        "min_count": min_count,
        "scripts": list(scripts),
        "list": None if listed is None else sha256_file(Path(listed)),
        "pad_to": pad_to,
    }
    with TemporaryDirectory(prefix="lexigraft-") as place:
        tokenizer = Path(place)
        family.renumber(job.places, tokenizer)
        # It may be what tells the tokenizer's class.
        shutil.copyfile(folder / "config.json", tokenizer / "config.json")
        pruned = families.load(tokenizer, own=True)
        _require_moved(family, pruned, job.places)
        prove(family, pruned, job.places, proof_documents(family))
        domain, everyday = (
            prove(family, pruned, job.places, documents(specs)) if specs else None
            for specs in (corpus, general)
        )
        names = tuple(f"adapters/{one.folder.resolve().name}" for one in opened)
        result = PruneResult(
            target,
            family.map.tokens,
            pruned.map.tokens,
            vocabulary.rows,
            job.rows,
            job.bytes_saved,
            _by_reason(pruning),
            pruning.kept_back,
            domain,
            everyday,
            names,
            job.plan.to_json() if dry_run else [],
        )
        if not dry_run:
            with publish(target, force=force, inputs=inputs) as partial:
                job.write(partial, tokenizer)
                record = job.record(pruned, settings, _sources(corpus, general))
                Manifest(records=[record]).begin(partial)
                for adapter, name in zip(opened, names, strict=True):
                    (partial / name).mkdir(parents=True)
                    remap_adapter(adapter, job.moving, tokenizer, partial / name)
                require_consistent(
                    partial, rows=job.rows, tokens=pruned.map, vocabulary=job.vocabulary
                )
    return result


def unprune(
    pruned: str | Path, *, output: str | Path, force: bool = False, dry_run: bool = False
) -> UndoResult:
    """Write the model that `pruned` was made from to the folder `output`.

    Tensors are the base's bit for bit, tokenizer files and settings byte for byte. Where the
    pruned model was changed since, rows of kept tokens and other tensors are as they are now.

    Args:
        pruned: a folder that `prune` wrote, with its undo map.
        output: the folder to write.
        force: replace an existing output.
        dry_run: return the plan, write nothing.

    Raises:
        LexigraftError: the folder holds no undo map, or one of another model.
    """
    folder, target = local_folder(pruned), Path(output)
    if not dry_run:
        refuse_existing(target, force=force)
        refuse_overwriting(target, [folder])
    inputs = Inputs([folder, folder / UNDO])
    undo, record = folder / UNDO, _undo_record(folder)
    checkpoint = Checkpoint.open(folder)
    vocabulary = with_copies(checkpoint, vocabulary_of(checkpoint))
    saved = {tensor.name: tensor for tensor in read_header(undo / ROWS).tensors}
    ids = np.concatenate([block for _, block in in_blocks(saved[_IDS])]).astype(np.int64)
    kept = np.setdiff1d(np.arange(record.rows_before), ids, assume_unique=True)
    if (vocabulary.rows, {*vocabulary.names}) != (record.rows, saved.keys() - {_IDS}):
        raise _no_undo(folder, "its vocabulary tensors are not those that prune wrote")
    planned = [
        interleaved(tensor, kept, saved[name], ids, like=tensor)
        for name in vocabulary.names
        for tensor in [checkpoint.tensors[name]]
    ]
    plan = Plan.of(checkpoint).replace(planned)
    if dry_run:
        return UndoResult(target, record.base.tokens, record.rows_before, None, plan.to_json())
    with publish(target, force=force, inputs=inputs) as partial:
        with progress("writing weights", sum(file.bytes for file in plan.files)) as advance:
            write_plan(plan, partial, advance=advance, beside=bytes_beside(checkpoint))
        copy_side_files(checkpoint, partial)
        for name in _SETTINGS:
            (partial / name).unlink(missing_ok=True)
        for path in undo.iterdir():
            if path.name not in (ROWS, DROPPED):
                shutil.copyfile(path, partial / path.name)
        tokens = TokenMap.read(partial)
        if tokens.hash != record.base.token_map:
            raise _no_undo(folder, "its tokenizer files are not those of the base")
        written = Checkpoint.open(partial).tensors
        exact = all(
            survey(written[name], record.base.tokens).sha256 == sha256
            for name, sha256 in record.base_rows.items()
        )
    return UndoResult(target, tokens.tokens, record.rows_before, exact)


@dataclass(frozen=True)
class _Job:
    """Everything that is decided before the first byte is written."""

    checkpoint: Checkpoint
    vocabulary: VocabularyTensors
    family: Family
    surveys: Mapping[str, Survey]
    pruning: Pruning
    pad_to: int
    roles: Mapping[str, str] | None

    @cached_property
    def places(self) -> dict[int, int]:
        """Old id -> new id."""
        kept = (i for i in sorted(self.family.map.texts) if i not in self.pruning.dropped)
        return {old: new for new, old in enumerate(kept)}

    @property
    def rows(self) -> int:
        """Rows of the result."""
        wanted = -(-len(self.places) // self.pad_to) * self.pad_to
        return min(self.vocabulary.rows, wanted)

    @cached_property
    def sources(self) -> Ids:
        """The base's rows that stay, ascending: those of tokens, then of padding it had."""
        room = self.rows - len(self.places)
        padding = range(self.family.map.tokens, self.vocabulary.rows)[:room]
        return np.array([*self.places, *padding], np.int64)

    @property
    def moving(self) -> Moving:
        """What adapters have to follow."""
        padding = self.rows - len(self.sources)
        return Moving(self.checkpoint, self.vocabulary, self.places, self.sources, padding)

    @cached_property
    def plan(self) -> Plan:
        """The checkpoint of the result."""
        padding = self.rows - len(self.sources)

        def planned(name: str, known: Survey) -> PlannedTensor:
            tensor = self.checkpoint.tensors[name]
            return gathered(tensor, self.sources, padding, lambda: known.mean)

        return Plan.of(self.checkpoint).replace(
            planned(name, known) for name, known in self.surveys.items()
        )

    @property
    def bytes_saved(self) -> int:
        """Bytes of tensors."""
        before = sum(tensor.bytes for tensor in self.checkpoint.tensors.values())
        return before - sum(tensor.bytes for tensor in self.plan.tensors.values())

    def write(self, partial: Path, tokenizer: Path) -> None:
        """Write everything but the manifest."""
        with progress("writing weights", sum(file.bytes for file in self.plan.files)) as advance:
            write_plan(
                self.plan,
                partial,
                advance=advance,
                beside=bytes_beside(self.checkpoint) + self._undo_rows.bytes,
            )
        for name in copy_side_files(self.checkpoint, partial):
            note(f"left out: {name} (it holds weights, or a tokenizer, of the old vocabulary)")
        families.copy_tokenizer(tokenizer, partial)
        config = edit_config(self.checkpoint.config, self.vocabulary, rows=self.rows)
        for path in paths_to(config, ("unpadded_vocab_size",)):
            put(config, path, len(self.places))
        write_json(partial / "config.json", with_ids(config, self.places.__getitem__))
        generation = partial / "generation_config.json"
        if generation.is_file():
            content = with_ids(read_object(generation), self.places.__getitem__)
            write_json(generation, content)
        self._write_undo(partial / UNDO)

    @property
    def _undo_rows(self) -> PlannedFile:
        """The rows that are taken out, and their ids."""
        gone = np.setdiff1d(np.arange(self.vocabulary.rows), self.sources, assume_unique=True)
        ids = Compute(8 * len(gone), lambda: iter([gone]))
        tensors = [
            PlannedTensor(_IDS, "I64", (len(gone),), (ids,)),
            *(gathered(self.checkpoint.tensors[name], gone) for name in self.vocabulary.names),
        ]
        return PlannedFile(ROWS, tuple(tensors), DEFAULT_METADATA)

    def _write_undo(self, undo: Path) -> None:
        undo.mkdir()
        folder = self.checkpoint.folder
        for path in (*(folder / name for name in _SAVED), *folder.glob("*.tiktoken")):
            if path.is_file():
                shutil.copyfile(path, undo / path.name)
        write_plan(Plan((self._undo_rows,), None, {}), undo)
        lines = (
            json.dumps(
                {
                    "id": token_id,
                    "token": self.family.map.texts[token_id],
                    "text": readable(self.family.token_bytes(token_id)),
                    "why": why,
                },
                ensure_ascii=False,
            )
            for token_id, why in sorted(self.pruning.dropped.items())
        )
        (undo / DROPPED).write_text("".join(f"{line}\n" for line in lines), "utf-8")

    def record(self, pruned: Family, settings: dict[str, Any], read: dict[str, Any]) -> PruneRecord:
        """What the manifest says of it."""
        tokens = self.family.map.tokens
        removed = [i for i in range(tokens) if i not in self.places]
        return PruneRecord(
            base=BaseTokenizer(
                name=recorded_name(self.checkpoint.folder),
                token_map=self.family.map.hash,
                tokens=tokens,
            ),
            rows_before=self.vocabulary.rows,
            tied=self.vocabulary.tied,
            base_rows={name: known.sha256 for name, known in self.surveys.items()},
            removed=" ".join(
                f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
                for start, stop in runs(removed)
            ),
            token_map=pruned.map.hash,
            content=pruned.content_hash,
            tokens=pruned.map.tokens,
            rows=self.rows,
            settings=settings,
            sources=read,
            versions=versions(["lexigraft", "numpy"]),
            roles=dict(self.roles) if self.roles else None,
        )


def _open(folder: Path, roles: Mapping[str, str] | None) -> tuple[Checkpoint, VocabularyTensors]:
    checkpoint = Checkpoint.open(folder)
    refuse_quantised(checkpoint)
    refuse_ungathered(checkpoint)
    vocabulary = with_copies(checkpoint, vocabulary_of(checkpoint, roles))
    require_computable(checkpoint, vocabulary)
    return checkpoint, vocabulary


def _most(
    family: Family,
    keep: int | None,
    drop: str | int | None,
    corpus: Sequence[str | Path],
) -> int | None:
    """How many tokens may go; None for any number."""
    if keep is None and drop is None:
        return None
    if keep is not None and drop is not None:
        raise LexigraftError(
            "--keep together with --drop", needed="one of them", fix="leave one of them out"
        )
    if not corpus:
        raise LexigraftError(
            f"--{'drop' if keep is None else 'keep'} without --corpus",
            needed="text by which tokens are counted: the rarest go first",
            fix="add --corpus F, or name what goes with --scripts or --list",
        )
    tokens = len(family.map.texts)
    if keep is not None:
        wanted = tokens - keep
    else:
        text = str(drop)
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = -1.0
        wanted = int(tokens * number / 100) if text.endswith("%") else int(number)
    if not 0 < wanted < tokens:
        given = f"--keep {keep}" if keep is not None else f"--drop {drop}"
        raise LexigraftError(
            f"{given}, of {tokens:,} tokens",
            needed="a number of tokens between them, or a share such as 30%",
            fix="--drop 30%",
        )
    return wanted


def _require_names(adapters: Sequence[Adapter]) -> None:
    names = [one.folder.resolve().name for one in adapters]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LexigraftError(
            f"two --adapter folders are called {twice}",
            needed="different names: their copies lie beside each other",
            fix="rename one of them",
        )


def _require_same_ids(adapters: Sequence[Adapter], family: Family) -> None:
    for adapter in adapters:
        own = joined(read_token_maps(adapter.folder))
        moved = None if own is None else first_difference(own, family.map)
        if own is not None and moved is not None:
            raise LexigraftError(
                f"id {moved} is {own.texts[moved]!r} in {adapter.folder} but "
                f"{family.map.texts.get(moved)!r} in {family.folder}",
                needed="adapters that were trained on this model: rows belong to ids",
                fix="name the model that this adapter was trained on, or leave it out",
            )


def _surveys(
    checkpoint: Checkpoint, vocabulary: VocabularyTensors, family: Family
) -> dict[str, Survey]:
    tokens = family.map.tokens
    if tokens > vocabulary.rows:
        raise LexigraftError(
            f"{checkpoint.folder}: {vocabulary.rows:,} rows for {tokens:,} tokens",
            needed="a row for every token",
            fix=f"lexigraft check {checkpoint.folder}",
        )
    found = {}
    for name in vocabulary.names:
        tensor: Tensor = checkpoint.tensors[name]
        found[name] = survey(tensor, tokens)
        require_finite(tensor, found[name])
    return found


def _named(checkpoint: Checkpoint, family: Family) -> frozenset[int]:
    """Ids that a config, or the chat template's own text, names."""
    named: frozenset[int] = frozenset()
    for name in _SETTINGS:
        for token_id in stated_ids(read_settings(checkpoint.folder / name)):
            if token_id not in family.map.texts:
                raise RefusalError(
                    f"{checkpoint.folder / name} names token id {token_id}, which the tokenizer "
                    "does not have: which row it will be cannot be known",
                    needed="ids of tokens",
                    fix=f"set it to an id below {family.map.tokens:,}, or add the token to the "
                    "tokenizer",
                )
            named |= {token_id}
    return named | template_ids(family) | frozenset(family.start_ids())


def _listed(path: str | Path | None, family: Family) -> frozenset[int]:
    if path is None:
        return frozenset()
    found, lost = read_list(Path(path), family)
    if lost:
        note(f"--list: {len(lost):,} lines are no token, such as {lost[0]!r}")
    return found


def _require_enough(
    pruning: Pruning, family: Family, keep: int | None, drop: str | int | None, most: int | None
) -> None:
    gone = len(pruning.dropped)
    if not gone:
        raise LexigraftError(
            f"nothing to drop from {family.folder}: every token that was asked for is used, part "
            "of one that is, or one that the tokenizer or a template needs",
            needed="tokens that may go",
            fix="name them: --corpus F (all that it never uses), --scripts Latin,Han or --list F",
        )
    if most is not None and gone < most:
        left = len(family.map.texts) - gone
        raise LexigraftError(
            (f"--keep {keep:,}" if keep is not None else f"--drop {drop}")
            + f": only {gone:,} tokens can go, {left:,} stay; the others are used by the corpus, "
            "part of one that is, or single characters and special tokens",
            needed=f"at most {gone:,} tokens to drop",
            fix=f"--keep {left}, or --min-count N to give up what the corpus uses less often",
        )


def _require_moved(family: Family, pruned: Family, places: Mapping[int, int]) -> None:
    """Law 1 with the exception of `prune`: each token that stays has its new id, and no other."""
    expected = {new: family.map.texts[old] for old, new in places.items()}
    if dict(pruned.map.texts) != expected:
        wrong = next(
            i
            for i in sorted(expected.keys() | pruned.map.texts.keys())
            if expected.get(i) != pruned.map.texts.get(i)
        )
        raise LexigraftError(
            f"id {wrong} of the pruned tokenizer is {pruned.map.texts.get(wrong)!r}, not "
            f"{expected.get(wrong)!r}; nothing was written",
            needed="every token that stays under its new id",
            fix="report this base tokenizer as a bug of lexigraft",
        )


def _changes(plan: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each tensor whose shape changes."""
    return [
        f"{entry['tensor']}: {entry['old_shape']} -> {entry['shape']}"
        for entry in plan
        if entry["old_shape"] != entry["shape"]
    ]


def _by_reason(pruning: Pruning) -> dict[str, int]:
    reasons = list(pruning.dropped.values())
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


def _sources(corpus: Sequence[str | Path], general: Sequence[str | Path]) -> dict[str, Any]:
    given = {"corpus": corpus, "general": general}
    return {name: sources(specs) for name, specs in given.items() if specs}


def _undo_record(folder: Path) -> PruneRecord:
    if not (folder / UNDO / ROWS).is_file():
        raise LexigraftError(
            f"{folder} holds no {UNDO}/{ROWS}",
            needed="a folder that `prune` wrote; later steps leave its undo map behind",
            fix=f"copy the folder {UNDO} of the pruned model into it, or use that model",
        )
    manifest = Manifest.read(folder)
    record = manifest.last("prune") if manifest else None
    if not isinstance(record, PruneRecord):
        raise _no_undo(folder, f"{MANIFEST} has no record of prune")
    if TokenMap.read(folder).hash != record.token_map:
        raise _no_undo(folder, "its tokenizer is not the one that prune wrote")
    return record


def _no_undo(folder: Path, why: str) -> LexigraftError:
    return LexigraftError(
        f"{folder} cannot be undone: {why}",
        needed="the model as prune wrote it, or trained with the same tokens and rows",
        fix="use the pruned model itself",
    )
