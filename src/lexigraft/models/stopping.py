"""Stopping early, and going back to the best measurement.

Whether to stop, and which measurement was the best, are functions of the log of measurements, which
is saved with every checkpoint: a resumed run stops where the uninterrupted one does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lexigraft.console import is_first_process
from lexigraft.errors import LexigraftError
from lexigraft.files import fsync_tree, replace_folder

Log = Sequence[Mapping[str, float | None]]
_KEPT = 2  # best states on disk: one more than the last checkpoint may know of


@dataclass(frozen=True)
class StopRule:
    """When a training is over before its last step.

    Attributes:
        patience: after so many measurements without a new best; None for never.
        general_limit: at a measurement whose general bits per byte are this share above
            `general`, unless they began there and have fallen since: a graft may cost more at
            first, and training lead back; None for never.
        general: those of the base; None where they are unknown, and before training counts.
    """

    patience: int | None = None
    general_limit: float | None = None
    general: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether anything can stop the training, and so a best state is kept."""
        return self.patience is not None or self.general_limit is not None

    def exceeds(self, log: Log, place: int) -> bool:
        """Whether general text had got worse at a measurement than the limit allows."""
        found = log[place]["general_bpb"]
        before = log[0]["general_bpb"] if self.general is None else self.general
        if self.general_limit is None or before is None or found is None:
            return False
        return found > before * (1 + self.general_limit)

    def best(self, log: Log) -> int:
        """The place of the best measurement after the first step.

        The lowest domain bits per byte within the general limit; if none is within it, the lowest
        general ones. Of equals, the first.
        """

        def worth(place: int) -> tuple[bool, float]:
            beyond = self.exceeds(log, place)
            figure = log[place]["general_bpb" if beyond else "domain_bpb"]
            return beyond, float("inf") if figure is None else figure

        return min(range(1, len(log)), key=worth) if self.is_set else len(log) - 1

    def reason(self, log: Log) -> str | None:
        """Why the training stops at the last measurement; None where it goes on."""
        if not self.is_set or len(log) < 2:
            return None
        if self.exceeds(log, len(log) - 1) and not self._comes_back(log):
            return f"general text got worse by more than {self.general_limit:.1%}"
        without = len(log) - 1 - self.best(log)
        if self.patience is not None and without >= self.patience:
            return f"{without} measurements without a better one"
        return None

    def _comes_back(self, log: Log) -> bool:
        """Whether general text has been beyond the limit all along, and less so than at first."""
        first, last = log[0]["general_bpb"] or 0.0, log[-1]["general_bpb"] or 0.0
        return last < first and all(self.exceeds(log, place) for place in range(len(log)))

    def require_texts(self, *, domain: bool, general: bool) -> None:
        """Raise where what the rule looks at is not measured for want of text.

        Raises:
            LexigraftError: it names the text that is missing.
        """
        for option, is_set, measured, text in (
            ("--patience", self.patience is not None, domain, "--held-out"),
            ("--general-limit", self.general_limit is not None, general, "--general"),
        ):
            if is_set and not measured:
                raise LexigraftError(
                    f"{option} without text to measure on",
                    needed=f"{text} text of which something is held out",
                    fix=f"add {text} FILE, or leave out {option}",
                )


class BestKept(TrainerCallback):  # type: ignore[misc]
    """Saves the state of each new best measurement, and stops the Trainer by a rule."""

    def __init__(
        self, rule: StopRule, log: Callable[[], Log], folder: Path, save: Callable[[Path], None]
    ) -> None:
        """Keep states in `folder`, written by `save`; `log` is what has been measured so far.

        Every process calls `save`, which writes in the first one.

        It stands behind the callback that measures.
        """
        self._rule, self._log, self._folder, self._save = rule, log, folder, save

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at a measurement that was just taken."""
        log = self._log()
        if log[-1]["step"] != state.global_step:
            return
        if self._rule.best(log) == len(log) - 1:
            self._keep(state.global_step)
        if self._rule.reason(log) is not None:
            control.should_training_stop = True

    def _keep(self, step: int) -> None:
        place = best_state(self._folder, step)
        partial = place.with_name(f"{place.name}.partial")
        if is_first_process():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._save(partial)
        if not is_first_process():
            return
        fsync_tree(partial)
        shutil.rmtree(place, ignore_errors=True)
        replace_folder(partial, place)
        steps = sorted(
            int(path.name[5:]) for path in self._folder.glob("step-*") if path.name[5:].isdigit()
        )
        later = [found for found in steps if found > step]  # of a run that was killed after it
        for found in [*[found for found in steps if found <= step][:-_KEPT], *later]:
            shutil.rmtree(best_state(self._folder, found))


def best_state(folder: Path, step: int) -> Path:
    """Where the state of a step is kept."""
    return folder / f"step-{step}"
