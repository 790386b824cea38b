"""The stages of a run folder: each done once, skipped while nothing it depends on has changed.

A stage is keyed by the content hashes of its inputs and by its options. Stages write through
`files.publish`, so one that was killed has left nothing; the next run does it again, or is told
that it may continue.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from lexigraft import __version__
from lexigraft.console import note
from lexigraft.corpus import sources
from lexigraft.errors import LexigraftError
from lexigraft.files import CARD, LOCK_NAME, sha256_file, sha256_json
from lexigraft.recipe import Recipe
from lexigraft.runfile import RUN_FILE, Running, RunState, StageState

# Files that no stage depends on: times and logs, which differ between equal runs, and cards, which
# are written when all stages are done.
_LOGS = ("training.json", "runs", "events.out.tfevents", CARD)


class Result(Protocol):
    """What a stage returns."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, kept in run.json."""


@dataclass
class Run:
    """A run in progress."""

    folder: Path
    state: RunState
    skipped: list[str] = field(default_factory=list)
    hashes: dict[Path, str] = field(default_factory=dict)

    def stage(
        self,
        name: str,
        options: Mapping[str, Any],
        inputs: Mapping[str, Path | Sequence[str]],
        work: Callable[[bool], Result],
        output: Path | None = None,
    ) -> dict[str, Any]:
        """Do a stage unless it is done, and return its result.

        Args:
            name: its key in run.json.
            options: what it was asked to do.
            inputs: folders, or lists of text specs, whose content it depends on.
            work: does it; told whether it was killed before and may go on where it was.
            output: the folder it writes, if any.
        """
        key = sha256_json(
            {
                "stage": name,
                "lexigraft": __version__,
                "options": options,
                "inputs": {label: self.hash_of(spec) for label, spec in inputs.items()},
            }
        )
        done = self.state.stages.get(name)
        if done and done.key == key and (output is None or self._is(output, done.output)):
            self.skipped.append(name)
            return done.result
        return self._do(name, key, work, output)

    def _do(
        self, name: str, key: str, work: Callable[[bool], Result], output: Path | None
    ) -> dict[str, Any]:
        killed = self.state.running == Running(stage=name, key=key)
        self.state.running = Running(stage=name, key=key)
        self.state.save(self.folder)
        note(f"== {name}")
        start = time.monotonic()
        result = work(killed).to_json()
        seconds = time.monotonic() - start
        if output is not None:
            self.hashes.pop(output, None)
        written = self.hash_of(output) if output is not None else ""
        self.state.stages.pop(name, None)
        self.state.stages[name] = StageState(
            key=key, output=written, seconds=round(seconds, 3), result=result
        )
        self.state.running = None
        self.state.save(self.folder)
        return result

    def _is(self, output: Path, wanted: str) -> bool:
        return output.is_dir() and self.hash_of(output) == wanted

    def hash_of(self, spec: Path | Sequence[str]) -> str:
        """Content hash of a folder, or of the texts that some specs name."""
        if isinstance(spec, Path):
            if spec not in self.hashes:
                self.hashes[spec] = folder_hash(spec)
            return self.hashes[spec]
        texts = sources(spec) if spec else []
        return sha256_json([[text.sha256, text.weight, text.column] for text in texts])


def folder_hash(folder: Path) -> str:
    """Hash of the names and contents of all files in `folder` that are no logs."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return sha256_json(
        {
            name.as_posix(): sha256_file(path)
            for name, path in sorted(files.items())
            if not any(part.startswith(_LOGS) for part in name.parts)
        }
    )


@contextmanager
def opened(recipe: Recipe, output: Path, *, force: bool) -> Iterator[Run]:
    """The run folder, new or as an earlier run left it, locked against a second run."""
    require_run_folder(output)
    if force:
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / LOCK_NAME, timeout=0):
            state = RunState.read(output) or RunState(recipe=recipe)
            if state.recipe != recipe:
                state.recipe = recipe
                state.save(output)
            yield Run(output, state)
    except Timeout:
        raise LexigraftError(
            f"another run is at work in {output}",
            needed="one run at a time in a folder",
            fix="wait for it, or choose another -o",
        ) from None


def require_run_folder(output: Path) -> None:
    """Stop before touching a folder that no run has made, whatever --force says."""
    if not output.exists():
        return
    names = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    begun = {LOCK_NAME, f"{RUN_FILE}.partial", "base", "texts", "recipe.yaml"}
    if RUN_FILE not in names and names - begun:
        raise LexigraftError(
            f"{output} exists and is no run folder (it has no {RUN_FILE})",
            needed="a new folder, or one of an earlier run",
            fix="choose another -o",
        )
