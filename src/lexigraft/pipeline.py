"""What joins steps: `run` and `demo` (all of them), and `graft --init distill`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lexigraft import families
from lexigraft.console import note
from lexigraft.corpus import held_out, read_documents, text_files
from lexigraft.data.demo import demo_recipe, write_demo_texts
from lexigraft.errors import LexigraftError, RefusalError, StoppedError
from lexigraft.families.tokenmap import readable
from lexigraft.files import (
    CARD,
    disk_faults,
    refuse_existing,
    refuse_overwriting,
    scratch,
    sha256_file,
)
from lexigraft.hub import local_folder
from lexigraft.models.gguf_base import gguf_file
from lexigraft.models.unfinished import partial_of
from lexigraft.recipe import Recipe, TrainStage
from lexigraft.reporting import report
from lexigraft.reporting.card import MEASURED, card, is_own
from lexigraft.reporting.facts import model_rows
from lexigraft.reporting.markdown import verdict
from lexigraft.reporting.tables import model_table, sample_lines, training_lines
from lexigraft.runfile import CONTROLS, RunState, training_places
from lexigraft.stages import Result, Run, opened, require_run_folder

if TYPE_CHECKING:
    from lexigraft.steps.graft import GraftResult
    from lexigraft.steps.train import TrainResult


# What a token of a distillation costs, of one through the whole body and back: a quarter of the
# layers in each pass, and in the first the teacher's forward pass over more, shorter ids.
PASS_WORK, TEACHER_WORK = 0.25, 0.8


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
            *training_lines(self.state),
            "",
            *sample_lines(self.state),
            f"report: {self.output / 'report.html'}",
            "try it:",
            f'  python -c "from transformers import pipeline as p; '
            f"print(p('text-generation', '{merged}')('{_prompt(self.state)}', max_new_tokens=40)"
            "[0]['generated_text'])\"",
        ]


def _prompt(state: RunState) -> str:
    samples = state.result("samples").get("samples") or [{"text": "The"}]
    text = str(samples[0]["text"])
    return text[: max(1, len(text) // 2)].replace("'", " ")


def run(recipe: str | Path, *, output: str | Path, force: bool = False) -> RunResult:
    """Run a recipe into the folder `output`; run again, it goes on where it stopped.

    Args:
        recipe: a YAML file, see docs/recipe.md.
        output: the run folder: vocab/, model/, adapter/, merged/, control/, run.json, report.html.
        force: start over.

    Raises:
        LexigraftError: a fault in the recipe or in one of its stages.
    """
    return _run(Recipe.read(Path(recipe)), Path(output), force=force)


def _run(recipe: Recipe, output: Path, *, force: bool = False) -> RunResult:
    from lexigraft.models.processes import process_count

    if process_count() > 1:
        raise RefusalError(
            f"{process_count()} processes that each run the whole recipe",
            needed="one process",
            fix="launch `lexigraft train` alone in several processes",
        )
    with disk_faults(output), opened(recipe, output, force=force) as current:
        _stages(current, recipe)
        report(output)
        _cards(output)
        return RunResult(output, current.state, current.skipped)


def _cards(output: Path) -> None:
    """A card for each model that people go on with; one that was edited stays."""
    for name in MEASURED:
        folder = output / name
        if folder.is_dir() and (is_own(folder / CARD) or not (folder / CARD).exists()):
            card(folder)


def _stages(current: Run, recipe: Recipe) -> None:
    base = local_folder(recipe.base)
    measured = _measured_texts(recipe)
    _grow(current, recipe, base)
    trained = _train(current, recipe, current.folder / "model", recipe.stages, at="")
    _check(current, trained)
    models = {"base": base, "grafted": current.folder / "model", "merged": trained}
    if recipe.control:
        models |= _controls(current, recipe, base)
    _evaluate(current, recipe, models, measured)
    _samples(current, recipe, base)


def _grow(current: Run, recipe: Recipe, base: Path) -> None:
    """Learn and graft."""
    from lexigraft.steps.graft import graft
    from lexigraft.steps.learn import learn

    vocab, model = current.folder / "vocab", current.folder / "model"
    part = recipe.learn
    options: dict[str, Any] = {**part.choices, "seed": recipe.seed}
    texts: dict[str, Any] = {
        "corpus": recipe.corpus,
        "general": recipe.general,
        "contrast": part.contrast,
    }
    lists: dict[str, Any] = part.word_lists
    speed: dict[str, Any] = {"engine": part.engine, "workers": part.workers}
    current.stage(
        "learn",
        {**options, "lists": {name: _hashes(specs) for name, specs in lists.items()}},
        {"base": base, **texts},
        lambda _: learn(base, **texts, **lists, **options, **speed, output=vocab, force=True),
        vocab,
    )
    started = recipe.graft
    options = {**started.choices, "seed": recipe.seed}
    listed = [started.init_from] if started.init_from else []
    donor = local_folder(started.donor) if started.donor else None
    current.stage(
        "graft",
        {**options, "init_from": _hashes(listed)},
        {"base": base, "vocab": vocab, **({"donor": donor} if donor else {})},
        lambda _: graft(
            base,
            vocab,
            **options,
            init_from=started.init_from,
            donor=donor,
            output=model,
            force=True,
        ),
        model,
    )


def _hashes(lists: Sequence[str]) -> list[list[str]]:
    """What decides how each word list is read: its name, content hash and column.

    Lists have forms that no text has (a SentencePiece model), so they are no texts of a stage. One
    that is not there has no hash: `learn` says so.
    """
    found = []
    for spec in lists:
        name, _, column = (spec, "", "") if Path(spec).exists() else spec.partition("#column=")
        path = Path(name)
        found.append([path.name, sha256_file(path) if path.is_file() else "", column])
    return found


def _train(
    current: Run, recipe: Recipe, source: Path, stages: Sequence[TrainStage], *, at: str
) -> Path:
    """Train and merge, once per stage; returns the last merged folder, `<at>merged`.

    A stage of mode `full` trains a whole model, so there is nothing to merge. Stages with a share
    of the text read on where the one before them ended.
    """
    read = 0.0
    for stage, prefix in zip(stages, training_places(at, len(stages)), strict=True):
        adapter = current.folder / f"{prefix}adapter"
        merged = current.folder / f"{prefix}merged"
        options = {**stage.options(), "seed": recipe.seed}
        if stage.share is not None:
            options["share"] = [read, read + stage.share]
            read += stage.share
        if stage.mode == "full":
            _train_once(current, recipe, source, options, merged, name=f"{prefix}train")
        else:
            _train_once(current, recipe, source, options, adapter, name=f"{prefix}train")
            _merge_once(current, source, adapter, merged, name=f"{prefix}merge")
        source = merged
    return source


def _train_once(
    current: Run,
    recipe: Recipe,
    source: Path,
    options: Mapping[str, Any],
    output: Path,
    *,
    name: str,
) -> None:
    from lexigraft.steps.train import train

    texts: dict[str, Any] = {
        "corpus": recipe.corpus,
        "general": recipe.general,
        "held_out": recipe.eval.corpus,
    }
    base = local_folder(recipe.base)
    partial = partial_of(output)

    def work(killed: bool) -> Result:
        if not killed:
            shutil.rmtree(partial, ignore_errors=True)
        resume = killed and partial.is_dir()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            return train(
                source, **texts, **options, base=base, output=output, resume=resume, force=True
            )
        except StoppedError as stopped:  # a run needs no --resume, and has none
            raise StoppedError(
                stopped.found,
                needed=stopped.needed,
                fix="run the same command again: it goes on from there",
            ) from None

    current.stage(name, options, {"model": source, "base": base, **texts}, work, output)


def _merge_once(current: Run, source: Path, adapter: Path, merged: Path, *, name: str) -> None:
    from lexigraft.steps.merge import merge

    current.stage(
        name,
        {},
        {"model": source, "adapter": adapter},
        lambda _: merge(source, [adapter], output=merged, force=True),
        merged,
    )


def _check(current: Run, merged: Path) -> None:
    from lexigraft.steps.check import check, first_error

    result = current.stage("check", {}, {"merged": merged}, lambda _: check(merged))
    fault = first_error(result, f"lexigraft check {merged}")
    if fault is not None:
        raise fault


def _controls(current: Run, recipe: Recipe, base: Path) -> dict[str, Path]:
    """The base trained in the same way, once on as much text and once with as much work.

    A distillation reads the text that is trained on later, so it adds work and no text.
    """
    stages = [s for s in recipe.stages if s.mode != "rows" and s.objective != "distill"]
    if not stages:
        note("no control: a base without new words has no rows to train and nothing to distil")
        return {}
    done = [
        current.state.result(name)
        for name in current.state.stages
        if name.endswith("train") and not name.startswith("control/")
    ]
    learned = list(zip(recipe.stages, done, strict=True))
    text = sum(result["text_bytes"] for stage, result in learned if stage.objective != "distill")
    work = sum(result["tokens"] * _work(stage) for stage, result in learned)
    same_text = _limited(stages[-1], max_bytes=text)
    same_work = _limited(stages[-1], max_tokens=round(work))
    text_at, work_at = CONTROLS
    return {
        "control, equal text": _train(current, recipe, base, [same_text], at=text_at),
        "control, equal compute": _train(current, recipe, base, [same_work], at=work_at),
    }


def _work(stage: TrainStage) -> float:
    """What a token costs in a stage, of one through the whole body and back."""
    from lexigraft.models.settings import DISTILL_PASSES

    if stage.objective != "distill":
        return 1.0
    return PASS_WORK + TEACHER_WORK / (stage.passes or DISTILL_PASSES)


def _limited(stage: TrainStage, **limit: int) -> TrainStage:
    """`stage` with this limit and no other."""
    none = {"max_bytes": None, "max_steps": None, "max_tokens": None, "share": None}
    return stage.model_copy(update={**none, **limit})


@dataclass(frozen=True)
class DistilledGraft:
    """A grafted model whose new rows have learned from its own reading of a text.

    Attributes:
        graft: what `graft` did; its output is the whole one's.
        train: what `train --mode rows --objective distill` did.
    """

    graft: GraftResult
    train: TrainResult

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`: that of `graft`, with that of `train` in it."""
        train = {key: value for key, value in self.train.to_json().items() if key != "output"}
        return {
            **self.graft.to_json(),
            "init": f"{self.graft.init}, distilled",
            "train": train,
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        *grafted, where = self.graft.lines()
        _, *learned = self.train.lines()  # without the folder of an adapter that is gone
        return [*grafted, *learned, where]


def graft_distilled(
    base: str | Path,
    vocab: str | Path,
    *,
    corpus: Sequence[str | Path],
    output: str | Path,
    general: Sequence[str | Path] = (),
    max_bytes: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    force: bool = False,
    **graft_options: Any,
) -> DistilledGraft:
    """`graft`, then `train --mode rows --objective distill` on `corpus`, then `merge`: one folder.

    Args:
        corpus, general, max_bytes: the text, as for `train`.
        graft_options: other keyword arguments of `graft`.

    Raises:
        LexigraftError, RefusalError: as these three.
    """
    from lexigraft.steps.graft import graft
    from lexigraft.steps.merge import merge
    from lexigraft.steps.train import train

    output = Path(output)
    refuse_existing(output, force=force)
    texts = [path for specs in (corpus, general) for path in text_files(specs)]
    base = gguf_file(Path(base).expanduser()) or local_folder(base)
    refuse_overwriting(output, [base, local_folder(vocab), *texts])
    with scratch(output) as folder:
        grafted = graft(base, vocab, output=folder / "model", seed=seed, **graft_options)
        trained = train(
            folder / "model",
            corpus=corpus,
            general=general,
            output=folder / "adapter",
            mode="rows",
            objective="distill",
            max_bytes=max_bytes,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        merge(folder / "model", [folder / "adapter"], output=output, force=force)
    return DistilledGraft(replace(grafted, output=output), trained)


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
    from lexigraft.models.reading import held_out_general  # imports torch

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
    if texts["general"] and not held_out_general(texts["general"]):
        note(
            "nothing of general is held out (there is too little), so it is not measured; name "
            "such text in the recipe under eval: {general: [...]}"
        )
        texts["general"] = []
    return texts


def _evaluate(
    current: Run,
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


def _samples(current: Run, recipe: Recipe, base: Path) -> None:
    vocab = current.folder / "vocab"

    def work(_: bool) -> _Json:
        old, new = families.load(base), families.load(vocab)

        def pieces(family: families.Family, text: str) -> list[str]:
            return [readable(family.token_bytes(token)) for token in family.encode(text)]

        found = [
            {"text": text, "before": pieces(old, text), "after": pieces(new, text)}
            for text in recipe.samples
        ]
        return _Json({"samples": found})

    current.stage("samples", {"texts": recipe.samples}, {"base": base, "vocab": vocab}, work)


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
    require_run_folder(output)
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
