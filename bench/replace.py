"""New words in a fixed number of rows: what do they cost, against more rows and against none?

    python bench/replace.py --data ../shared/data            # hours; goes on where it was stopped
    python bench/replace.py --quick --data ../shared/data    # one seed, little text: does it run?

SmolLM2-135M, whose matrix has 49,152 rows, learns medical text in the setting of `adapt.py`: the
same texts, splits, bytes and order in each arm.

- control: no new words;
- expansion: so many new words behind the old tokens (`learn --tokens N`), rows by `--init auto`;
- replacement: as many under the ids and rows of old tokens (`learn --replace N`).

Bits per byte of held-out domain and general text, as grafted and after training. Prints Markdown
and writes it to bench/results/replace.md; what is done lies in --work as JSON.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adapt import PACKAGES, TEXTS, Bench, Case, spread
from machine import machine

RESULTS = Path(__file__).parent / "results" / "replace.md"
ARMS = ("control", "expansion", "replacement")
HEAD = (
    *("arm", "words", "rows", "domain, grafted", "domain, trained", "minus control"),
    *("general, grafted", "general, trained", "general, minus the base's"),
    *("domain tokens/byte", "general tokens/byte", "CPU s", "seeds"),
)


class ReplaceBench(Bench):
    """The arms that `adapt.py` lacks."""

    def _expansion(self, case: Case, folder: Path) -> dict[str, Any]:
        return self._with_words(case, folder, "expansion", "--tokens")

    def _replacement(self, case: Case, folder: Path) -> dict[str, Any]:
        return self._with_words(case, folder, "replacement", "--replace")

    def _with_words(self, case: Case, folder: Path, name: str, option: str) -> dict[str, Any]:
        texts, vocab, model = self._texts(case), folder / f"{name}-vocab", folder / f"{name}-model"
        adapter, merged = folder / f"{name}-adapter", folder / f"{name}-merged"
        learned = self._tool(
            *("learn", self.base, "--corpus", texts["corpus"], "--general", texts["general"]),
            *(option, self.options.tokens, "--min-count", 1, "-o", vocab),
        )
        grafted = self._tool("graft", self.base, vocab, "-o", model)
        stage = self._train(case, model, adapter, "--mode", "lora", "--base", self.base)
        self._tool("merge", self.base, adapter, "-o", merged)
        return {
            "stages": [stage],
            "words": learned["added"],
            "rows": grafted["rows_after"],
            "lengths": {name: learned[name] for name in ("domain", "general")},
            "replaced": learned.get("replaced"),
            "model": str(merged),
        }


def rows_of(found: Sequence[dict[str, Any]], language: str) -> Iterator[list[str]]:
    """A table's rows: one per arm, over the seeds that have it."""
    of_language = [run for run in found if run["language"] == language]
    controls = {run["seed"]: run for run in of_language if run["arm"] == "control"}
    for arm in ARMS:
        runs = [run for run in of_language if run["arm"] == arm]
        if not runs:
            continue
        ends = [run["stages"][-1] for run in runs]
        starts = [end["log"][0] for end in ends]
        yield [
            arm,
            f"{statistics.fmean(run['words'] for run in runs):,.0f}",
            f"{runs[0].get('rows', 49_152):,}",
            spread([start["domain_bpb"] for start in starts]),
            spread([end["domain_bpb"] for end in ends]),
            spread(
                [
                    end["domain_bpb"] - controls[run["seed"]]["stages"][-1]["domain_bpb"]
                    for run, end in zip(runs, ends, strict=True)
                    if run["seed"] in controls
                ]
                or [float("nan")]
            ),
            spread([start["general_bpb"] for start in starts]),
            spread([end["general_bpb"] for end in ends]),
            spread([end["general_bpb"] - end["base"]["general_bpb"] for end in ends]),
            *(_tokens_per_byte(runs, text) for text in ("domain", "general")),
            f"{statistics.fmean(end['cpu_seconds'] for end in ends):,.0f}",
            str(len(runs)),
        ]


def _tokens_per_byte(runs: Sequence[dict[str, Any]], text: str) -> str:
    lengths = [run["lengths"][text] for run in runs if "lengths" in run]
    if not lengths:
        return "as before"
    before, after = (
        statistics.fmean(one[f"tokens_{when}"] / one["bytes"] for one in lengths)
        for when in ("before", "after")
    )
    return f"{before:.4f} -> {after:.4f}"


def report(found: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """All tables, as Markdown."""
    lines = [
        "# New words in a fixed number of rows",
        "",
        "Bits per byte of held-out text; smaller is better. SmolLM2-135M-Instruct (de-quantised "
        f"from Q4_1, tied); each arm reads the same {options.bytes:,} bytes, a tenth of them "
        "general text, as in [adapt.md](adapt.md). ± is the 95% interval of the mean over seeds. "
        "Tokens per byte are those of the base and of the new tokenizer; general text is text in "
        "which the tokens to go were not chosen.",
        "",
        *machine(PACKAGES),
    ]
    for language in options.languages:
        rows = list(rows_of(found, language))
        lines += [
            "",
            f"## {language}",
            "",
            "| " + " | ".join(HEAD) + " |",
            "|" + "---|" * len(HEAD),
        ]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        gone = [
            run["replaced"] for run in found if run["language"] == language and run.get("replaced")
        ]
        if gone:
            kinds = ("unreachable", "untrained", "rare")
            named = ", ".join(
                f"{kind} {statistics.fmean(one[kind] for one in gone):,.0f}" for kind in kinds
            )
            lines += ["", f"Replaced, mean over seeds: {named}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/replace"))
    parser.add_argument("--languages", nargs="+", default=["zh", "en"], choices=sorted(TEXTS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bytes", type=int, default=120_000)
    parser.add_argument("--tokens", type=int, default=1_000)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.bytes, options.tokens, options.languages = 1, 6_000, 100, ["zh"]
        options.work = options.work.with_name(f"{options.work.name}-quick")
    bench = ReplaceBench(options)
    found = [
        bench.run(Case(language, seed, "words"), arm)
        for seed in range(options.seeds)
        for language in options.languages
        for arm in options.arms
    ]
    text = report(found, options)
    print(text)
    if not options.quick:
        RESULTS.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
