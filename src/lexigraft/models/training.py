"""The training loop: transformers' Trainer, told what to optimise, measure and save."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from lexigraft.console import is_first_process
from lexigraft.errors import LexigraftError, RefusalError, StoppedError
from lexigraft.files import read_json, write_json
from lexigraft.models.adapter_files import (
    read_trained,
    require_saved,
    write_adapter,
    write_trained,
)
from lexigraft.models.load import device, quiet_transformers, text_part
from lexigraft.models.new_rows import NewRows
from lexigraft.models.objectives import NextToken, Objective
from lexigraft.models.packing import IGNORED, Blocks, collate
from lexigraft.models.processes import (
    deepspeed_forgotten,
    is_sharded,
    require_sharding,
    uses_deepspeed,
    where,
)
from lexigraft.models.row_optimizer import RowAdamW
from lexigraft.models.shards import are_finite, optimizer_parts, put_optimizer_parts
from lexigraft.models.stopping import BestKept, StopRule, best_state
from lexigraft.models.unfinished import CHECKPOINTS, last_checkpoint, step_of

LOG_FILE = "log.json"
BEST = "best"  # folder of the states that an early stop may go back to
GATHERED = "gathered"  # folder of what was trained, where the processes hold parts of it
# Of an entry of the log: what tells where it stands, and is no measurement.
_PLACE = frozenset({"step", "text_bytes", "tokens", "seconds"})
WARM_UP = 0.05  # of the steps; Chinese-LLaMA and most continued pretraining use 2% to 5%
FINAL_RATE = 0.1  # of the learning rate, at the end of a cosine or a tail
TAIL = 0.2  # of the steps, in which a WSD schedule falls
CLIP_NORM = 1.0
# A run has diverged when so many steps in a row cost more than so many times what it began with.
DIVERGED_STEPS, DIVERGED_TIMES = 10, 2.0


@dataclass(frozen=True)
class Schedule:
    """How blocks become steps.

    Attributes:
        batch_size: blocks that one process computes at once.
        learning_rate, new_row_learning_rate, old_row_learning_rate: peaks, of the body (LoRA or
            all of it), of the new rows, and of old rows where they are trained.
        save_steps: steps between checkpoints.
        measure_at: steps after which held-out text is measured.
        weight_decay: of the body's matrices; never of rows, norms and biases.
        shape: of the learning rate over the steps, see `rate`.
        warmup: share of the steps.
        accumulation: batches whose gradients are summed for one step.
        processes: how many work on a step together.
        checkpointing: compute activations again in the backward pass instead of keeping them.
        guess: the loss of a blind guess among all rows, nats per target.
        dtype: that was asked for; on a GPU anything but `float32` computes in 16 bits.
    """

    steps: int
    batch_size: int
    learning_rate: float
    new_row_learning_rate: float
    save_steps: int
    measure_at: frozenset[int]
    seed: int
    old_row_learning_rate: float = 0.0
    weight_decay: float = 0.0
    shape: str = "cosine"
    warmup: float = WARM_UP
    accumulation: int = 1
    processes: int = 1
    checkpointing: bool = False
    guess: float = 0.0
    dtype: str = "auto"

    @property
    def step_blocks(self) -> int:
        """Blocks of one step."""
        return self.batch_size * self.accumulation * self.processes


@dataclass
class Progress:
    """What has happened so far; saved with each checkpoint.

    Attributes:
        log: one entry per measurement.
        seconds: spent in training steps, measurements not counted.
        nats: training loss summed since the last entry.
        first: training loss of the first step, nats per target.
    """

    log: list[dict[str, float | None]] = field(default_factory=list)
    seconds: float = 0.0
    nats: float = 0.0
    first: float | None = None

    def write(self, folder: Path) -> None:
        """Save beside a checkpoint."""
        write_json(folder / LOG_FILE, vars(self))

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """What a checkpoint's run had done."""
        return cls(**read_json(folder / LOG_FILE))


