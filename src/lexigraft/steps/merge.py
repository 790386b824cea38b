"""`merge`: stream an adapter into the weights of its base, growing the base where it has to.

The base may be the grafted model that was trained, or the model as it was before the graft: how
many rows there are and what they hold is read from the adapter's own folder, and a row that
nobody holds is a fault. Tensors that do not change are copied as bytes; changed ones are made in
blocks, so that memory stays constant whatever the model's size.

Several adapters are a stack: each was trained on the result of those before it, and its
vocabulary may be larger than theirs. What lies between two of them is a whole model, on the disk
of the output. With weights they stand side by side instead: each was trained on the base.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lexigraft.adapters.classifier import count_of, without_head
from lexigraft.adapters.expand import expand, expand_moved
from lexigraft.adapters.folder import WEIGHTS, Adapter
from lexigraft.adapters.match import match
from lexigraft.adapters.merging import Job, body_of, prepare, say_if_other_base
from lexigraft.adapters.merging import write as write_model
from lexigraft.adapters.misfits import Misfits
from lexigraft.adapters.rounding import Rounding
from lexigraft.adapters.tokens import TokenizerChoice, require_recorded
from lexigraft.adapters.weighted import Weighted, weighted_plan
from lexigraft.checkpoints.fit import open_whole
from lexigraft.checkpoints.growth import ROW_STEP, Growth
from lexigraft.checkpoints.rows import by_row
from lexigraft.console import note, working
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import (
    TokenMap,
    aligned,
    first_difference,
    joined,
    read_token_maps,
)
from lexigraft.files import (
    Inputs,
    publish,
    refuse_existing,
    refuse_overwriting,
    scratch,
    sha256_file,
)
from lexigraft.hub import local_folder
from lexigraft.manifest import MANIFEST, ExtractRecord, Manifest, MergeRecord, versions


@dataclass(frozen=True)
class MergeResult:
    """What `merge` wrote.

    Attributes:
        output: the merged model.
        rows: rows of its vocabulary tensors.
        tokens: max id + 1 of its tokenizer.
        tied: its head is its input embedding.
        tensors: how many tensors an adapter changed; of several, the one that changed most.
        adapters: the adapter folders.
        sources: a line per vocabulary tensor: where each of its rows comes from.
        plan: with `dry_run`, every tensor with its old and new shape and bytes.
        rounding: the largest error of storing a sum in the type of the base; None where no sum
            was in a wider one, and with `dry_run`.
        difference: with `prove`, the largest difference of a logit to the unmerged model's.
        limit: what of it rounding to the stored type explains; more is a fault.
    """

    output: Path
    rows: int
    tokens: int
    tied: bool
    tensors: int
    adapters: tuple[Path, ...]
    sources: tuple[str, ...]
    plan: list[dict[str, Any]] | None = None
    rounding: float | None = None
    difference: float | None = None
    limit: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        found: dict[str, Any] = {
            "output": str(self.output),
            "rows": self.rows,
            "tokens": self.tokens,
            "tied": self.tied,
            "tensors": self.tensors,
            "adapters": [str(adapter) for adapter in self.adapters],
            "sources": list(self.sources),
        }
        if self.plan is not None:
            found["plan"] = self.plan
        if self.rounding is not None:
            found["max_rounding_error"] = self.rounding
        if self.difference is not None:
            found["max_logit_difference"] = self.difference
        return found

    def lines(self) -> list[str]:
        """What a person reads."""
        plan = [
            f"{entry['tensor']}: {entry['old_shape']} -> {entry['shape']}, "
            f"{entry['bytes_copied']:,} of {entry['bytes_written']:,} bytes copied"
            for entry in self.plan or ()
        ]
        tie = "tied" if self.tied else "with a head of its own"
        done = "would write" if self.plan is not None else "wrote"
        rounded = (
            [f"largest error of rounding to the base's type: {self.rounding:.1e}"]
            if self.rounding is not None
            else []
        )
        proof = (
            [
                f"largest difference of a logit to base + adapter, unmerged: {self.difference:.1e} "
                f"(rounding explains {self.limit:.1e})"
            ]
            if self.difference is not None
            else []
        )
        return [
            *plan,
            *self.sources,
            *rounded,
            *proof,
            f"{done} {self.output}: {self.rows:,} rows for {self.tokens:,} tokens, {tie}; "
            f"{self.tensors} tensors changed",
        ]


@working("preparing the merge")
def merge(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    tokenizer: str | Path | None = None,
    weights: Sequence[float] | None = None,
    remap: bool = False,
    body_only: bool = False,
    trim: bool = False,
    max_shard_size: str | int | None = None,
    prove: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> MergeResult:
    """Put PEFT adapters into the weights of their base, one after another or side by side.

    Args:
        base: the model that was trained, or the model as it was before it was grafted.
        adapters: the adapter folders, in the order in which they were trained.
        output: the folder to write.
        tokenizer: the tokenizer that the (last) adapter was trained with, where its folder has
            none.
        weights: one per adapter: all were trained on the base and are added to it together, rows
            aligned by token text; `adapters.weighted` has the rule.
        remap: accept adapters whose tokenizer has other ids than the base's, and move their rows
            by token text.
        body_only: leave out what the adapters hold of the vocabulary: rows and tokenizer of the
            result are the base's.
        trim: write as few rows as the adapter was trained with, where these are fewer than the
            base's: its padding rows beyond them are left out.
        max_shard_size: cut the weights into files of at most so many bytes (`5GB`); by default
            files stay as they are.
        prove: read the weights back, and compare the logits of the result with those of base +
            adapter, unmerged; after each adapter.
        force: replace `output` if it exists.
        dry_run: decide everything and write nothing.

    Raises:
        RefusalError: a kind of adapter or base that is not supported.
        LexigraftError: base, adapter and tokenizer do not fit together, a row has no source, or
            a file is missing or damaged.
    """
    together = weights is not None or remap
    *before, folder = _folders(adapters, dry_run=dry_run and not together)
    _refuse_combinations(
        prove=prove,
        together=together,
        body_only=body_only,
        moved=remap or tokenizer is not None,
        trim=trim,
        several=bool(before),
    )
    source, target = local_folder(base), Path(output)
    given = None if tokenizer is None else local_folder(tokenizer)
    if not dry_run:
        refuse_existing(target, force=force)
    refuse_overwriting(target, (source, *before, folder))
    inputs = Inputs((source, *before, folder, *([] if given is None else [given])))
    _require_order(source, (*before, folder), side_by_side=together)
    with ExitStack() as stack:
        stages: list[MergeResult] = []
        if together:
            union = Path(stack.enter_context(TemporaryDirectory(prefix="lexigraft-")))
            shares = _weights(weights, [*before, folder])
            job = _prepare_together(
                source, [*before, folder], shares, given, union, remap=remap, body_only=body_only
            )
        else:
            so_far, stages = stack.enter_context(
                _merged_so_far(source, before, target, prove=prove, body_only=body_only)
            )
            job = prepare(so_far, folder, given, body_only=body_only, trim=trim)
        if max_shard_size is not None:
            job = replace(job, plan=job.plan.recut(max_shard_size))
        refuse_overwriting(target, (job.tokenizer.folder,))
        if dry_run:
            return _result(job, target, plan=job.plan.to_json(), rounding=None)
        with publish(target, force=force, inputs=inputs) as partial_folder:
            _write(job, partial_folder, replay=prove)
            proof = _prove(job, partial_folder) if prove else {}
        return _of_all([*stages, _result(job, target, **proof)])


def _refuse_combinations(
    *, prove: bool, together: bool, body_only: bool, moved: bool, trim: bool, several: bool
) -> None:
    if trim and (together or body_only or several):
        raise RefusalError(
            "--trim with --weights, --remap, --body-only or several adapters",
            needed="one adapter, whose rows are those of the result",
            fix="leave --trim out: more padding rows do no harm",
        )
    if body_only and moved:
        raise RefusalError(
            "--body-only with --remap or --tokenizer",
            needed="one of them: --body-only leaves every row and the tokenizer as the base's",
            fix="leave one out: --remap moves the adapter's rows, --body-only drops them",
        )
    if prove and (together or body_only):
        raise RefusalError(
            "--prove with --weights, --remap or --body-only",
            needed="one adapter by its own ids: PEFT cannot run the unmerged model of these",
            fix="leave --prove out; lexigraft check MERGED --base BASE --deep reads the result",
        )


def _weights(given: Sequence[float] | None, adapters: Sequence[Path]) -> tuple[float, ...]:
    weights = (1.0,) * len(adapters) if given is None else tuple(map(float, given))
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise LexigraftError(
            f"--weights {','.join(f'{weight:g}' for weight in weights)} for "
            f"{len(adapters)} adapters",
            needed="a finite number for each adapter",
            fix="--weights " + ",".join(["0.5"] * len(adapters)),
        )
    return weights


def _folders(adapters: str | Path | Sequence[str | Path], *, dry_run: bool) -> list[Path]:
    names = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if not names or (dry_run and len(names) > 1):
        raise RefusalError(
            f"{len(names)} adapters" + (" and a dry run" if names else ""),
            needed="an adapter; for a dry run no more than one: it writes nothing to go on from",
            fix="name the adapter folders in the order in which they were trained",
        )
    return [local_folder(Path(name)) for name in names]


def _require_order(base: Path, adapters: Sequence[Path], *, side_by_side: bool) -> None:
    """What each adapter was trained on top of, by its manifest, is in its base.

    Raises:
        LexigraftError: an adapter is missing, or comes after one that was trained on it.
    """
    manifest = Manifest.read(base)
    for place, folder in enumerate(adapters):
        own = Manifest.read(folder)
        lacking = _merged_into(_since_extracted(own)) - _merged_into(manifest)
        if lacking and not side_by_side:
            lacking -= {_digest(earlier) for earlier in adapters[:place]}
        if own is None or not lacking:
            continue
        if manifest is None and TokenMap.read(base).hash == own.last("merge").token_map:
            note(f"{base} has no {MANIFEST}: whether it is what {folder} was trained on is unknown")
            continue
        later = [one for one in adapters[place + 1 :] if _digest(one) in lacking]
        named = str(later[0]) if later else f"an adapter whose weights have sha256 {min(lacking)}"
        raise LexigraftError(
            f"{folder} was trained on a model into which {named} had been merged, and {base} has "
            "it not",
            needed="adapters in the order in which they were trained",
            fix=f"lexigraft merge {base} {later[0] if later else 'THAT_ADAPTER'} {folder} "
            "-o MERGED",
        )


def _since_extracted(manifest: Manifest | None) -> Manifest | None:
    """An adapter's manifest without what lies before `extract`, which holds all of that itself."""
    records = manifest.records if manifest else []
    places = [place for place, r in enumerate(records) if isinstance(r, ExtractRecord)]
    return Manifest(records=records[places[-1] + 1 :]) if places else manifest


