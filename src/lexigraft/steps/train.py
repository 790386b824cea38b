"""`train`: continued pretraining of the new rows, alone, with LoRA, or with all of the body."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexigraft import families
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.console import is_first_process, note, progress, working
from lexigraft.corpus import text_files
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import (
    BASE_CARD,
    Inputs,
    disk_faults,
    existing_parent,
    fsync_tree,
    full_disk,
    refuse_existing,
    refuse_overwriting,
    replace_folder,
    sha256_bytes,
    sha256_json,
    write_json,
)
from lexigraft.hub import local_folder
from lexigraft.manifest import NEW_TOKENS, Manifest, TrainRecord, versions
from lexigraft.models.bits import require_next_token
from lexigraft.models.load import context_limit, load_model, require_row
from lexigraft.models.preparation import (
    Job,
    Texts,
    base_measure,
    evidence,
    look,
    measure,
    new_target_share,
    pack_texts,
    plan_of,
    prepare,
    read_texts,
    require_block,
    with_blocks_of_text,
)
from lexigraft.models.processes import (
    is_sharded,
    process_count,
    require_known_way,
    shared,
    uses_deepspeed,
    wait_for_all,
)
from lexigraft.models.settings import Settings, require_in_range, settings_of
from lexigraft.models.trackers import trackers
from lexigraft.models.unfinished import partial_of, unfinished
from lexigraft.models.verdict import adoption, judge, verdict_lines

if TYPE_CHECKING:
    from lexigraft.models.evidence import RowEvidence
    from lexigraft.models.new_rows import NewRows
    from lexigraft.models.objectives import Objective
    from lexigraft.models.rate_finder import RateTable
    from lexigraft.models.stopping import StopRule
    from lexigraft.models.training import Monitor, Schedule

BLOCKS = "blocks"  # folder of the packed texts, in a run's workplace
FINDER_STEPS = 20
DISTILL_PATIENCE = 2  # measurements, by default one in each pass
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers")


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    Attributes:
        text_bytes: UTF-8 bytes of text consumed, general text included.
        tokens: targets, that is predicted tokens, consumed.
        seconds: spent in training steps, measurements not counted.
        domain_bpb, general_bpb: bits per byte of held-out text at the end, None without text.
        base: the same of the un-grafted base, None where it is unknown.
        rows_moved: new rows that differ from their start.
        new_rows: how many new rows there are.
        kept_step: the step whose state was written: the last, or the best of a run that may stop
            early. Figures, rows and the verdict are of it.
        stopped: why the run ended before its last step; None where it did not.
        adoption: where the model wrote the text of a new token, the share of places in which it
            used the token; None where it wrote none.
        verdict: whether it was enough, and what to do if not (`models/verdict.py`).
        log: one entry per measurement, the untrained model first.
    """

    output: Path
    mode: str
    steps: int
    text_bytes: int
    tokens: int
    seconds: float
    domain_bpb: float | None
    general_bpb: float | None
    base: dict[str, float | None]
    kept_step: int
    stopped: str | None
    rows_moved: int
    new_rows: int
    adoption: float | None
    verdict: dict[str, Any]
    log: tuple[dict[str, float | None], ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {**asdict(self), "output": str(self.output), "log": list(self.log)}

    def lines(self) -> list[str]:
        """What a person reads."""
        found = [
            f"trained {self.output}: {self.steps:,} steps, {self.text_bytes:,} bytes of text, "
            f"{self.tokens:,} tokens, {self.seconds:,.0f} s"
        ]
        if self.stopped is not None:
            found.append(f"stopped  early: {self.stopped}")
        if self.kept_step != self.steps:
            found.append(f"kept     the best measurement, after {self.kept_step:,} steps")
        for name, after in (("domain", self.domain_bpb), ("general", self.general_bpb)):
            before, base = self.log[0][f"{name}_bpb"], self.base[f"{name}_bpb"]
            if after is not None and before is not None:
                against = "" if base is None else f", the base {base:.3f}"
                found.append(f"{name:8} {before:.3f} -> {after:.3f} bits per byte{against}")
        if self.new_rows:
            found += self._of_new_rows()
        return [*found, *verdict_lines(self.verdict)]

    def _of_new_rows(self) -> list[str]:
        end = next(entry for entry in self.log if entry["step"] == self.kept_step)
        found = [f"new rows {self.rows_moved:,} of {self.new_rows:,} moved"]
        if self.adoption is not None:
            found[0] += f"; adopted in {self.adoption:.0%} of the places where they were written"
        old, new = end.get("old_bpb"), end.get("new_bpb")
        if old is not None and new is not None:
            found.append(f"loss     {old:.3f} bits per byte of old tokens, {new:.3f} of new ones")
        top, leak = end.get("new_top1"), end.get("leak")
        if top is not None:
            found.append(
                f"targets  new tokens are the likeliest at {top:.0%} of theirs"
                + ("" if leak is None else f"; {leak:.1%} of the probability is left to old pieces")
            )
        return found


@working("preparing to train")
def train(
    model: str | Path,
    *,
    corpus: Sequence[str | Path],
    output: str | Path,
    general: Sequence[str | Path] = (),
    held_out: Sequence[str | Path] = (),
    mode: str = "lora",
    objective: str = "lm",
    passes: int | None = None,
    max_steps: int | None = None,
    max_bytes: int | None = None,
    max_tokens: int | None = None,
    share: Sequence[float] | None = None,
    block_size: int | None = None,
    batch_size: int = 1,
    learning_rate: float | None = None,
    new_row_learning_rate: float | None = None,
    old_rows: str = "frozen",
    old_row_scale: float = 0.1,
    weight_decay: float | None = None,
    schedule: str = "cosine",
    warmup: float = 0.05,
    gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False,
    dtype: str = "auto",
    lora_rank: int = 16,
    lora_alpha: float = 32.0,
    replay: float = 0.1,
    replay_schedule: str = "even",
    base: str | Path | None = None,
    patience: int | None = None,
    general_limit: float | None = None,
    report_to: Sequence[str] = (),
    measurements: int = 4,
    measured_bytes: int = 16_384,
    eval_at_bytes: Sequence[int] = (),
    eval_at_tokens: Sequence[int] = (),
    save_steps: int | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    force: bool = False,
) -> TrainResult:
    """Train the new rows of `model`, and of its body nothing, LoRA, or everything.

    Reads the documents of `corpus` that are not held out, in an order that depends on their
    content alone, unless `max_*` says otherwise (more text than there is: it begins again). Old
    rows stay bit for bit as they are unless `old_rows` is `slow`, and so does the
    body in mode `rows`. Works in `OUT.partial`, which `resume` continues after a kill. Modes
    `rows` and `lora` write an adapter, `full` writes a whole model folder.

    Args:
        model: a folder that `graft` wrote, or any causal LM (then `mode` must not be `rows`).
        objective: `lm`, the next token; or `distill`, in modes `rows` and `lora`: the model's own
            reading of the text in base ids (`models/distill.py`); LoRA is put on its first layers
            then.
        passes: how often that text is read; by default once, with `distill` `DISTILL_PASSES` times.
        general: general text: mixed in as `replay`, and measured for forgetting.
        held_out: domain text to measure on; without it, `corpus.held_out` chooses documents of
            `corpus`, which are then not trained on.
        max_bytes: UTF-8 bytes of text to consume, general text included.
        max_tokens: predicted tokens to consume, to the end of a document.
        share: which part of the text is read, as where it begins and ends, such as (0.2, 1); for
            stages that share one text. Instead of the three above.
        block_size: text per block, in tokens of the base, by default 512, with `distill` 256 or a
            quarter of the model's context (base ids need more room): as much text makes fewer
            positions with new tokens, so that a step sees what it would without them;
            `batch_size` blocks are computed at once, and `gradient_accumulation` such batches make
            a step (of each process, where there are several).
        learning_rate, new_row_learning_rate: peaks, of the body and of the new rows; by default
            `models.settings.RATES`, by mode and size of the model.
        old_rows: in mode `full`, `frozen`, or `slow`: trained at `old_row_scale` of the body's
            rate.
        weight_decay: of the body's matrices, never of rows; by default 0, in mode `full` 0.1.
        schedule: `cosine`, `wsd` or `constant`, after a linear `warmup` (a share of the steps).
        gradient_checkpointing: less memory for about a third more time.
        dtype: of the frozen or loaded weights; new rows and LoRA are float32 whatever it is.
            `int8` and `nf4`, for mode `lora`, need bitsandbytes.
        replay: share of general text among the bytes, spread evenly, or with `replay_schedule`
            `early` all of it first, as half of what is read.
        base: the model before `graft`, to compare with. Without it `model` itself is asked, as
            long as it was not trained since it was grafted.
        patience: stop after so many measurements without a better one of domain text; by default
            never, with `distill` `DISTILL_PATIENCE`.
        general_limit: stop where general text takes this share more bits per byte than with the
            base. With either, the best measurement's state is what is written.
        report_to: trackers that transformers' Trainer knows, such as `wandb`; TensorBoard events
            are always written.
        measurements: how often held-out text is measured on the way, the end included.
        measured_bytes: at most so much held-out text per measurement, domain and general each.
        eval_at_bytes, eval_at_tokens: measure also after the first step past each of these.
        save_steps: steps between checkpoints; without it, ten in all.
        trust_remote_code: run the Python files that `model` brings for its architecture.

    Raises:
        LexigraftError: no text, no new token in the text, ids without a row, a full disk, a model
            or a text that changes while it is read.
        RefusalError: an architecture whose rows cannot be trained alone, or a `dtype` in which
            the mode cannot train.
    """
    require_known_way(objective=objective, dtype=dtype)
    require_in_range(
        measurements=measurements, measured_bytes=measured_bytes, save_steps=save_steps
    )
    asked = trackers(report_to)
    output = Path(output)
    source = local_folder(model)
    origin = None if base is None else local_folder(base)
    settings = settings_of(
        source,
        mode=mode,
        max_steps=max_steps,
        max_bytes=max_bytes,
        max_tokens=max_tokens,
        share=share,
        block_size=block_size,
        batch_size=batch_size,
        learning_rate=learning_rate,
        new_row_learning_rate=new_row_learning_rate,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        replay=replay,
        seed=seed,
        old_rows=old_rows,
        old_row_scale=old_row_scale,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        gradient_accumulation=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
        objective=objective,
        passes=passes,
        replay_schedule=replay_schedule,
        patience=patience,
        general_limit=general_limit,
    )
    refuse_existing(output, force=force)
    texts_read = [path for specs in (corpus, general, held_out) for path in text_files(specs)]
    refuse_overwriting(output, [source, *texts_read])
    models = Inputs([source] if origin is None else [source, origin])
    with disk_faults(output):
        documents = Inputs(texts_read)
        texts = read_texts(
            corpus,
            general,
            held_out,
            seed=seed,
            measured_bytes=measured_bytes,
            near=existing_parent(output),
        )
        documents.require_unchanged()
    family = families.load(source)
    settings = with_blocks_of_text(family, texts, settings)
    workplace = _packed(family, texts, settings, output, resume=resume, force=force)
    with full_disk(output), shared(workplace, partial_of(output)) as folder:
        job = prepare(source, texts, settings, folder / BLOCKS)
        _require_rows_to_train(job)
        points = _points(job, measurements, eval_at_bytes, eval_at_tokens)
        result = _train(
            job,
            points,
            save_steps,
            folder,
            output,
            base=origin,
            report_to=asked,
            resume=resume,
            trust_remote_code=trust_remote_code,
        )
        if is_first_process():
            models.require_unchanged()
            fsync_tree(folder / "result")
            replace_folder(folder / "result", output, force=force)
    return result


@contextmanager
def _packed(
    family: families.Family,
    texts: Texts,
    settings: Settings,
    output: Path,
    *,
    resume: bool,
    force: bool,
) -> Iterator[Path]:
    """The run's workplace, with the packed texts in it; `family` is the model's."""
    model = Checkpoint.open(family.folder)
    told = {"config": sha256_json(model.config), "weights": model.checksum()}
    plan = {**plan_of(family, texts, settings), **told}
    with unfinished(output, plan, resume=resume, force=force) as folder:
        with disk_faults(output):
            pack_texts(family, texts, settings, folder / BLOCKS)
        yield folder


@working("looking for a learning rate")
def find_learning_rate(
    model: str | Path,
    *,
    corpus: Sequence[str | Path],
    general: Sequence[str | Path] = (),
    held_out: Sequence[str | Path] = (),
    max_steps: int | None = None,
    measured_bytes: int = 16_384,
    trust_remote_code: bool = False,
    **settings: Any,
) -> RateTable:
    """Try five learning rates, a few steps each, and recommend one; writes nothing.

    Args:
        model, corpus, general, held_out, measured_bytes, trust_remote_code: as in `train`.
        max_steps: of each run; 20 by default.
        settings: those options of `train` that decide the weights: `mode`, `batch_size` ...

    Raises:
        LexigraftError: as `train`, or no text is held out.
        RefusalError: as `train`, or several processes were launched.
    """
    from lexigraft.models.rate_finder import sweep

    if process_count() > 1:
        raise RefusalError(
            "--find-lr in several processes",
            needed="one process",
            fix="run it without a launcher, with --gradient-accumulation for the same step",
        )
    source = local_folder(model)
    require_in_range(max_steps=max_steps, measured_bytes=measured_bytes)
    wanted = settings_of(
        source, **{**settings, "max_steps": max_steps or FINDER_STEPS, "max_bytes": None}
    )
    texts = read_texts(corpus, general, held_out, seed=wanted.seed, measured_bytes=measured_bytes)
    wanted = with_blocks_of_text(families.load(source), texts, wanted)
    job = prepare(source, texts, wanted)
    _require_rows_to_train(job)
    loaded = load_model(source, trust_remote_code=trust_remote_code, dtype=_dtype(wanted))
    _require_fit(job, loaded)
    trained, rows = _trainable(job, loaded)
    _tell(job, trained)
    schedule = _schedule(job, loaded)
    return sweep(
        trained,
        rows,
        job.blocks,
        schedule,
        measure=lambda: measure(job, trained),
        objective=lambda: _objective(job, trained, rows),
    )


def _require_rows_to_train(job: Job) -> None:
    wanted = job.settings
    if (wanted.mode == "rows" or wanted.objective == "distill") and not len(job.ids):
        raise LexigraftError(
            f"{job.folder} has no new rows (no lexigraft.json with a graft)",
            needed="a model that `lexigraft graft` wrote",
            fix="use --mode lora --objective lm, or graft new tokens first",
        )


def _points(
    job: Job, measurements: int, at_bytes: Sequence[int], at_tokens: Sequence[int]
) -> frozenset[int]:
    """Steps after which held-out text is measured; the last step is always one of them."""
    steps, batch = job.steps, job.settings.step_blocks
    found = {round(steps * (place + 1) / measurements) for place in range(measurements)}
    for wanted, counted in (
        *((limit, job.blocks.text_bytes) for limit in at_bytes),
        *((limit, job.blocks.tokens) for limit in at_tokens),
    ):
        block = int(counted.searchsorted(wanted))
        found.add(min(steps, block // batch + 1))
    return frozenset(found | {steps}) - {0}


def _train(
    job: Job,
    points: frozenset[int],
    save_steps: int | None,
    folder: Path,
    output: Path,
    *,
    base: Path | None,
    report_to: Sequence[str],
    resume: bool,
    trust_remote_code: bool,
) -> TrainResult:
    from lexigraft.models.stopping import StopRule

    wanted = job.settings
    patience = wanted.patience
    if patience is None and wanted.objective == "distill" and job.texts.held_domain:
        patience = DISTILL_PATIENCE
    rule = StopRule(patience, wanted.general_limit)
    rule.require_texts(domain=bool(job.texts.held_domain), general=bool(job.texts.held_general))
    model = load_model(job.folder, trust_remote_code=trust_remote_code, dtype=_dtype(wanted))
    _require_fit(job, model)
    reference = base_measure(job, model, base, trust_remote_code=trust_remote_code)
    trained, rows = _trainable(job, model)
    schedule = _schedule(job, model, points, save_steps)
    _tell(job, trained)
    rule = replace(rule, general=reference["general_bpb"])
    untrained, bits = look(job, trained)
    monitor = _fit(
        job, trained, rows, schedule, folder, untrained=untrained, rule=rule,
        report_to=report_to, resume=resume,
    )  # fmt: skip
    if is_sharded():
        trained, rows = _gathered(job, folder, trust_remote_code=trust_remote_code)
    log = monitor.progress.log
    kept = log[: rule.best(log) + 1]
    step = int(kept[-1]["step"] or 0)
    seen = evidence(job, trained, rows.moved().tolist(), step, bits) if rows else []
    result = _result(
        job, output, monitor, kept, stopped=rule.reason(log), base=reference, seen=seen
    )
    wait_for_all()  # before it is written: that may take longer than processes wait for each other
    if is_first_process():
        _write(job, folder / "result", trained, rows, result)
        _write_report(job, folder / "result", result, seen)
    return result


def _schedule(
    job: Job, model: Any, points: frozenset[int] = frozenset(), save_steps: int | None = None
) -> Schedule:
    from lexigraft.models.training import Schedule

    wanted = job.settings
    return Schedule(
        steps=job.steps,
        batch_size=wanted.batch_size,
        learning_rate=wanted.learning_rate,
        new_row_learning_rate=wanted.new_row_learning_rate,
        save_steps=save_steps or max(1, -(-job.steps // 10)),
        measure_at=points,
        seed=wanted.seed,
        old_row_learning_rate=wanted.learning_rate * wanted.old_row_scale,
        weight_decay=wanted.weight_decay,
        shape=wanted.schedule,
        warmup=wanted.warmup,
        accumulation=wanted.gradient_accumulation,
        processes=wanted.processes,
        checkpointing=wanted.gradient_checkpointing,
        guess=math.log(len(model.get_input_embeddings().weight)),
        dtype=wanted.dtype,
    )


def _dtype(settings: Settings) -> str | None:
    if settings.dtype != "auto":
        return settings.dtype
    # What trains is kept in float32: 16-bit weights would swallow small steps. DeepSpeed has one
    # type for all weights.
    return "float32" if settings.mode == "full" or uses_deepspeed() else None


def _trainable(job: Job, model: Any) -> tuple[Any, NewRows | None]:
    from lexigraft.models.adapter_files import lora_config, make_trainable
    from lexigraft.models.distill import first_layers
    from lexigraft.models.whole_model import make_all_trainable

    wanted = job.settings
    if wanted.mode == "full":
        return model, make_all_trainable(model, job.ids, old_rows=wanted.old_rows == "slow")
    lora = lora_config(wanted.lora_rank, wanted.lora_alpha) if wanted.mode == "lora" else None
    part = first_layers(model) if wanted.objective == "distill" else None
    return make_trainable(model, job.ids, lora, part=part, seed=wanted.seed)


def _gathered(job: Job, folder: Path, *, trust_remote_code: bool) -> tuple[Any, NewRows | None]:
    """The whole model in each process, with what `fit` gathered."""
    from lexigraft.models.adapter_files import read_trained
    from lexigraft.models.training import GATHERED

    wanted = job.settings
    model = load_model(job.folder, trust_remote_code=trust_remote_code, dtype=_dtype(wanted))
    trained, rows = _trainable(job, model)
    read_trained(folder / GATHERED, trained, rows)
    return trained, rows


def _require_fit(job: Job, model: Any) -> None:
    require_row(job.folder, model, job.family, job.highest)
    require_next_token(model, job.blocks.inputs[0].tolist())
    require_block(job.settings.block_size, context_limit(model))


def _tell(job: Job, trained: Any) -> None:
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    told = f"training {count:,} weights in {job.steps:,} steps"
    if len(job.ids):
        told += f"; {new_target_share(job):.1%} of the predicted tokens are new ones"
    note(told)


def _fit(
    job: Job,
    trained: Any,
    rows: NewRows | None,
    schedule: Schedule,
    folder: Path,
    *,
    untrained: dict[str, float | None],
    rule: StopRule,
    report_to: Sequence[str],
    resume: bool,
) -> Monitor:
    from lexigraft.models.training import fit

    last = min(len(job.blocks), job.steps * job.settings.step_blocks) - 1
    with progress("training", total=int(job.blocks.text_bytes[last])) as advance:
        return fit(
            trained,
            rows,
            job.blocks,
            schedule,
            folder=folder,
            trained_on=None if job.settings.mode == "full" else str(job.folder),
            measure=lambda: measure(job, trained),
            advance=advance,
            resume=resume,
            untrained=untrained,
            objective=_objective(job, trained, rows),
            rule=rule,
            report_to=report_to,
        )


def _objective(job: Job, trained: Any, rows: NewRows | None) -> Objective:
    from lexigraft.models.distill import Distill
    from lexigraft.models.objectives import NextToken

    if rows and job.settings.objective == "distill":
        return Distill(trained, job.new, job.blocks)
    return NextToken()


def _result(
    job: Job,
    output: Path,
    monitor: Monitor,
    kept: Sequence[dict[str, float | None]],
    *,
    stopped: str | None,
    base: dict[str, float | None],
    seen: list[RowEvidence],
) -> TrainResult:
    log = monitor.progress.log
    steps = int(log[-1]["step"] or 0)
    return TrainResult(
        output=output,
        mode=job.settings.mode,
        steps=steps,
        text_bytes=monitor.text_bytes(steps),
        tokens=monitor.tokens(steps),
        seconds=round(monitor.progress.seconds, 3),
        domain_bpb=kept[-1]["domain_bpb"],
        general_bpb=kept[-1]["general_bpb"],
        base=base,
        kept_step=int(kept[-1]["step"] or 0),
        stopped=stopped,
        rows_moved=sum(row.moved > 0 for row in seen),
        new_rows=len(job.ids),
        adoption=adoption(seen)[0],
        verdict=judge(kept, base, seen).to_json(),
        log=tuple(log),
    )


def _write(job: Job, folder: Path, trained: Any, rows: NewRows | None, result: TrainResult) -> None:
    """The adapter folder, all that a merge or PEFT needs; or the whole model."""
    from lexigraft.models.adapter_files import write_adapter
    from lexigraft.models.whole_model import write_model

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if job.settings.mode == "full":
        write_model(folder, job.folder, trained, rows)
    else:
        write_adapter(folder, trained, rows, str(job.folder))
        families.copy_tokenizer(job.folder, folder)
    for name in (NEW_TOKENS, BASE_CARD):
        if (job.folder / name).is_file():
            shutil.copyfile(job.folder / name, folder / name)
    before = Manifest.read(job.folder) or Manifest()
    before.plus(_record(job, before, rows, result)).write(folder)
    events = folder.parent / "tensorboard"
    if events.is_dir():
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # of an earlier stage
        shutil.copytree(events, folder / "tensorboard")


def _write_report(job: Job, folder: Path, result: TrainResult, seen: list[RowEvidence]) -> None:
    """`training.json`: the result, the settings and the evidence of every row."""
    report = {**result.to_json(), "settings": asdict(job.settings)}
    report.pop("output")
    if seen:
        report["new_target_share"] = new_target_share(job)
        report["rows"] = [asdict(row) for row in seen]
    write_json(folder / "training.json", report)


def _record(job: Job, before: Manifest, rows: NewRows | None, result: TrainResult) -> TrainRecord:
    hashes = {
        f"{path}.weight": sha256_bytes(values.detach().cpu().numpy().tobytes())
        for path, values in (rows.parameters.items() if rows else ())
    }
    return TrainRecord(
        model=before.hash,
        mode=job.settings.mode,
        settings=asdict(job.settings),
        sources=job.texts.sources,
        steps=result.steps,
        text_bytes=result.text_bytes,
        new_rows=hashes,
        versions=versions(_PACKAGES),
    )