class Monitor(TrainerCallback):  # type: ignore[misc]
    """Counts bytes, measures held-out text at the planned steps, writes TensorBoard events."""

    def __init__(
        self,
        blocks: Blocks,
        schedule: Schedule,
        measure: Callable[[], dict[str, float | None]],
        folder: Path,
        advance: Callable[[int], None],
        *,
        untrained: dict[str, float | None] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        events = folder / "tensorboard"
        self.progress = Progress()
        self.stopping = False
        self._step_nats, self._bad_steps = 0.0, 0
        self.report: Callable[[dict[str, float]], None] | None = None
        self._blocks, self._schedule, self._measure = blocks, schedule, measure
        self._writer = SummaryWriter(str(events)) if is_first_process() else None
        self._advance, self._untrained = advance, untrained
        self._began = time.monotonic()

    def text_bytes(self, step: int) -> int:
        """UTF-8 bytes of text consumed after `step` steps."""
        return _consumed(self._blocks.text_bytes, step * self._schedule.step_blocks)

    def tokens(self, step: int) -> int:
        """Targets consumed after `step` steps."""
        return _consumed(self._blocks.tokens, step * self._schedule.step_blocks)

    def add(self, loss: float, *, is_likelihood: bool) -> None:
        """Count the training loss of a batch; only a likelihood can be told in bits."""
        self.progress.nats += loss if is_likelihood else 0.0
        self._step_nats += loss

    def record(self, step: int, figures: dict[str, float | None] | None = None) -> None:
        """Measure now, unless the figures are known, and note it."""
        last = int(self.progress.log[-1]["text_bytes"] or 0) if self.progress.log else 0
        size = self.text_bytes(step)
        nats = self.progress.nats
        entry: dict[str, float | None] = {
            "step": step,
            "text_bytes": size,
            "tokens": self.tokens(step),
            "seconds": round(self.progress.seconds, 3),
            "train_bpb": nats / math.log(2) / (size - last) if nats else None,
            **(self._measure() if figures is None else figures),
        }
        self.progress.log.append(entry)
        self.progress.nats = 0.0
        if self._writer is not None:
            for key, value in entry.items():
                if key not in _PLACE and value is not None:
                    self._writer.add_scalar(key, value, step)
            self._writer.flush()
        if self.report is not None:
            self.report({key: value for key, value in entry.items() if value is not None})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the untrained model, unless a checkpoint is resumed."""
        if not self.progress.log:
            self.record(0, self._untrained)
        self._advance(self.text_bytes(state.global_step))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of one step."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count one step, measure if it is one of the planned ones, stop if that was asked for."""
        step = state.global_step
        self.progress.seconds += time.monotonic() - self._began
        self._advance(self.text_bytes(step) - self.text_bytes(step - 1))
        self._require_sense(step)
        control.should_save = control.should_save and not self._bad_steps  # keep the good ones
        if step in self._schedule.measure_at:
            self.record(step)
        if self.stopping and step < self._schedule.steps:
            control.should_save = control.should_training_stop = True

    def _require_sense(self, step: int) -> None:
        """Raise when the loss has long been worse than both the first one and a blind guess."""
        loss = self._step_nats / max(1, self.tokens(step) - self.tokens(step - 1))
        self._step_nats = 0.0
        if self.progress.first is None:
            self.progress.first = loss
        limit = DIVERGED_TIMES * max(self.progress.first, self._schedule.guess)
        self._bad_steps = self._bad_steps + 1 if loss > limit else 0
        if self._bad_steps >= DIVERGED_STEPS:
            raise _diverged(
                f"the loss of step {step} is {loss:.3g} nats per token, after "
                f"{self.progress.first:.3g} in the first one, and has been as bad for "
                f"{self._bad_steps} steps",
                self.folder,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


def _consumed(cumulative: Any, blocks: int) -> int:
    return int(cumulative[min(blocks, len(cumulative)) - 1]) if blocks else 0


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that reads blocks in order and saves what is trained as a PEFT adapter."""

    def __init__(
        self,
        model: Any,
        rows: NewRows | None,
        schedule: Schedule,
        monitor: Monitor,
        objective: Objective,
        **options: Any,
    ) -> None:
        self._rows, self._schedule, self._monitor = rows, schedule, monitor
        self._objective = objective
        self._trained_on: str | None = options.pop("trained_on")
        self._saved_once = False
        super().__init__(model=model, data_collator=collate, callbacks=[monitor], **options)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # so that every step's targets are counted

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """`RowAdamW` over what trains and nothing else, in the groups of `parameter_groups`."""
        if self.optimizer is None:  # type: ignore[has-type]
            groups = parameter_groups(self.model, self._rows, self._schedule)
            self.optimizer = RowAdamW(groups, weight_decay=0.0)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """`rate`, of every group."""
        if self.lr_scheduler is None:  # type: ignore[has-type]
            shape, warmup = self._schedule.shape, self._schedule.warmup
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: rate(step, num_training_steps, shape, warmup),
            )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's mean over the targets of the whole step."""
        total, targets = self._objective.loss(model, inputs)
        # Summed over the processes, so that all of them stop at the same step.
        seen = torch.stack([total.detach().float(), total.new_tensor(self._monitor.stopping)])
        if self._schedule.processes > 1:
            seen = self.accelerator.reduce(seen, "sum")
        nats, stopping = seen.tolist()
        self._monitor.stopping = stopping > 0
        if not math.isfinite(nats):
            step = self.state.global_step + 1
            raise _diverged(f"the loss of step {step} is not a finite number", self._monitor.folder)
        self._monitor.add(nats, is_likelihood=isinstance(self._objective, NextToken))
        # Gradients of several processes are averaged, and their targets are counted together.
        share = 1 if num_items_in_batch is None else self._schedule.processes
        loss = total * share / (targets if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def save_trained(self, folder: Path) -> None:
        """Write what trains into `folder`, from where `read_trained` takes it."""
        if self._trained_on is None:
            write_trained(folder, self.model, self._rows)
        else:
            write_adapter(folder, self.model, self._rows, self._trained_on)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What trains, gathered by all processes and written by the first one."""
        folder = Path(output_dir or self.args.output_dir)
        _require_finite(self.model, self._monitor.folder)
        self.save_trained(folder)
        if not self._saved_once:
            require_saved(folder, self.model, self._rows)
            self._saved_once = True
        if is_first_process():
            self._monitor.progress.write(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would save all of the model beside it, and torch cannot name shared rows.
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # the first process may not be so far
        torch.save(optimizer_parts(self.optimizer), self._own_state(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        self.accelerator.wait_for_everyone()  # so that the state, written last, has all parts

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        states = [
            torch.load(path, map_location="cpu", weights_only=True)
            for path in (self._own_state(checkpoint), Path(checkpoint) / SCHEDULER_NAME)
        ]
        put_optimizer_parts(self.optimizer, states[0])
        self.lr_scheduler.load_state_dict(states[1])

    def _own_state(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"optimizer-{self.args.process_index}.pt"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_trained(Path(resume_from_checkpoint), self.model, self._rows)


def parameter_groups(model: Any, rows: NewRows | None, schedule: Schedule) -> list[dict[str, Any]]:
    """Everything that trains, in groups with their own learning rate and weight decay.

    The body's matrices (LoRA's, or all of them) decay; its vectors, new rows and old rows never do:
    decoupled decay would move rows that have no gradient at all.
    """
    new = {id(parameter): parameter for parameter in (rows.parameters.values() if rows else ())}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    old = {id(table.weight): table.weight for table in tables if table.weight.requires_grad}
    body = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and id(parameter) not in {**new, **old}
    ]
    decay, rate = schedule.weight_decay, schedule.learning_rate
    groups = [
        {"params": [p for p in body if p.ndim > 1], "lr": rate, "weight_decay": decay},
        {"params": [p for p in body if p.ndim < 2], "lr": rate},
        *(
            {"params": [p], "lr": schedule.new_row_learning_rate, "shared": tuple(p.shape)}
            for p in new.values()
        ),
        {"params": [*old.values()], "lr": schedule.old_row_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def rate(step: int, steps: int, shape: str = "cosine", warmup: float = WARM_UP) -> float:
    """The factor on the learning rate in step `step` of `steps`, counted from 0.

    A linear warm-up whose first step already moves; then `cosine` falls to `FINAL_RATE`,
    `constant` stays, and `wsd` stays until the last `TAIL` of the steps, in which it falls to
    `FINAL_RATE` with 1 - the square root of the share done (Hägele et al. 2024, arXiv
    2405.18392).

    >>> [round(rate(step, 40), 2) for step in (0, 1, 2, 20, 39)]
    [0.5, 1.0, 1.0, 0.57, 0.1]
    >>> [round(rate(step, 40, "wsd"), 2) for step in (0, 1, 31, 32, 34, 39)]
    [0.5, 1.0, 1.0, 0.68, 0.45, 0.1]
    """
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    if shape == "constant":
        return 1.0
    if shape == "wsd":
        tail = max(1, round(TAIL * steps))
        done = max(0, step - (steps - tail) + 1) / tail
        return FINAL_RATE + (1 - FINAL_RATE) * (1 - math.sqrt(min(1.0, done)))
    done = (step - warm) / max(1, steps - 1 - warm)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def fit(
    model: Any,
    rows: NewRows | None,
    blocks: Blocks,
    schedule: Schedule,
    *,
    folder: Path,
    trained_on: str | None,
    measure: Callable[[], dict[str, float | None]],
    advance: Callable[[int], None],
    resume: bool,
    untrained: dict[str, float | None] | None = None,
    objective: Objective | None = None,
    rule: StopRule | None = None,
    report_to: Sequence[str] = (),
) -> Monitor:
    """Train `model` on `blocks`, in place.

    Args:
        folder: where checkpoints and events go, and `GATHERED` where the model was sharded: it
            stays so.
        trained_on: the model folder, for PEFT's config; None where checkpoints need be none.
        measure: held-out bits per byte of the model as it is now.
        untrained: what `measure` says before training, where it is known.
        resume: continue from the newest checkpoint in `folder`, if there is one.
        objective: what is minimised; by default the loss of the next token.
        rule: when to stop early; the model is then left as it was at the best measurement.
        report_to: trackers that Trainer knows, which are given the measurements too.
    """
    rule = rule or StopRule()
    monitor = Monitor(blocks, schedule, measure, folder, advance, untrained=untrained)
    checkpoint = last_checkpoint(folder) if resume else None
    if checkpoint is not None:
        monitor.progress = Progress.read(checkpoint)
    if schedule.checkpointing:
        _recompute_activations(model)
    data: Any = blocks if schedule.processes == 1 else _WholeSteps(blocks, schedule.step_blocks)
    engines = deepspeed_forgotten()
    with _told_apart(), quiet_transformers(), _stopped_by_sigterm(monitor), engines:
        trainer = AdapterTrainer(
            model,
            rows,
            schedule,
            monitor,
            objective or NextToken(),
            trained_on=trained_on,
            train_dataset=data,
            args=_arguments(folder / CHECKPOINTS, schedule, model, report_to),
        )
        if is_sharded():
            require_sharding(trainer)
        if report_to:
            monitor.report = trainer.log
        log = monitor.progress.log
        if rule.is_set:
            trainer.add_callback(BestKept(rule, lambda: log, folder / BEST, trainer.save_trained))
        done = 0 if checkpoint is None else step_of(checkpoint)
        if checkpoint is not None and done >= schedule.steps:  # Trainer would make a step more
            read_trained(checkpoint, model, rows)
        elif rule.reason(log) is None:  # unless the run was killed after it had stopped
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            done = trainer.state.global_step
    if done < schedule.steps and rule.reason(log) is None:
        raise StoppedError(
            f"stopped by SIGTERM after step {done:,} of {schedule.steps:,}, which is saved",
            needed="the rest of the steps",
            fix="run the same command again with --resume",
        )
    if rule.is_set:
        trainer.accelerator.wait_for_everyone()  # until the first process has written it
        step = int(log[rule.best(log)]["step"] or 0)
        read_trained(best_state(folder / BEST, step), model, rows)
    _require_finite(model, folder)
    if is_sharded():
        trainer.save_trained(folder / GATHERED)
        trainer.accelerator.wait_for_everyone()
    return monitor


def _recompute_activations(model: Any) -> None:
    try:
        with warnings.catch_warnings():  # transformers renames the method
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as fault:
        raise RefusalError(
            f"--gradient-checkpointing ({str(fault).splitlines()[0]})",
            needed="a kind of model whose layers can be computed again",
            fix="leave it out, and use a smaller --batch-size with --gradient-accumulation",
        ) from None


class _WholeSteps:
    """Blocks, and behind them empty ones, so that every process has as many in the last step."""

    def __init__(self, blocks: Blocks, step_blocks: int) -> None:
        self._blocks, self._step = blocks, step_blocks

    def __len__(self) -> int:
        return -(-len(self._blocks) // self._step) * self._step

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place < len(self._blocks):
            return self._blocks[place]
        block = self._blocks[0]
        return {**block, "labels": block["labels"] * 0 + IGNORED}


@contextlib.contextmanager
def _stopped_by_sigterm(monitor: Monitor) -> Iterator[None]:
    """SIGTERM lets the step under way end, and its checkpoint be written, while this lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def stop(*_: object) -> None:
        monitor.stopping = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_finite(model: Any, folder: Path) -> None:
    if not are_finite([p for p in model.parameters() if p.requires_grad]):
        raise _diverged("the last step made weights that are not finite numbers", folder)


def _diverged(found: str, folder: Path) -> LexigraftError:
    good = last_checkpoint(folder)
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint was written before"
    return LexigraftError(
        f"{found}; {kept}",
        needed="a training run that stays finite, and better than a blind guess",
        fix="halve --learning-rate and --new-row-learning-rate, and start again with --force",
    )


def _arguments(
    folder: Path, schedule: Schedule, model: Any, report_to: Sequence[str]
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulation,
        max_grad_norm=CLIP_NORM,
        save_strategy="steps",
        save_steps=schedule.save_steps,
        save_total_limit=2,
        logging_strategy="no",
        report_to=list(report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=schedule.seed,
        use_cpu=where().get("cpu", False),
        ddp_backend=where().get("backend"),
        dataloader_pin_memory=device() != "cpu",
        **_precision(schedule, model),
        average_tokens_across_devices=True,
        # Experts that no token of a batch went to have no gradient, nor what takes in images
        # between layers of text; to look for them costs time.
        ddp_find_unused_parameters=text_part(model) is not model
        or any(".experts." in name for name, _ in model.named_parameters()),
    )
    if arguments.n_gpu > 1:  # several GPUs are for several processes, not for DataParallel
        arguments._n_gpu = 1
    return arguments


def _precision(schedule: Schedule, model: Any) -> dict[str, bool]:
    """In which type a GPU computes, for TrainingArguments; float16 is scaled against underflow."""
    if device() == "cpu" or schedule.dtype == "float32" or uses_deepspeed():
        return {}
    if model.get_input_embeddings().weight.dtype == torch.float16:
        return {"fp16": True}
    return {"bf16": torch.cuda.is_bf16_supported()}


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """Out of memory said in the user's terms."""
    try:
        yield
    except torch.OutOfMemoryError as fault:
        raise LexigraftError(
            f"the GPU's memory is full ({str(fault).splitlines()[0]})",
            needed="room for one batch",
            fix="add --batch-size 1, or a smaller --block-size",
        ) from None