def _merged_into(manifest: Manifest | None) -> set[str]:
    """Hashes of the adapters that went into a model."""
    records = manifest.records if manifest else []
    return {digest for r in records if isinstance(r, MergeRecord) for digest in r.adapters}


def _digest(adapter: Path) -> str | None:
    weights = adapter / WEIGHTS
    return sha256_file(weights) if weights.is_file() else None


@contextmanager
def _merged_so_far(
    base: Path, adapters: Sequence[Path], target: Path, *, prove: bool, body_only: bool
) -> Iterator[tuple[Path, list[MergeResult]]]:
    """The base with `adapters` in it, in a folder that is gone at the end; and what was done."""
    if not adapters:
        yield base, []
        return
    results = []
    with scratch(target) as between:
        source = base
        for place, folder in enumerate(adapters, 1):
            job = prepare(source, folder, None, body_only=body_only)
            step = between / f"{base.name}-{place}"
            step.mkdir()
            _write(job, step, replay=prove)
            results.append(_result(job, step, **(_prove(job, step) if prove else {})))
            if source != base:
                shutil.rmtree(source)
            source = step
        yield source, results


def _of_all(results: Sequence[MergeResult]) -> MergeResult:
    """The last of several results, with what the ones before it did."""
    last = results[-1]
    return replace(
        last,
        tensors=max(result.tensors for result in results),
        adapters=tuple(adapter for result in results for adapter in result.adapters),
        sources=tuple(line for result in results for line in result.sources),
        rounding=_largest(result.rounding for result in results),
        difference=_largest(result.difference for result in results),
        limit=_largest(result.limit for result in results),
    )


