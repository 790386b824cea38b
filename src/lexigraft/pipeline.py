"""`run` and `demo`: all stages of a recipe, each skipped when nothing it depends on has changed.

A stage is keyed by the content hashes of its inputs and by its options. Stages write through
`files.publish`, so one that was killed has left nothing; the next run does it again, or continues
its training from the last checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

from lexigraft import __version__, families
from lexigraft.console import note
from lexigraft.corpus import held_out, read_documents, text_files
from lexigraft.data.demo import demo_recipe, write_demo_texts
from lexigraft.errors import LexigraftError
from lexigraft.files import LOCK_NAME, sha256_file, sha256_json
from lexigraft.hub import local_folder
from lexigraft.recipe import Recipe, TrainStage
from lexigraft.reporting import report
from lexigraft.reporting.facts import model_rows
from lexigraft.reporting.markdown import verdict
from lexigraft.reporting.tables import model_table, sample_lines
from lexigraft.runfile import RUN_FILE, Running, RunState, StageState

# Files whose bytes differ between two equal runs: times and logs.
_LOGS = ("training.json", "runs", "events.out.tfevents")


class _Result(Protocol):
    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its stages, and which of them were skipped."""

    output: Path
    state: RunState
    skipped: list[str]

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {
            "output": str(self.output),
            "skipped": self.skipped,
            "stages": {
                name: {"seconds": round(stage.seconds, 3), **stage.result}
                for name, stage in self.state.stages.items()
            },
        }

    def lines(self) -> list[str]:
        """What a person reads: the table, the samples and what to do next."""
        merged = self.output / "merged"
        return [
            *model_table(self.state),
            "",
            *verdict(model_rows(self.state)),
            "",
            *sample_lines(self.state),
            f"report: {self.output / 'report.md'}",
            "try it:",
            f'  python -c "from transformers import pipeline as p; '
            f"print(p('text-generation', '{merged}')('{_prompt(self.state)}', max_new_tokens=40)"
            "[0]['generated_text'])\"",
        ]


