"""Time and weigh `lexigraft learn` against the other ways to extend a tokenizer, side by side.

    python bench/learn.py --data ../shared/data            # everything: hours on two cores
    python bench/learn.py --quick                          # one size, two bases, a part of the text
    python bench/learn.py --bases smollm2 --languages en --sizes 4915 --tools lexigraft bpe-continue
    python bench/learn.py --profile --bases smollm2 --languages en --sizes 4915

Every job runs alone, in a child process of its own, on the same learning text (the corpus without
the documents that lexigraft's split holds out); its seconds include the start of Python and the
imports, and lexigraft's the proof of its laws. Every result is measured by the same code
(`bench/learn_jobs.py`). Prints Markdown tables and writes them, with the machine,
to bench/results/learn.md. Needs `pip install bpe-continue==0.1.0`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from machine import machine

# This process stays small: Linux counts a parent's memory into its children's peak.
RESULTS = Path(__file__).parent / "results" / "learn.md"
JOBS = [sys.executable, str(Path(__file__).parent / "learn_jobs.py")]
# Files of each base below tokenizers/. Llama 2 and Mistral are held in both of their formats.
BASES = {
    "smollm2": ("smollm2_hf/*.json",),
    "llama2": ("llama2_sp_bpe/tokenizer.model", "llama2_hf/*.json"),
    "llama3": ("llama3_1_hf/*.json",),
    "qwen3": ("qwen3_hf/*.json",),
    "mistral": ("mistral_sp/tokenizer.model.v1", "mistral_v1_hf/*.json"),
}
LANGUAGES = {
    "en": ("en_med_medquad.txt", "en_gen_wikipedia_demo.txt"),
    "zh": ("zh_med_tcm_classics.txt", "zh_gen_cmrc2018_wiki.txt"),
}
TOOLS = {
    "lexigraft": "",
    "bpe-continue": "bpe_continue",
    "sentencepiece + append": "sentencepiece_append",
    "BpeTrainer + append": "trainer_append",
}
PACKAGES = ("numpy", "sentencepiece", "tokenizers", "transformers", "numba", "bpe-continue")
QUICK_BYTES = 1_000_000
LLAMA2_TOKENS = 3_200  # 10% of Llama 2's 32,000
GIGABYTE = 10**9


@dataclass(frozen=True)
class Run:
    """One child process: what it took, what it printed, and why it failed if it did."""

    wall: float
    cpu: float
    rss: float
    output: str
    fault: str | None


def run(command: list[str], limit: float) -> Run:
    """Run `command` alone, `limit` seconds at most."""
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        watch = threading.Timer(limit, child.kill)
        watch.start()
        output = child.stdout.read().decode() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        late = not watch.is_alive()
        watch.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        errors.seek(0)
        words = errors.read().decode("utf-8", "replace").strip()
    scale = 2**20 if sys.platform == "darwin" else 2**10
    fault = None
    if child.returncode:
        fault = f"not done in {limit:,.0f} s" if late else _reason(words)
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, usage.ru_maxrss / scale, output, fault)


def _reason(words: str) -> str:
    """The line of an error output that says what is wrong, short enough for a table."""
    lines = [line.strip() for line in words.splitlines() if line.strip()] or ["no message"]
    found = [line for line in lines if line.startswith("found:")]
    return (found or lines)[-1].replace("|", "/")[:120]


def must(command: list[str], limit: float = 3600) -> Any:
    """The JSON that a job of our own prints."""
    done = run(command, limit)
    if done.fault:
        sys.exit(f"{shlex.join(command)}: {done.fault}")
    return json.loads(done.output) if done.output.strip() else None


def make_base(name: str, data: Path, folder: Path) -> Path:
    """A folder with the tokenizer files of one base."""
    base = folder / name
    base.mkdir(parents=True, exist_ok=True)
    for pattern in BASES[name]:
        for path in (data / "tokenizers").glob(pattern):
            known = "tokenizer.model" if path.name.startswith("tokenizer.model") else path.name
            shutil.copyfile(path, base / known)
    if name == "smollm2":
        must([*JOBS, "give_digit_rule", str(base)])
    return base


@dataclass(frozen=True)
class Texts:
    """The two parts of a corpus, and the general text of its language."""

    learning: Path
    held_out: Path
    general: Path


def shortened(path: Path, folder: Path) -> Path:
    """The beginning of a text, for a quick look."""
    short = folder / path.name
    short.write_text(path.read_bytes()[:QUICK_BYTES].decode("utf-8", "ignore"), "utf-8")
    return short


def make_texts(language: str, data: Path, folder: Path, *, quick: bool) -> Texts:
    """The corpus of one language in two parts, and its general text."""
    corpus, general = ((data / "corpora" / name) for name in LANGUAGES[language])
    if quick:
        corpus = shortened(corpus, folder)
    split = folder / f"{language}-split"
    must([*JOBS, "prepare", str(split), str(corpus)])
    return Texts(split / "learning.txt", split / "held_out.txt", general)


def learn_command(
    tool: str, base: Path, learning: Path, size: int, output: Path, flags: list[str]
) -> list[str]:
    """The command that extends `base` by `size` tokens."""
    if tool == "lexigraft":
        head = [sys.executable, "-m", "lexigraft", "learn", str(base), "--corpus", str(learning)]
        return [*head, "--tokens", str(size), "--allow-more", "-q", "-o", str(output), *flags]
    return [*JOBS, TOOLS[tool], str(base), str(learning), str(size), str(output)]


def evaluations(base: Path, texts: Texts, extended: list[Path]) -> list[dict[str, Any]]:
    """What the jobs' `evaluate` measured of each extended folder."""
    if not extended:
        return []
    files = (base, texts.learning, texts.held_out, texts.general, *extended)
    measured: list[dict[str, Any]] = must([*JOBS, "evaluate", *map(str, files)])
    return measured