def _largest(numbers: Iterable[float | None]) -> float | None:
    return max((number for number in numbers if number is not None), default=None)


def _prepare_together(
    base: Path,
    folders: Sequence[Path],
    weights: Sequence[float],
    given: Path | None,
    union_folder: Path,
    *,
    remap: bool,
    body_only: bool,
) -> Job:
    """Adapters side by side; the tokenizer of the result is written into `union_folder`."""
    from lexigraft.selection.union import left_out_lines, write_union  # imports what `learn` needs

    checkpoint, whole = open_whole(base)
    adapters = [Adapter.open(folder) for folder in folders]
    vocabulary = without_head(whole) if _classify(adapters) else whole
    base_map = TokenMap.read(base)
    parts, tokenizers, rows = [], [], vocabulary.rows
    for adapter, weight in zip(adapters, weights, strict=True):
        misfits = Misfits()
        matched = match(adapter, checkpoint, vocabulary, misfits)
        folder = base if body_only else adapter.folder
        if body_only:
            misfits.require_none()
            matched = body_of(matched, adapter)
        own = joined(read_token_maps(folder))
        source = given if own is None and given is not None else folder
        own = own or (base_map if given is None else TokenMap.read(given))
        if remap and not _one_extends_the_other(base_map, own):
            expansion = expand_moved(
                adapter,
                checkpoint,
                vocabulary,
                changes=matched.vocabulary,
                own=own,
                base=base_map,
                misfits=misfits,
            )
            found = len(aligned(own, base_map))
            note(
                f"{folder}: rows move by token text: {found:,} of its {len(own.texts):,} tokens "
                "are in the base"
            )
        else:
            choice = TokenizerChoice.among(base, folder, None if source == folder else source)
            if choice.replaced:
                raise _replaced_beside_others(base, folder, choice)
            if not body_only:
                require_recorded(adapter.manifest, choice, folder)
            expansion = expand(
                adapter,
                checkpoint,
                vocabulary,
                changes=matched.vocabulary,
                tokenizer=choice,
                misfits=misfits,
            )
            say_if_other_base(checkpoint, adapter, choice)
            own, source = choice.map, choice.folder
            rows = max(rows, expansion.growth.rows)
        parts.append(Weighted(weight, own, matched, expansion))
        tokenizers.append(source)
    union = write_union(base, [t for t in tokenizers if t != base], union_folder)
    for line in left_out_lines(union.left_out):
        note(line)
    same = all(part.tokens.hash == union.map.hash for part in parts)
    step = 1 if same or union.map.tokens <= vocabulary.rows else ROW_STEP
    growth = Growth.to(vocabulary.rows, base_map.tokens, union.map.tokens, step)
    growth = replace(growth, rows=max(growth.rows, rows) if same else growth.rows)
    dropped = [name for name in whole.names if name not in vocabulary.names]
    rounding = Rounding()
    plan, written, tied = weighted_plan(
        checkpoint, vocabulary, parts, growth, union.map, rounding=rounding, dropped=dropped
    )
    labels = parts[0].matched.labels
    if len(parts) > 1 and labels:
        note("the heads over labels are averaged: label by label they have to mean the same")
    return Job(
        checkpoint,
        tuple(adapters),
        vocabulary,
        TokenizerChoice(union_folder, union.map, base_map, None, tuple(tokenizers) if same else ()),
        frozenset(n for part in parts for n in (*part.matched.changes, *part.matched.labels)),
        written,
        growth,
        tied,
        plan,
        labels=labels,
        weights=tuple(weights),
        body_only=body_only,
        rounding=rounding,
    )


