"""How much text do new words need? One small model, adapted with less and with more text.

    python bench/scale.py --data ../shared/data            # half an hour on one core
    python bench/scale.py --quick --data ../shared/data    # one seed, little text: does it run?

stories260K (512 tokens, tied, trained on children's stories) learns English medical text, of which
it knows nothing, with its own tokens (control) and with as many new ones again; everything trains
in every arm (`train --mode full`, old rows at the rate of the body). Arms of a line read the same
bytes in the same order, and are measured on the same held-out documents:

- control: no new words;
- default: new words whose rows start as transformers' resize makes them;
- ours: rows by `graft --init auto`;
- distilled: the same, after `train --mode rows --objective distill` on the same text.

Prints Markdown and writes it to bench/results/scale.md; what is done lies in --work as JSON.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from adapt import Bench, Case, at_compute, say, spread, start_as_transformers
from lexigraft.files import read_json, write_json
from machine import machine

RESULTS = Path(__file__).parent / "results" / "scale.md"
PACKAGES = ("numpy", "torch", "transformers", "tokenizers")
ARMS = ("control", "default", "ours", "distilled")
MODEL = Path("models") / "stories260K_hf"


class Scale(Bench):
    """The arms for one small model, at several sizes of text."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.base: Path = options.data / MODEL

    def arm(self, seed: int, size: int, name: str) -> dict[str, Any]:
        """What came of one arm; read from the work folder if it is there."""
        case = Case("en", seed, "larger")
        folder = self.work / case.name
        folder.mkdir(exist_ok=True)
        done = folder / f"{name}-{size}.json"
        if not done.is_file():
            say(f"seed {seed}, {size:,} bytes: {name}")
            write_json(done, self._stages(case, folder, size, name))
        found: dict[str, Any] = read_json(done)
        return found

    def _stages(self, case: Case, folder: Path, size: int, name: str) -> dict[str, Any]:
        at = folder / f"{name}-{size}"
        if name == "control":
            return self._adapt(case, self.base, at, size)
        model = folder / "model"
        if not model.is_dir():
            asked = ["--tokens", self.options.tokens, "--allow-more", "--corpus"]
            vocab = folder / "vocab"
            self._tool("learn", self.base, *asked, self._texts(case)["corpus"], "-o", vocab)
            self._tool("graft", self.base, vocab, "-o", model)
        if name == "default":
            model = self._graft(self.base, folder / "vocab", folder / "default")
            start_as_transformers(self.base, model, case.seed)
        if name == "distilled":
            rows, model = at.with_name(f"{at.name}-rows"), at.with_name(f"{at.name}-start")
            distil = ("--mode", "rows", "--objective", "distill", "--base", self.base)
            self._learn_from(case, folder / "model", rows, size, *distil)
            self._tool("merge", folder / "model", rows, "-o", model)
        return self._adapt(case, model, at, size, "--base", self.base)

    def _adapt(
        self, case: Case, model: Path, at: Path, size: int, *options: object
    ) -> dict[str, Any]:
        everything = ("--mode", "full", "--old-rows", "slow", "--old-row-scale", 1)
        blocks = ("--block-size", 256, "--batch-size", 4, "--measurements", 6)
        return self._learn_from(case, model, at, size, *everything, *blocks, *options)

    def _learn_from(
        self, case: Case, model: Path, at: Path, size: int, *options: object
    ) -> dict[str, Any]:
        texts = self._texts(case)
        given = ("--corpus", texts["corpus"], "--held-out", texts["held_out"], "--replay", 0)
        return self._tool(
            *("train", model, *given, "--max-bytes", size, "--seed", case.seed),
            *("-o", at, "--force", *options),
        )


def line(bench: Scale, size: int, seeds: int) -> list[str]:
    """A row of the table: all arms that read so many bytes."""
    runs = {arm: [bench.arm(seed, size, arm) for seed in range(seeds)] for arm in ARMS}
    control = runs["control"]
    cells = [f"{size:,}", spread([run["domain_bpb"] for run in control])]
    for arm in ARMS[1:]:
        pairs = list(zip(runs[arm], control, strict=True))
        text = [run["domain_bpb"] - other["domain_bpb"] for run, other in pairs]
        compute = [
            run["domain_bpb"] - at_compute({"stages": [other]}, run["tokens"])
            for run, other in pairs
        ]
        cells += [spread(text), spread(compute)]
    tokens = [
        run["tokens"] / other["tokens"] for run, other in zip(runs["ours"], control, strict=True)
    ]
    return [*cells, f"{statistics.fmean(tokens):.2f}"]


def report(bench: Scale, options: argparse.Namespace) -> str:
    """The table, as Markdown."""
    names = [f"{arm}, {equal}" for arm in ARMS[1:] for equal in ("equal text", "equal tokens")]
    head = ("bytes of text", "control", *names, "tokens against the control")
    rows = [line(bench, size, options.seeds) for size in options.bytes]
    lines = [
        "# How much text new words need",
        "",
        "Bits per byte of held-out medical text; smaller is better. stories260K (512 tokens, tied, "
        f"trained on children's stories) with {options.tokens:,} new tokens learned from 20 MB of "
        "that text, everything trained (`train --mode full`, old rows at the body's rate, 4 blocks "
        "of 256 tokens a step). The control's bits, and by how much the other arms differ from it "
        "after the same text and after as many tokens. ± is the 95% interval of the mean over "
        f"{options.seeds} seeds (of split, vocabulary and order).",
        "",
        *machine(PACKAGES),
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/scale"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--bytes", type=int, nargs="+", default=[30_000, 100_000, 300_000, 1_000_000]
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.bytes, options.tokens = 1, [20_000], 100
        options.work = options.work.with_name(f"{options.work.name}-quick")
    text = report(Scale(options), options)
    print(text)
    if not options.quick:
        RESULTS.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
