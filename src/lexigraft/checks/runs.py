"""The parts of a run folder, and what each of them was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lexigraft.errors import LexigraftError
from lexigraft.files import is_there
from lexigraft.runfile import CONTROLS, RUN_FILE, RunState, training_places


@dataclass(frozen=True)
class RunPart:
    """A folder that `run` wrote.

    Attributes:
        folder: where it lies.
        trained_on: for an adapter, the model that it was trained on; None for others, and where
            that model is not there.
    """

    folder: Path
    trained_on: Path | None = None


def run_parts(run: Path, state: RunState) -> tuple[Path | None, list[RunPart]]:
    """The base of a run, if it is a folder that is there, and the parts that are done, in order.

    Raises:
        LexigraftError: no part is done.
    """
    named = Path(state.recipe.base).expanduser()
    base = named if is_there(named) and named.is_dir() else None
    parts = [RunPart(run / name) for name in ("vocab", "model")]
    parts += _trained(run, "", len(state.recipe.stages), run / "model")
    for at in CONTROLS:
        parts += _trained(run, at, 1, base)
    done = [part for part in parts if part.folder.is_dir()]
    if not done:
        raise LexigraftError(
            f"{run} is a run of which nothing is done yet",
            needed=f"vocab, model, adapter or merged beside {RUN_FILE}",
            fix=f"lexigraft run RECIPE -o {run}, which goes on where it stopped",
        )
    return base, done


def _trained(run: Path, at: str, count: int, source: Path | None) -> Iterator[RunPart]:
    for place in training_places(at, count):
        on = source if source is not None and source.is_dir() else None
        source = run / f"{place}merged"
        yield from (RunPart(run / f"{place}adapter", on), RunPart(source))