def _replaced_beside_others(base: Path, folder: Path, choice: TokenizerChoice) -> RefusalError:
    first = choice.replaced[0]
    return RefusalError(
        f"{folder} gave {len(choice.replaced):,} ids of {base} to other tokens (id {first}: "
        f"{choice.base.texts[first]!r} became {choice.map.texts[first]!r}), and --weights keeps "
        "what the base's ids mean",
        needed="as BASE the model in which these tokens were replaced",
        fix="name the grafted model that the adapters were trained on as BASE; or add --remap, "
        "which leaves BASE its tokens and puts the others behind them",
    )


def _classify(adapters: Sequence[Adapter]) -> bool:
    """Whether `adapters` are classifiers; all or none."""
    kinds = {adapter.config.classifies: adapter.folder for adapter in adapters}
    if len(kinds) > 1:
        raise RefusalError(
            f"{kinds[True]} is a classifier, {kinds[False]} is none",
            needed="with --weights or --remap, adapters of one kind",
            fix="without --weights they are a stack: name the classifier last, trained on the rest",
        )
    return True in kinds


def _one_extends_the_other(base: TokenMap, own: TokenMap) -> bool:
    shorter, longer = (base, own) if base.tokens <= own.tokens else (own, base)
    return first_difference(shorter, longer) is None


