"""`OUT.partial`: where a training run works, so that a kill loses only the last steps."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lexigraft.console import note
from lexigraft.errors import LexigraftError
from lexigraft.files import LOCK_NAME, make_folder, read_json, write_json

PLAN_FILE = "plan.json"
CHECKPOINTS = "checkpoints"


def partial_of(output: Path) -> Path:
    """`OUT.partial`."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def unfinished(output: Path, plan: dict[str, Any], *, resume: bool, force: bool) -> Iterator[Path]:
    """`OUT.partial`, locked: new, or that of the run which `resume` continues.

    It outlives a failure once it holds a checkpoint, and is removed at the end.

    Raises:
        LexigraftError: a run works there, or an unfinished one is neither resumed nor replaced,
            or the one to resume had another plan.
    """
    folder = partial_of(output)
    make_folder(folder)
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LexigraftError(
            f"another run is working in {folder}",
            needed="one run at a time",
            fix="wait for it, or choose another -o",
        ) from None
    try:
        _enter(folder, plan, resume=resume, force=force)
        yield folder
    except BaseException:
        lock.release(force=True)
        if last_checkpoint(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            note(f"what was trained is kept in {folder}")
        raise
    lock.release()
    shutil.rmtree(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of an unfinished run; Trainer writes its state last."""
    found = []
    for path in (folder / CHECKPOINTS).glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append((step_of(path), path))
    return max(found, default=(0, None))[1]


def step_of(checkpoint: Path) -> int:
    """After which step a checkpoint was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return int(state["global_step"])


def _enter(folder: Path, plan: dict[str, Any], *, resume: bool, force: bool) -> None:
    """Leave `folder` with this plan, and with checkpoints only if they are to be continued."""
    if last_checkpoint(folder) is not None and not resume and not force:
        raise LexigraftError(
            f"{folder} holds an unfinished run",
            needed="to know whether it is still wanted",
            fix="add --resume to continue it, or --force to start again",
        )
    if resume and last_checkpoint(folder) is not None:
        _require_same(read_json(folder / PLAN_FILE), plan)
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    write_json(folder / PLAN_FILE, plan)


def _require_same(before: dict[str, Any], plan: dict[str, Any]) -> None:
    old = {**before.get("settings", {}), **before}
    new = {**plan["settings"], **plan}
    # What a model is comes before what follows from it: blocks of another size, for example.
    keys = [key for key in {**plan, **before, **new, **old} if key != "settings"]
    key = next((key for key in keys if old.get(key) != new.get(key)), None)
    if key is None:  # a setting that the run did not know yet is not used by this one either
        return
    raise LexigraftError(
        f"the unfinished run had {key} {old.get(key)}, this one has {new.get(key)}",
        needed="the same model, texts and settings to continue it",
        fix="run the same command again with --resume, or --force to start anew",
    )