HEAD = (
    "| base | tokens | tool | wall s | CPU s | RSS MB | added | domain tokens/byte | ratio "
    "| general ratio | dead | odd | drift | longer | decoded otherwise | ids kept "
    "| new engine differences |"
)


def row(label: str, done: Run, found: dict[str, Any] | None) -> str:
    """One line of the table."""
    if found is None:
        return f"| {label} | {done.wall:.1f} | cannot: {done.fault} |" + " |" * 12
    domain, general = found["domain"], found["general"]
    if len(found["engines"]) > 1:
        differences = f"{found['new_differences']:,} ({', '.join(found['engines'])})"
    else:
        differences = f"- ({found['engines'][0]} alone)"
    return (
        f"| {label} | {done.wall:.1f} | {done.cpu:.1f} | {done.rss:,.0f} | {found['added']:,} "
        f"| {domain['before'] / domain['bytes']:.4f} -> {domain['after'] / domain['bytes']:.4f} "
        f"| {domain['after'] / domain['before']:.4f} | {general['after'] / general['before']:.4f} "
        f"| {found['dead']:,} | {found['odd']:,} | {general['drift']:,} | {general['longer']:,} "
        f"| {found['decoded_otherwise']:,} | {'no' if found['moved'] else 'yes'} | {differences} |"
    )