def _write(job: Job, folder: Path, *, replay: bool) -> None:
    if job.labels:
        _require_all_weights(job)
    record = MergeRecord(
        adapters=[sha256_file(adapter.weights) for adapter in job.adapters],
        token_map=job.tokenizer.map.hash,
        rows=job.growth.rows,
        tied=job.tied,
        versions=versions(["lexigraft", "torch"]),
        weights=None if job.weights is None else list(job.weights),
        body_only=job.body_only or None,
        trimmed=job.trimmed or None,
        changed=sorted(job.changed),
    )
    write_model(job, folder, record, replay=replay)


def _require_all_weights(job: Job) -> None:
    """A classifier has every weight of its class: the pooler of a BERT may have been random."""
    from lexigraft.models.load import absent_weights

    base = job.checkpoint.folder
    absent = [n for n in absent_weights(base, count_of(job.labels)) if n not in job.labels]
    if absent:
        raise LexigraftError(
            f"{', '.join(absent)} of the classifier: neither {base} nor the adapter holds it, so "
            "it was random when the adapter was trained, and was not saved",
            needed="the values that it was trained with",
            fix="name as BASE the model under PEFT: model.unload().save_pretrained(...); or train "
            "again with these in modules_to_save",
        )


def _labels(job: Job) -> int | None:
    """How many labels the result has; None where it is no classifier."""
    if job.labels:
        return count_of(job.labels)
    if not job.adapters[0].config.classifies:
        return None
    return len(job.checkpoint.config.get("id2label") or "01")  # transformers' default is two


def _prove(job: Job, folder: Path) -> dict[str, float]:
    """The largest difference between a logit of the result and of base + adapter, and its limit.

    Raises:
        LexigraftError: more than rounding explains.
    """
    from lexigraft.models.proof import compare_merged

    found = compare_merged(
        job.checkpoint.folder,
        job.adapters[0].folder,
        folder,
        base_tokens=job.tokenizer.base.tokens,
        tokens=job.tokenizer.map.tokens,
        adapter_rows=job.adapter_rows,
        dtype=job.checkpoint.tensors[job.vocabulary.embeds[0]].dtype,
        labels=_labels(job),
        replaced=job.tokenizer.replaced,
    )
    if not found.difference <= found.limit:
        raise LexigraftError(
            f"logits of the result differ from those of base + adapter by {found.difference:.3g}",
            needed=f"at most {found.limit:.3g}",
            fix="check that BASE is the model that this adapter was trained on",
        )
    return {"difference": found.difference, "limit": found.limit}


def _result(job: Job, output: Path, **found: Any) -> MergeResult:
    vocabulary = {name: by_row(job.checkpoint.tensors[name]).rows for name in job.vocabulary.names}
    changed = {rows.name for rows in job.written}
    kept = [f"{n}: {rows:,} rows: the base's" for n, rows in vocabulary.items() if n not in changed]
    return MergeResult(
        output=output,
        rows=job.growth.rows,
        tokens=job.tokenizer.map.tokens,
        tied=job.tied,
        tensors=len(job.changed | changed),
        adapters=tuple(adapter.folder for adapter in job.adapters),
        sources=(*kept, *(rows.line() for rows in job.written)),
        **{"rounding": job.rounding.largest, **found},
    )
