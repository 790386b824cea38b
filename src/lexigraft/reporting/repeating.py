"""What is needed to do a run again: its recipe, the same as single commands, and versions."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lexigraft import __version__
from lexigraft.manifest import Manifest
from lexigraft.recipe import Recipe, TrainStage
from lexigraft.runfile import RunState

# Options of a stage of training that a recipe has and the command line has not.
_RECIPE_ONLY = ("lora_alpha", "measured_bytes")


def repetition(state: RunState, folder: Path, manifest: Manifest | None) -> dict[str, Any]:
    """`recipe` (YAML), `commands` (one per line, after the recipe's own), `versions`."""
    recipe = state.recipe
    return {
        "recipe": yaml.safe_dump(
            recipe.model_dump(exclude_defaults=True, exclude_none=True),
            allow_unicode=True,
            sort_keys=False,
        ),
        "run": _command("run", "recipe.yaml", output=folder),
        "commands": list(_commands(recipe, folder)),
        "versions": versions_of(manifest),
    }


def versions_of(manifest: Manifest | None) -> dict[str, str]:
    """What a model was made with, by package; of several versions the last one."""
    found: dict[str, str] = {}
    for record in manifest.records if manifest else ():
        found |= record.versions
    return {"python": platform.python_version(), "lexigraft": __version__, **found}


def _commands(recipe: Recipe, folder: Path) -> Iterator[str]:
    """The verbs that the recipe stands for, without its controls."""
    seed: dict[str, Any] = {"seed": recipe.seed or None}
    texts: dict[str, Any] = {"corpus": recipe.corpus, "general": recipe.general}
    learn, graft = recipe.learn, recipe.graft
    speed: dict[str, Any] = {
        "engine": learn.engine if learn.engine != "local" else None,
        "workers": learn.workers,
    }
    lists: dict[str, Any] = {"contrast": learn.contrast, **learn.word_lists}
    yield _command(
        "learn", recipe.base, **texts, **lists, **learn.choices, **speed, **seed,
        output=folder / "vocab",
    )  # fmt: skip
    given: dict[str, Any] = {**graft.choices, "init_from": graft.init_from, "donor": graft.donor}
    model = folder / "model"
    yield _command("graft", recipe.base, folder / "vocab", **given, **seed, output=model)
    for place, stage in enumerate(recipe.stages, 1):
        at = folder if place == len(recipe.stages) else folder / f"stage{place}"
        whole = stage.mode == "full"
        trained = at / ("merged" if whole else "adapter")
        options = {**_options(stage), "held_out": recipe.eval.corpus, "base": recipe.base, **seed}
        yield _command("train", model, **texts, **options, output=trained)
        if not whole:
            yield _command("merge", model, trained, output=at / "merged")
        model = at / "merged"
    yield _command("check", model)
    measured: dict[str, Any] = {
        "corpus": recipe.eval.corpus or recipe.corpus,
        "general": recipe.eval.general or recipe.general,
        "held_out_only": not recipe.eval.corpus,
        "max_bytes": recipe.eval.max_bytes,
        "speed_characters": recipe.eval.speed_characters,
    }
    yield _command("eval", recipe.base, folder / "model", model, **measured)


def _options(stage: TrainStage) -> Mapping[str, Any]:
    return {key: value for key, value in stage.options().items() if key not in _RECIPE_ONLY}


def _command(verb: str, *arguments: str | Path, output: Path | None = None, **options: Any) -> str:
    """A command line, quoted for a shell; options of None, False or nothing are left out."""
    words = ["lexigraft", verb, *map(str, arguments)]
    for key, value in options.items():
        values: Sequence[Any] = value if isinstance(value, list) else [value]
        for one in values:
            name = f"--{key.replace('_', '-')}"
            if one is True:
                words.append(name)
            elif one is not None and one is not False:
                words += [name, str(one)]
    return shlex.join([*words, *(["-o", str(output)] if output else [])])