Results = dict[tuple[str, str, int, str], tuple[Run, "dict[str, Any] | None"]]


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[str], Results]:
    """Every tool on every base, language and size."""
    results: Results = {}
    lines: list[str] = []
    for language in options.languages:
        texts = make_texts(language, options.data, folder, quick=options.quick)
        megabytes = texts.learning.stat().st_size / 1e6
        corpus, general = LANGUAGES[language]
        lines += ["", f"## {corpus}, {megabytes:.1f} MB to learn from; general: {general}", ""]
        lines += [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
        for name in options.bases:
            base = make_base(name, options.data, folder / "bases")
            runs: dict[tuple[int, str], Run] = {}
            made: dict[tuple[int, str], Path] = {}
            for size, tool in product(options.sizes, options.tools):
                out = folder / f"out-{len(runs)}"
                command = learn_command(tool, base, texts.learning, size, out, options.flags)
                done = runs[size, tool] = run(command, options.limit)
                if not done.fault:
                    made[size, tool] = out
                print(f"{language} {name} {size:,} {tool}: {done.wall:.1f} s", file=sys.stderr)
            found = dict(zip(made, evaluations(base, texts, list(made.values())), strict=True))
            for (size, tool), done in runs.items():
                results[language, name, size, tool] = done, found.get((size, tool))
                lines.append(row(f"{name} | {size:,} | {tool}", done, found.get((size, tool))))
            for out in made.values():
                shutil.rmtree(out)
    return lines, results


def ratios(results: Results) -> list[str]:
    """The targets, with what was measured: lexigraft beside each other tool."""
    lines = [
        "",
        "## lexigraft beside the others",
        "",
        "Everything is lexigraft / other. Targets at 4,915 tokens on SmolLM2 beside bpe-continue: "
        "wall <= 1 in English, <= 0.5 in Chinese; domain tokens <= 1.",
        "",
        "| text | base | tokens | beside | wall | CPU | RSS | domain tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (language, name, size, tool), (done, found) in results.items():
        ours, ours_found = results.get((language, name, size, "lexigraft"), (None, None))
        if tool == "lexigraft" or not ours or not ours_found or not found:
            continue
        shorter = ours_found["domain"]["after"] / found["domain"]["after"]
        lines.append(
            f"| {language} | {name} | {size:,} | {tool} | {ours.wall / done.wall:.2f} "
            f"| {ours.cpu / done.cpu:.2f} | {ours.rss / done.rss:.2f} | {shorter:.4f} |"
        )
    return lines


def chinese_llama(options: argparse.Namespace, folder: Path) -> list[str]:
    """Llama 2 on Chinese medical text, beside Chinese-LLaMA-2's 23,296 pieces."""
    corpora = options.data / "corpora"
    files = [corpora / "zh_med_medqa_exam.txt", corpora / "zh_med_tcm_classics.txt"]
    if options.quick:
        files = [shortened(path, folder) for path in files]
    exam, both = files[:1], files
    english = corpora / "en_gen_wikipedia_demo.txt"
    base = make_base("llama2", options.data, folder / "bases")
    merged = options.data / "tokenizers" / "chinese_llama2_merged_sp"
    lines = [
        "",
        f"## Llama 2 on Chinese medical text, at most {LLAMA2_TOKENS:,} tokens",
        "",
        "Tokens per character on documents held out of what was learned from. Chinese-LLaMA-2 was "
        "made from general text. Drift and changed sentences: general English "
        f"({english.name}). Target: below 0.83.",
        "",
        "| text | tokenizer | wall s | added | tokens/character | general English, sentences "
        "changed | longer | drift | decoded otherwise | dead | new engine differences |",
        "|" + "---|" * 11,
    ]
    for learned_from in (exam, both):
        label = " + ".join(path.name for path in learned_from)
        split, ours = (folder / f"chinese-llama-{len(learned_from)}{end}" for end in ("", "-out"))
        must([*JOBS, "prepare", str(split), *map(str, learned_from)])
        texts = Texts(split / "learning.txt", split / "held_out.txt", english)
        command = learn_command(
            "lexigraft", base, texts.learning, LLAMA2_TOKENS, ours, options.flags
        )
        done = run([part for part in command if part != "--allow-more"], options.limit)
        if done.fault:
            lines.append(f"| {label} | lexigraft | cannot: {done.fault} |" + " |" * 8)
            continue
        own, chinese = evaluations(base, texts, [ours, merged])
        before = own["domain"]["before"] / own["domain"]["characters"]
        lines.append(f"| {label} | Llama 2 | - | 0 | {before:.3f} | 0 | 0 | 0 | 0 | 0 | 0 |")
        for name, found in (
            (f"lexigraft | {done.wall:.1f}", own),
            ("Chinese-LLaMA-2 | -", chinese),
        ):
            domain, general = found["domain"], found["general"]
            lines.append(
                f"| {label} | {name} | {found['added']:,} "
                f"| {domain['after'] / domain['characters']:.3f} "
                f"| {general['changed']:,} of {general['lines']:,} | {general['longer']:,} "
                f"| {general['drift']:,} | {found['decoded_otherwise']:,} | {found['dead']:,} "
                f"| {found['new_differences']:,} ({', '.join(found['engines'])}) |"
            )
    return lines


def every(options: argparse.Namespace, folder: Path) -> list[str]:
    """400 tokens more for every tokenizer at hand, by the result's own proof."""
    corpora = [
        shortened(options.data / "corpora" / LANGUAGES[name][0], folder) for name in LANGUAGES
    ]
    flags = [part for path in corpora for part in ("--corpus", str(path))]
    lines = [
        "",
        "## 400 tokens more for every tokenizer",
        "",
        f"Learned from the first {QUICK_BYTES / 1e6:.0f} MB of each corpus; what the proof of each "
        "result said (`learn --json`): ids kept, decoded as before and engines equal wherever the "
        "base's were, or nothing is written. bridges: new tokens that never come out, but are "
        "parts of others; dead: those that are not even that.",
        "",
        "| tokenizer | family | added | drift | dead | bridges | engines | texts proved | "
        "where the base's engines differ |",
        "|" + "---|" * 9,
    ]
    for path in sorted((options.data / "tokenizers").iterdir()):
        for label, files in _alternatives(path):
            base, out = folder / "every" / label, folder / "every-out"
            base.mkdir(parents=True)
            for file in files:
                named = ".model" not in file.name or file.name == "spiece.model"
                shutil.copyfile(file, base / (file.name if named else "tokenizer.model"))
            command = [sys.executable, "-m", "lexigraft", "learn", str(base), *flags]
            command += ["--tokens", "400", "--allow-more", "--json", "-q", "-o", str(out)]
            done = run(command, options.limit)
            print(f"{label}: {done.wall:.1f} s", file=sys.stderr)
            if done.fault:
                fault = done.fault.replace(str(base), "BASE")
                lines.append(f"| {label} | refused: {fault} |" + " |" * 7)
                continue
            found = json.loads(done.output)
            parity, bridges = found["parity"], found["bridges"]
            lines.append(
                f"| {label} | {found['family']} | {found['added']:,} | {found['drift']} "
                f"| {found['dead'] - bridges} | {bridges} | {', '.join(parity['engines'])} "
                f"| {parity['texts']:,} | {parity['base_differences']:,} |"
            )
            shutil.rmtree(out)
    return lines


def _alternatives(folder: Path) -> list[tuple[str, list[Path]]]:
    """The tokenizers in a folder: one, or several files that are a tokenizer each."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    alone = [path for path in files if path.suffix == ".tiktoken" or ".model" in path.name]
    if len(alone) < 2:
        return [(folder.name, files)]
    return [(f"{folder.name} {path.name}", [path]) for path in alone]


def gigabyte(options: argparse.Namespace, folder: Path) -> list[str]:
    """SmolLM2 extended from a gigabyte of text that grows without repeating itself."""
    base = make_base("smollm2", options.data, folder / "bases")
    lines = [
        "",
        "## A gigabyte",
        "",
        "Clauses of the corpus cut in half and joined anew, with numbers between them, so that "
        "distinct words and clauses grow with the text (`learn_jobs.py`, multiply). RSS: the "
        "largest of the processes. Target: below 2 GB.",
        "",
        "| text | size | added | wall s | CPU s | RSS MB |",
        "|---|---|---|---|---|---|",
    ]
    for language in options.languages:
        corpus = options.data / "corpora" / LANGUAGES[language][0]
        text, out = folder / f"{language}.txt", folder / f"{language}-out"
        must([*JOBS, "multiply", str(corpus), str(text), str(GIGABYTE)])
        done = run(learn_command("lexigraft", base, text, 4915, out, options.flags), options.limit)
        size = text.stat().st_size / 1e9
        text.unlink()
        if done.fault:
            lines.append(f"| {language} | {size:.2f} GB | cannot: {done.fault} | | | |")
            continue
        added = json.loads((out / "lexigraft.json").read_text())["records"][-1]["added"]
        lines.append(
            f"| {language} | {size:.2f} GB | {added:,} | {done.wall:.0f} | {done.cpu:.0f} "
            f"| {done.rss:,.0f} |"
        )
        shutil.rmtree(out)
    return lines


def profile(options: argparse.Namespace, folder: Path) -> None:
    """Print where lexigraft's seconds go, for every base, language and size asked for."""
    for language in options.languages:
        texts = make_texts(language, options.data, folder, quick=options.quick)
        for name in options.bases:
            base = make_base(name, options.data, folder / "bases")
            for size in options.sizes:
                print(f"\n{name}, {language}, {size:,} tokens", flush=True)
                out = folder / "out"
                job = ["profile", str(base), str(texts.learning), str(size), str(out)]
                subprocess.run([*JOBS, *job], check=True)
                shutil.rmtree(out)


LEGEND = """
- wall, CPU: of the whole child process, start and imports included; lexigraft's include its proof.
- RSS: the largest of the child and its own children.
- domain: held-out documents of the corpus, line by line; general: text of another field, sentence
  by sentence.
- dead: new ids that never come out on the learning text. odd: new tokens with a digit, a control
  character or letters of two scripts.
- drift: general sentences whose ids change although no new token is in them; longer: that get
  longer. decoded otherwise: lines and sentences whose decoded text is not the base's.
- new engine differences: those on which the base's readers agree and the extension's do not.
- sentencepiece + append: trained alone (BPE), pieces appended with score 0 as Chinese-LLaMA does.
- BpeTrainer + append: trained alone, tokens and merges appended to the base's lists.
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Benchmark of lexigraft learn")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES), choices=LANGUAGES)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 2000, 4915])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--flags", type=shlex.split, default=[], help="more flags for lexigraft")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one job")
    parser.add_argument("--quick", action="store_true", help="1 MB of each corpus")
    parser.add_argument("--profile", action="store_true", help="only print where seconds go")
    parser.add_argument("--skip-chinese-llama", action="store_true")
    parser.add_argument("--skip-every", action="store_true")
    parser.add_argument("--skip-gigabyte", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--folder", help="where to work; by default the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.profile:
            profile(options, folder)
            return
        head = machine(PACKAGES)
        lines, results = measure(options, folder)
        lines += ratios(results)
        if not options.skip_chinese_llama:
            lines += chinese_llama(options, folder)
        if not (options.quick or options.skip_every):
            lines += every(options, folder)
        if not (options.quick or options.skip_gigabyte):
            lines += gigabyte(options, folder)
    command = shlex.join(["python", "bench/learn.py", *sys.argv[1:]])
    text = "\n".join(
        ["# Learn against the other ways", "", f"`{command}`", "", *head, LEGEND, *lines, ""]
    )
    print(text)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
