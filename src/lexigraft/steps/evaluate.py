"""`eval`: models side by side on the same text, fairly across tokenizers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

from lexigraft import families
from lexigraft.console import progress, working
from lexigraft.corpus import held_out, read_documents
from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.families.measure import new_ids
from lexigraft.hub import local_folder
from lexigraft.models.bits import (
    Score,
    SpareShare,
    fitting_window,
    require_next_token,
    score,
    up_to,
    windows,
)
from lexigraft.models.harness import Harness, Scores
from lexigraft.models.load import (
    context_limit,
    load_model,
    require_row,
    start_and_end,
)
from lexigraft.models.reading import held_out_general

# Of the probability: what ids without a token may take before a reader is told.
SAFE = 1e-6
_WARM_UP = 3  # decoding steps that are not timed


@dataclass(frozen=True)
class ModelScore:
    """One model: what it makes of the texts.

    Attributes:
        adoption: share of new tokens among the tokens of the domain text.
        without_text: mean share of the probability that ids without a token (padding rows) take
            in the domain text: such an id is sampled so often, and decodes to nothing.
        characters_per_second: domain characters written per second of greedy decoding with a
            cache, batch 1 (see `writing_speed`); None where it was not measured.
        tasks: task of lm-evaluation-harness -> metric -> value; empty where none was asked for.
    """

    path: str
    domain: Score
    general: Score | None
    adoption: float
    without_text: float
    characters_per_second: float | None
    tasks: Scores

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            "path": self.path,
            "domain": _score_json(self.domain),
            "general": _score_json(self.general) if self.general else None,
            "adoption": self.adoption,
            "without_text": self.without_text,
            "characters_per_second": self.characters_per_second,
            "tasks": self.tasks,
        }


def _score_json(found: Score) -> dict[str, Any]:
    return {"bpb": found.bpb, "tokens": found.tokens, "bytes": found.bytes}


@dataclass(frozen=True)
class EvalResult:
    """All models, in the order given.

    Attributes:
        window_bytes: the size of the windows in which the text was scored.
    """

    models: tuple[ModelScore, ...]
    window_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "models": [model.to_json() for model in self.models],
            "window_bytes": self.window_bytes,
        }

    def lines(self) -> list[str]:
        """A table, one model per line; below it a line per model for each task's metrics."""
        width = max(5, *(len(model.path) for model in self.models))
        head = f"{'model':{width}}  domain bpb  general bpb  tokens/byte  new tokens  characters/s"
        unsafe = [model for model in self.models if model.without_text > SAFE]
        rows = [_line(model, width) for model in self.models]
        rows += [
            f"{model.path}: ids without a token take {model.without_text:.1e} of the "
            "probability, and decode to nothing"
            for model in unsafe
        ]
        for task, metrics in self.models[0].tasks.items():
            for metric in metrics:
                if not _is_error(metric):
                    rows += ["", f"{task}: {metric}"]
                    rows += [_task_line(model, width, task, metric) for model in self.models]
        return [head, *rows]


def _is_error(metric: str) -> bool:
    """Whether it is the standard error of another one (`acc_stderr`, `acc_stderr,FILTER`)."""
    return metric.partition(",")[0].endswith("_stderr")


def _task_line(model: ModelScore, width: int, task: str, metric: str) -> str:
    name, _, way = metric.partition(",")
    found = model.tasks[task]
    error = found.get(f"{name}_stderr" + (f",{way}" if way else ""))
    shown = f"{model.path:{width}}  {found[metric]:10.4f}"
    return shown if error is None else f"{shown}  ± {error:.4f}"


def _line(model: ModelScore, width: int) -> str:
    general = f"{model.general.bpb:11.4f}" if model.general else f"{'-':>11}"
    speed = model.characters_per_second
    return (
        f"{model.path:{width}}  {model.domain.bpb:10.4f}  {general}  "
        f"{model.domain.tokens / model.domain.bytes:11.4f}  {model.adoption:10.1%}  "
        + (f"{speed:12.1f}" if speed is not None else f"{'-':>12}")
    )