def _prompt(state: RunState) -> str:
    samples = state.result("samples").get("samples") or [{"text": "The"}]
    text = str(samples[0]["text"])
    return text[: max(1, len(text) // 2)].replace("'", " ")


@dataclass
class _Run:
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
        work: Callable[[bool], _Result],
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
        self, name: str, key: str, work: Callable[[bool], _Result], output: Path | None
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
                self.hashes[spec] = _folder_hash(spec)
            return self.hashes[spec]
        return sha256_json(sorted(sha256_file(path) for path in text_files(spec)) if spec else [])


def _folder_hash(folder: Path) -> str:
    """Hash of the names and contents of all files in `folder` that are no logs."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return sha256_json(
        {
            name.as_posix(): sha256_file(path)
            for name, path in sorted(files.items())
            if not any(part.startswith(_LOGS) for part in name.parts)
        }
    )


def run(recipe: str | Path, *, output: str | Path, force: bool = False) -> RunResult:
    """Run a recipe into the folder `output`; run again, it goes on where it stopped.

    Args:
        recipe: a YAML file, see docs/recipe.md.
        output: the run folder: vocab/, model/, adapter/, merged/, control/, run.json, report.md.
        force: start over.

    Raises:
        LexigraftError: a fault in the recipe or in one of its stages.
    """
    return _run(Recipe.read(Path(recipe)), Path(output), force=force)


def _run(recipe: Recipe, output: Path, *, force: bool = False) -> RunResult:
    with _opened(recipe, output, force=force) as current:
        _stages(current, recipe)
        report(output)
        return RunResult(output, current.state, current.skipped)


@contextmanager
def _opened(recipe: Recipe, output: Path, *, force: bool) -> Iterator[_Run]:
    """The run folder, new or as an earlier run left it, locked against a second run."""
    _require_run_folder(output)
    if force:
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / LOCK_NAME, timeout=0):
            state = RunState.read(output) or RunState(recipe=recipe)
            state.recipe = recipe
            yield _Run(output, state)
    except Timeout:
        raise LexigraftError(
            f"another run is at work in {output}",
            needed="one run at a time in a folder",
            fix="wait for it, or choose another -o",
        ) from None


def _require_run_folder(output: Path) -> None:
    """Stop before touching a folder that no run has made, whatever --force says."""
    if not output.exists():
        return
    names = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    if RUN_FILE not in names and names - {LOCK_NAME, "base", "texts", "recipe.yaml"}:
        raise LexigraftError(
            f"{output} exists and is no run folder (it has no {RUN_FILE})",
            needed="a new folder, or one of an earlier run",
            fix="choose another -o",
        )


def _stages(current: _Run, recipe: Recipe) -> None:
    base = local_folder(recipe.base)
    measured = _measured_texts(recipe)
    _grow(current, recipe, base)
    trained = _train(current, recipe, current.folder / "model", recipe.train.stages, at="")
    _check(current, trained)
    models = {"base": base, "grafted": current.folder / "model", "merged": trained}
    if recipe.control:
        models |= _controls(current, recipe, base)
    _evaluate(current, recipe, models, measured)
    _samples(current, recipe, base)


def _grow(current: _Run, recipe: Recipe, base: Path) -> None:
    """Learn and graft."""
    from lexigraft.steps.graft import graft
    from lexigraft.steps.learn import learn

    vocab, model = current.folder / "vocab", current.folder / "model"
    options: dict[str, Any] = {**recipe.learn.model_dump(), "seed": recipe.seed}
    texts: dict[str, Any] = {"corpus": recipe.corpus, "general": recipe.general}
    current.stage(
        "learn",
        options,
        {"base": base, **texts},
        lambda _: learn(base, **texts, **options, output=vocab, force=True),
        vocab,
    )
    options = {**recipe.graft.model_dump(), "seed": recipe.seed}
    current.stage(
        "graft",
        options,
        {"base": base, "vocab": vocab},
        lambda _: graft(base, vocab, **options, output=model, force=True),
        model,
    )


def _train(
    current: _Run, recipe: Recipe, source: Path, stages: Sequence[TrainStage], *, at: str
) -> Path:
    """Train and merge, once per stage; returns the last merged folder, `<at>merged`."""
    for place, stage in enumerate(stages, 1):
        last = place == len(stages)
        prefix = at if last else f"{at}stage{place}/"
        adapter = current.folder / f"{prefix}adapter"
        merged = current.folder / f"{prefix}merged"
        _train_once(current, recipe, source, stage, adapter, name=f"{prefix}train")
        _merge_once(current, source, adapter, merged, name=f"{prefix}merge")
        source = merged
    return source


def _train_once(
    current: _Run, recipe: Recipe, source: Path, stage: TrainStage, adapter: Path, *, name: str
) -> None:
    from lexigraft.steps.train import train

    options = {**stage.options(), "seed": recipe.seed}
    texts: dict[str, Any] = {
        "corpus": recipe.corpus,
        "general": recipe.general,
        "held_out": recipe.eval.corpus,
    }
    partial = adapter.with_name(f"{adapter.name}.partial")

    def work(killed: bool) -> _Result:
        if not killed:
            shutil.rmtree(partial, ignore_errors=True)
        resume = killed and partial.is_dir()
        adapter.parent.mkdir(parents=True, exist_ok=True)
        return train(source, **texts, **options, output=adapter, resume=resume, force=True)

    current.stage(name, options, {"model": source, **texts}, work, adapter)


def _merge_once(current: _Run, source: Path, adapter: Path, merged: Path, *, name: str) -> None:
    from lexigraft.steps.merge import merge

    current.stage(
        name,
        {},
        {"model": source, "adapter": adapter},
        lambda _: merge(source, [adapter], output=merged, force=True),
        merged,
    )


def _check(current: _Run, merged: Path) -> None:
    from lexigraft.steps.check import check

    result = current.stage("check", {}, {"merged": merged}, lambda _: check(merged))
    if not result["ok"]:
        first = next(f for f in result["findings"] if f["severity"] == "error")
        raise LexigraftError(
            f"{first['code']} {first['where']}: {first['found']}",
            needed=first["needed"],
            fix=f"lexigraft check {merged}",
        )


def _controls(current: _Run, recipe: Recipe, base: Path) -> dict[str, Path]:
    """The base trained in the same way, once on as much text and once for as many steps."""
    stages = [stage for stage in recipe.train.stages if stage.mode == "lora"]
    if not stages:
        note("no control: --mode rows has no new rows to train in the base")
        return {}
    done = [
        current.state.result(name)
        for name in current.state.stages
        if name.endswith("train") and not name.startswith("control/")
    ]
    same_text = _limited(stages[-1], max_bytes=sum(result["text_bytes"] for result in done))
    same_work = _limited(stages[-1], max_tokens=sum(result["tokens"] for result in done))
    return {
        "control, equal text": _train(current, recipe, base, [same_text], at="control/text/"),
        "control, equal compute": _train(current, recipe, base, [same_work], at="control/compute/"),
    }


def _limited(stage: TrainStage, **limit: int) -> TrainStage:
    """`stage` with this limit and no other."""
    none = {"max_bytes": None, "max_steps": None, "max_tokens": None}
    return stage.model_copy(update={**none, **limit})


@dataclass(frozen=True)
class _Json:
    """The result of a stage that is no verb, or of one that is told more."""

    content: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.content


def _measured_texts(recipe: Recipe) -> dict[str, list[str]]:
    """What the models are measured on, found out before anything is trained.

    Raises:
        LexigraftError: the recipe names no text to measure on, and its corpus is too small to
            hold any of its documents out.
    """
    texts = {
        "corpus": recipe.eval.corpus or recipe.corpus,
        "general": recipe.eval.general or recipe.general,
    }
    if recipe.eval.corpus:
        return texts
    if not any(map(held_out, read_documents(texts["corpus"]))):
        raise LexigraftError(
            f"no document of {', '.join(recipe.corpus)} is held out (there are too few)",
            needed="text of the field that is not trained on, to measure the result",
            fix="name such text in the recipe under eval: {corpus: [...]}",
        )
    if texts["general"] and not any(map(held_out, read_documents(texts["general"]))):
        note("no document of general is held out (there are too few): forgetting is not measured")
        texts["general"] = []
    return texts


def _evaluate(
    current: _Run,
    recipe: Recipe,
    models: Mapping[str, Path],
    texts: Mapping[str, list[str]],
) -> None:
    """All models at once: so the windows are the same for all of them."""
    from lexigraft.steps.evaluate import evaluate

    options: dict[str, Any] = {
        "held_out_only": not recipe.eval.corpus,
        "max_bytes": recipe.eval.max_bytes,
    }
    if recipe.eval.speed_characters is not None:
        options["speed_characters"] = recipe.eval.speed_characters

    def work(_: bool) -> _Json:
        result = evaluate(
            list(models.values()), corpus=texts["corpus"], general=texts["general"], **options
        )
        return _Json({"names": list(models), **result.to_json()})

    folders: dict[str, Path | Sequence[str]] = {**models, **texts}
    current.stage("evaluate", options, folders, work)


def _samples(current: _Run, recipe: Recipe, base: Path) -> None:
    vocab = current.folder / "vocab"

    def work(_: bool) -> _Json:
        old, new = families.load(base), families.load(vocab)
        found = [
            {"text": text, "before": _pieces(old, text), "after": _pieces(new, text)}
            for text in recipe.samples
        ]
        return _Json({"samples": found})

    current.stage("samples", {"texts": recipe.samples}, {"base": base, "vocab": vocab}, work)


def _pieces(family: families.Family, text: str) -> list[str]:
    """The pieces of a text; bytes that are no whole character are shown in hexadecimal."""
    pieces = []
    for token_id in family.encode(text):
        data = family.token_bytes(token_id)
        try:
            pieces.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            pieces.append("<" + data.hex().upper() + ">")
    return pieces


def demo(
    *,
    output: str | Path = "runs/demo",
    fast: bool = False,
    language: Literal["zh", "en"] = "zh",
    force: bool = False,
) -> RunResult:
    """Teach SmolLM2-135M the names of diseases, on a CPU in minutes.

    Writes base/, texts/ and recipe.yaml into the run folder, then runs that recipe.

    Args:
        output: the run folder.
        fast: less text and fewer steps, for continuous integration.
        language: `zh` for the Chinese names of ICD-10, `en` for the English ones of ICD-10-CM.
        force: start over.

    Raises:
        LexigraftError: the packages with the model or the names are not installed.
    """
    output = Path(output)
    _require_run_folder(output)
    if force:
        shutil.rmtree(output, ignore_errors=True)
    write_demo_texts(output / "texts", language)
    if not (output / "base").is_dir():
        from lexigraft.models.smollm import write_base

        note("== base")
        write_base(output / "base")
    recipe = output / "recipe.yaml"
    recipe.write_text(demo_recipe(language, fast=fast), "utf-8")
    return _run(Recipe.read(recipe), output)
