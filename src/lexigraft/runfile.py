"""`run.json`: what has been done in a run folder, so that it can go on after a kill.

It holds times, so it is no part of what two runs must agree on byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lexigraft.errors import LexigraftError
from lexigraft.files import read_json, write_whole
from lexigraft.recipe import Recipe

RUN_FILE = "run.json"
# Where the base is trained without new words: on as much text, and with as much work.
CONTROLS = ("control/text/", "control/compute/")


def training_places(at: str, count: int) -> list[str]:
    """What the names of adapter and merged model begin with, of each of `count` stages in `at`.

    >>> training_places("", 2)
    ['stage1/', '']
    """
    return [*(f"{at}stage{place}/" for place in range(1, count)), at]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StageState(_Data):
    """A finished stage.

    Attributes:
        key: hash of everything that it was made from.
        output: hash of what it wrote; empty for stages that only measure.
        seconds: how long it took.
        result: what the verb returned.
    """

    key: str
    output: str
    seconds: float
    result: dict[str, Any]


class Running(_Data):
    """A stage that was begun: if it is found at the start of a run, the run was killed in it."""

    stage: str
    key: str


class RunState(_Data):
    """The content of `run.json`: the recipe, and the finished stages in their order."""

    format: Literal[1] = 1
    recipe: Recipe
    stages: dict[str, StageState] = {}
    running: Running | None = None

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage returned; empty if it is not done."""
        state = self.stages.get(stage)
        return state.result if state else {}

    def save(self, folder: Path) -> None:
        """Write `run.json` whole or not at all."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / RUN_FILE, text)

    @classmethod
    def read(cls, folder: Path) -> RunState | None:
        """The state of a run folder; None where no run was begun.

        Raises:
            LexigraftError: the file is damaged or of a newer format.
        """
        path = folder / RUN_FILE
        if not path.exists():
            return None
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as fault:
            first = fault.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise LexigraftError(
                f"{path}: {where}: {first['msg']}",
                needed="a run.json as lexigraft wrote it",
                fix="run the recipe again with --force, or with another -o",
            ) from None
