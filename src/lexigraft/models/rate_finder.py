"""`train --find-lr`: a few short runs from one start, told apart by held-out text.

The way of learning-rate range tests (Smith 2017, arXiv 1506.01186), with each rate in a run of its
own: rates that are tried one after another in the same run profit from what was learned before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lexigraft.console import note
from lexigraft.errors import LexigraftError, StoppedError
from lexigraft.models.new_rows import NewRows
from lexigraft.models.objectives import Objective
from lexigraft.models.packing import Blocks
from lexigraft.models.training import Monitor, Schedule, fit

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
# Short runs favour high rates, so the lowest one is recommended that gets so much of the best fall.
ENOUGH = 0.9

Measure = Callable[[], dict[str, float | None]]


@dataclass(frozen=True)
class Trial:
    """A short run: its rates, and bits per byte at its end; None where it diverged."""

    factor: float
    learning_rate: float
    new_row_learning_rate: float
    domain_bpb: float | None
    general_bpb: float | None


@dataclass(frozen=True)
class RateTable:
    """What a sweep found.

    Attributes:
        steps: of each trial.
        domain_bpb, general_bpb: before training.
        trials: by rate, the lowest first.
        recommended: the trial whose rates to take; None where none of them made text cheaper.
    """

    steps: int
    domain_bpb: float
    general_bpb: float | None
    trials: tuple[Trial, ...]
    recommended: Trial | None

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What a person reads."""
        found = [
            f"bits per byte after {self.steps:,} steps; before: domain {_bpb(self.domain_bpb)}, "
            f"general {_bpb(self.general_bpb)}",
            f"{'body':>10} {'new rows':>10} {'domain':>9} {'general':>9}",
        ]
        found += [
            f"{trial.learning_rate:10.2g} {trial.new_row_learning_rate:10.2g} "
            f"{_bpb(trial.domain_bpb):>9} {_bpb(trial.general_bpb):>9}"
            + ("  <- recommended" if trial == self.recommended else "")
            for trial in self.trials
        ]
        if self.recommended is None:
            return [*found, "none of these rates made the text cheaper: try lower ones"]
        if self.recommended == self.trials[-1]:
            found.append("the highest rate tried: look further up from there")
        return [
            *found,
            f"try: --learning-rate {self.recommended.learning_rate:.2g} "
            f"--new-row-learning-rate {self.recommended.new_row_learning_rate:.2g}",
        ]


def _bpb(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def sweep(
    model: Any,
    rows: NewRows | None,
    blocks: Blocks,
    schedule: Schedule,
    *,
    measure: Measure,
    objective: Callable[[], Objective],
) -> RateTable:
    """Train `model` for `schedule.steps` with each of `FACTORS` times its rates.

    Every run starts from the weights as they are, sees the same blocks, and runs through the whole
    schedule. At the end the weights are again what they were.

    Raises:
        LexigraftError: no text is held out to measure on.
    """
    before = measure()
    if before["domain_bpb"] is None:
        raise LexigraftError(
            "no document of the corpus is held out, so rates cannot be compared",
            needed="text that is measured and not trained on",
            fix="add --held-out FILE, or give a larger --corpus",
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().cpu().clone() for p in trained]
    trials = []
    for factor in FACTORS:
        rates = replace(
            schedule,
            learning_rate=schedule.learning_rate * factor,
            new_row_learning_rate=schedule.new_row_learning_rate * factor,
            old_row_learning_rate=schedule.old_row_learning_rate * factor,
            save_steps=schedule.steps,
            measure_at=frozenset({schedule.steps}),
        )
        with TemporaryDirectory() as folder:
            run = partial(
                fit, model, rows, blocks, rates, folder=Path(folder), trained_on=None,
                measure=measure, advance=_ignore, resume=False, untrained=before,
                objective=objective(),
            )  # fmt: skip
            after = _end_of(run, factor)
        trials.append(
            Trial(
                factor,
                rates.learning_rate,
                rates.new_row_learning_rate,
                after["domain_bpb"],
                after["general_bpb"],
            )
        )
        with torch.no_grad():
            for parameter, values in zip(trained, start, strict=True):
                parameter.copy_(values)
    return RateTable(
        schedule.steps,
        before["domain_bpb"],
        before["general_bpb"],
        tuple(trials),
        _recommended(trials, before["domain_bpb"]),
    )


def _recommended(trials: list[Trial], before: float) -> Trial | None:
    falls = [before - (before if t.domain_bpb is None else t.domain_bpb) for t in trials]
    if max(falls) <= 0:
        return None
    return next(t for t, fall in zip(trials, falls, strict=True) if fall >= ENOUGH * max(falls))


def _end_of(run: Callable[[], Monitor], factor: float) -> dict[str, float | None]:
    """What a run measured at its end; nothing if it diverged."""
    try:
        return run().progress.log[-1]
    except StoppedError:
        raise
    except LexigraftError as fault:
        note(f"at {factor:g} times the rates: {fault.found}")
        return {"domain_bpb": None, "general_bpb": None}


def _ignore(_: int) -> None:
    """`advance` where nobody is watching."""
