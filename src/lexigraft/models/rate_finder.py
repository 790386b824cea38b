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
_OPTIONS = ("--learning-rate", "--new-row-learning-rate")

Measure = Callable[[], dict[str, float | None]]


@dataclass(frozen=True)
class Trial:
    """A short run: its rates, and bits per byte at its end; None where it diverged.

    A rate is None where it moves nothing: that of the body in mode `rows`, that of new rows in a
    model without any.
    """

    factor: float
    learning_rate: float | None
    new_row_learning_rate: float | None
    domain_bpb: float | None
    general_bpb: float | None

    @property
    def rates(self) -> dict[str, float | None]:
        """By what they move, in the order of `_OPTIONS`."""
        return {"body": self.learning_rate, "new rows": self.new_row_learning_rate}


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
        heads = [head for head, rate in self.trials[0].rates.items() if rate is not None]
        found = [
            f"bits per byte after {self.steps:,} steps; before: domain {_bpb(self.domain_bpb)}, "
            f"general {_bpb(self.general_bpb)}",
            "".join(f"{head:>10} " for head in heads) + f"{'domain':>9} {'general':>9}",
        ]
        found += [
            "".join(f"{trial.rates[head]:10.2g} " for head in heads)
            + f"{_bpb(trial.domain_bpb):>9} {_bpb(trial.general_bpb):>9}"
            + ("  <- recommended" if trial == self.recommended else "")
            for trial in self.trials
        ]
        if self.recommended is None:
            return [*found, "none of these rates made the text cheaper: try lower ones"]
        if self.recommended == self.trials[-1]:
            found.append("the highest rate tried: look further up from there")
        options = [
            f"{option} {rate:.2g}"
            for option, rate in zip(_OPTIONS, self.recommended.rates.values(), strict=True)
            if rate is not None
        ]
        return [*found, f"try: {' '.join(options)}"]


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
    has_body = len(trained) > len(rows.parameters if rows else ())
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
                rates.learning_rate if has_body else None,
                rates.new_row_learning_rate if rows else None,
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