@working("evaluating")
def evaluate(
    models: Sequence[str | Path],
    *,
    corpus: Sequence[str | Path],
    general: Sequence[str | Path] = (),
    held_out_only: bool = False,
    max_bytes: int | None = None,
    window_bytes: int = 1024,
    speed_characters: int = 200,
    tasks: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> EvalResult:
    """Bits per byte, tokens per byte, adoption of new tokens and speed of each model.

    Every byte is scored once; windows are cut at the same byte offsets for all models, after a
    line break or before white space; a window's first token is predicted from what the
    tokenizer puts before a text, else from the end-of-text token.

    Args:
        corpus, general: texts of the field, and texts in which nothing should get worse.
        held_out_only: score only the documents that `train` and `learn` hold out.
        max_bytes: score at most so much of each text.
        window_bytes: halved until every window fits the shortest context among the models.
        speed_characters: characters of domain text to write for the speed; 0 for none.
        tasks: of lm-evaluation-harness to run too: names, groups, or YAML files.
        trust_remote_code: run the Python files that a model brings for its architecture.

    Raises:
        LexigraftError: no text, no model, a window that fits no context, or tasks without the
            package that has them.
        RefusalError: a model that sees images too looks at what it is to predict.
    """
    if not models:
        raise LexigraftError(
            "no model", needed="one or more", fix="lexigraft eval MODEL --corpus F"
        )
    harness = Harness(tasks) if tasks else None
    folders = [local_folder(model) for model in models]
    readers = [families.load(folder) for folder in folders]
    domain = _documents(corpus, _held_out if held_out_only else read_documents, max_bytes)
    apart = (
        _documents(general, held_out_general if held_out_only else read_documents, max_bytes)
        if general
        else []
    )
    size = fitting_window([*domain, *apart], folders, readers, window_bytes)
    texts = [
        [w for document in found for w in windows(document, size)] for found in (domain, apart)
    ]
    total = sum(len(text.encode()) for found in texts for text in found) * len(folders)
    with progress("scoring", total=total) as advance:
        found = tuple(
            _score_model(
                str(model),
                folder,
                reader,
                texts,
                speed_characters=speed_characters,
                harness=harness,
                trust_remote_code=trust_remote_code,
                advance=advance,
            )
            for model, folder, reader in zip(models, folders, readers, strict=True)
        )
    return EvalResult(found, size)


def _held_out(specs: Sequence[str | Path]) -> Iterable[str]:
    return filter(held_out, read_documents(specs))


def _documents(
    specs: Sequence[str | Path],
    read: Callable[[Sequence[str | Path]], Iterable[str]],
    max_bytes: int | None,
) -> list[str]:
    found = list(up_to(read(specs), 2**62 if max_bytes is None else max_bytes))
    if not found:
        raise LexigraftError(
            f"no document of {', '.join(map(str, specs))} is held out",
            needed="at least one",
            fix="leave out --held-out-only, or give more text",
        )
    return found


def _score_model(
    name: str,
    folder: Path,
    reader: Family,
    texts: Sequence[list[str]],
    *,
    speed_characters: int,
    harness: Harness | None,
    trust_remote_code: bool,
    advance: Callable[[int], None],
) -> ModelScore:
    model = load_model(folder, trust_remote_code=trust_remote_code)
    start, _ = start_and_end(reader)
    ids = new_ids(folder, reader)

    require_next_token(model, [*start, *reader.encode(max(texts[0], key=len))])
    rows = model.get_output_embeddings().weight.shape[0]
    spare = SpareShare([i for i in range(rows) if i not in reader.map.texts])

    def scored(found: list[str], observe: SpareShare | None = None) -> Score:
        spelled = reader.encode_batch(found)
        require_row(folder, model, reader, max(map(max, filter(None, spelled)), default=0))
        return score(
            model, found, spelled, start=start, new_ids=ids, advance=advance, observe=observe
        )

    domain = scored(texts[0], spare)
    general = scored(texts[1]) if texts[1] else None
    speed = writing_speed(model, reader, texts[0], speed_characters) if speed_characters else None
    told = harness.scores(model, folder, trust_remote_code=trust_remote_code) if harness else {}
    return ModelScore(name, domain, general, domain.adoption, spare.mean, speed, told)


def writing_speed(model: Any, reader: Family, texts: Sequence[str], characters: int) -> float:
    """Characters of `texts` written per second: greedy decoding with a cache, batch 1.

    Every model writes the same characters, the first `characters` of the texts, in its own
    tokens: each step computes the most likely next token and is then fed the one that the text
    has. So the figure depends on the tokens a text takes and the time a step takes, not on what
    a model would rather say. Steps are timed by their median, which a busy machine moves least.
    """
    import torch

    text = "".join(texts)[:characters]
    start, _ = start_and_end(reader)
    ids = [*start, *reader.encode(text)][: context_limit(model)]
    place = model.get_output_embeddings().weight.device
    # transformers 5.24 renamed the argument, and warns of the old name.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    cache, seconds = None, []
    with torch.inference_mode():
        for token in ids[:-1]:
            began = time.perf_counter()
            step = torch.tensor([[token]], device=place)
            out = model(input_ids=step, use_cache=True, **{name: cache})
            int(out.logits[0, -1].argmax())  # waits for the device, as real decoding does
            cache = out[name]
            seconds.append(time.perf_counter() - began)
    written = len(reader.decode(ids[len(start) :]))
    return written / (len(ids) - len(start)) / median(seconds[_WARM_UP:] or seconds)
