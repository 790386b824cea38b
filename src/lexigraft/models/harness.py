"""Tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2024, zenodo 12608602), on our models.

The harness is given the model that is loaded already, and the tokenizer as transformers reads it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lexigraft.console import is_watched
from lexigraft.errors import LexigraftError
from lexigraft.models.load import quiet_transformers

# Task -> metric -> value; a metric's standard error is `METRIC_stderr`.
Scores = dict[str, dict[str, float]]


class Harness:
    """Some tasks, found before any model is loaded."""

    def __init__(self, tasks: Sequence[str]) -> None:
        """Look the tasks up.

        Args:
            tasks: names, groups or patterns of the harness, or YAML files of tasks.

        Raises:
            LexigraftError: lm-eval is not installed, or does not know one of them.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise LexigraftError(
                "--tasks without lm-eval",
                needed="the package with the tasks",
                fix="pip install 'lexigraft[tasks]'",
            )
        with _aside():
            from lm_eval.tasks import TaskManager

            self._manager = TaskManager()
        self._tasks = [name for asked in tasks for name in self._found(asked)]

    def _found(self, asked: str) -> list[str]:
        if asked.endswith((".yaml", ".yml")) and Path(asked).is_file():
            return [asked]
        found: list[str] = self._manager.match_tasks([asked])
        if not found:
            near = difflib.get_close_matches(asked, self._manager.all_tasks, n=3)
            raise LexigraftError(
                f"--tasks {asked}: no task or group of that name",
                needed=f"one that lm-eval knows{': ' if near else ''}{', '.join(near)}",
                fix="lm-eval ls tasks, or name the YAML file of a task",
            )
        return found

    def scores(self, model: Any, folder: Path, *, trust_remote_code: bool = False) -> Scores:
        """What `model` scores in each task and group.

        Args:
            model: a causal language model, loaded.
            folder: where its tokenizer is.

        Raises:
            LexigraftError: a task cannot be run, as where its data set cannot be had.
        """
        from transformers import AutoTokenizer

        try:
            with _aside(), quiet_transformers():
                from lm_eval import simple_evaluate
                from lm_eval.models.huggingface import HFLM

                tokenizer = AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=trust_remote_code, local_files_only=True
                )
                size = 1 if model.device.type == "cpu" else "auto"
                wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
                told = simple_evaluate(
                    wrapped, tasks=self._tasks, task_manager=self._manager, log_samples=False
                )
        except Exception as fault:  # tasks run code of many libraries, and of their own
            said = " ".join(str(fault).split())[:300]
            raise LexigraftError(
                f"lm-eval could not run {', '.join(self._tasks)} on {folder} "
                f"({type(fault).__name__}: {said})",
                needed="tasks whose data can be had (the hub, unless they are on this disk)",
                fix="unset HF_HUB_OFFLINE, or name a task whose data is here",
            ) from None
        return {task: _metrics(values) for task, values in told["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Numbers by metric; the harness writes `METRIC,FILTER`, and `none` for no filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float)
    }


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """What the harness prints goes to standard error, where somebody looks at it, or nowhere."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - devnull is no path of a file
        place = sys.stderr if is_watched() else nowhere
        with contextlib.redirect_stdout(place), contextlib.redirect_stderr(place):
            yield
