"""From texts and a tokenizer to the blocks of a training run, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lexigraft import families
from lexigraft.console import note
from lexigraft.corpus import held_out as is_held_out
from lexigraft.corpus import read_documents, sources
from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.files import sha256_json
from lexigraft.manifest import Manifest, TextSource
from lexigraft.models.bits import score, windows
from lexigraft.models.evidence import (
    NewTokens,
    RowEvidence,
    Watcher,
    gather,
    new_tokens,
    shares,
)
from lexigraft.models.load import context_limit, load_model, new_ids, start_and_end
from lexigraft.models.packing import Blocks, pack, repeated
from lexigraft.models.reading import encoded, reading, shuffled

WINDOW_BYTES = 1024  # of held-out text; the same in `eval`
_SMALLEST_WINDOW = 64


@dataclass(frozen=True)
class Settings:
    """Everything that decides the trained weights, next to model and texts.

    `max_steps`, `max_bytes`, `max_tokens` of None are no limit; without any, one pass is made.
    """

    mode: str
    max_steps: int | None
    max_bytes: int | None
    max_tokens: int | None
    block_size: int
    batch_size: int
    learning_rate: float
    new_row_learning_rate: float
    lora_rank: int
    lora_alpha: float
    replay: float
    seed: int
    old_rows: str = "frozen"
    old_row_scale: float = 0.1
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.05
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    processes: int = 1
    objective: str = "lm"
    passes: int = 1

    @property
    def step_blocks(self) -> int:
        """Blocks of one step: over all batches and processes."""
        return self.batch_size * self.gradient_accumulation * self.processes


@dataclass(frozen=True)
class Texts:
    """Documents to train on and windows to measure on, domain and general."""

    domain: list[str]
    general: list[str]
    held_domain: list[str]
    held_general: list[str]
    sources: dict[str, list[TextSource]]


@dataclass(frozen=True)
class Job:
    """A training run, ready but for the model.

    Attributes:
        new: the new tokens, which may be none.
        plan: what a resumed run must share with the one it continues.
    """

    folder: Path
    family: Family
    new: NewTokens
    start: list[int]
    texts: Texts
    blocks: Blocks
    steps: int
    settings: Settings
    plan: dict[str, Any]

    @property
    def ids(self) -> range:
        """The new ids."""
        return self.new.ids


def read_texts(
    corpus: Sequence[str | Path],
    general: Sequence[str | Path],
    held_out: Sequence[str | Path],
    *,
    seed: int,
    measured_bytes: int,
) -> Texts:
    """Read and split the texts; what is measured is at most `measured_bytes` of each kind."""
    domain, apart = _split(read_documents(corpus), whole=bool(held_out))
    if held_out:
        apart = list(read_documents(held_out))
    replayed, general_apart = _split(read_documents(general) if general else [])
    for name, texts in (("corpus", apart), ("general", general_apart)):
        if not texts and (name == "corpus" or general):
            note(f"no document of --{name} is held out (too few documents), so none is measured")
    named = {"corpus": corpus, "general": general, "held_out": held_out}
    pick = partial(_measured, seed=seed, limit=measured_bytes)
    return Texts(
        domain,
        replayed,
        pick(apart),
        pick(general_apart),
        {name: sources(specs) for name, specs in named.items() if specs},
    )


def _split(documents: Iterable[str], *, whole: bool = False) -> tuple[list[str], list[str]]:
    kept: list[str] = []
    apart: list[str] = []
    for document in documents:
        (apart if not whole and is_held_out(document) else kept).append(document)
    return kept, apart


def _measured(documents: list[str], *, seed: int, limit: int) -> list[str]:
    """Windows of `documents`, in a fixed random order, up to `limit` bytes in all."""
    found: list[str] = []
    left = limit
    for document in shuffled(documents, seed):
        for window in windows(document, WINDOW_BYTES):
            left -= len(window.encode())
            if left < 0:
                return found
            found.append(window)
    return found


def prepare(folder: Path, texts: Texts, settings: Settings) -> Job:
    """Encode, order and pack the texts, and check them against the tokenizer.

    Raises:
        LexigraftError: nothing is left to train on, or no new token occurs in it.
    """
    family = families.load(folder)
    ids = new_ids(folder, family)
    start, end = start_and_end(family)
    if not texts.domain:
        raise LexigraftError(
            "every document of the corpus is held out",
            needed="documents to train on",
            fix="give a larger --corpus, or separate texts for --held-out",
        )
    blocks = pack(_stream(texts, family, settings), settings.block_size, start=start, end=end)
    if settings.passes > 1:
        blocks = repeated(blocks, settings.passes, settings.seed)
    steps = -(-len(blocks) // settings.step_blocks)
    steps = min(steps, settings.max_steps or steps)
    _require_new_tokens(blocks, ids)
    plan = {
        "settings": asdict(settings),
        "tokens": family.map.tokens,
        "tokenizer": family.map.hash,
        "model": (Manifest.read(folder) or Manifest()).hash,
        "texts": sha256_json(
            {name: [s.sha256 for s in found] for name, found in texts.sources.items()}
        ),
        "steps": steps,
    }
    new = new_tokens(folder, family, ids)
    texts = _fitted(texts, new, context_limit(folder) - len(start))
    return Job(folder, family, new, start, texts, blocks, steps, settings, plan)


def _fitted(texts: Texts, new: NewTokens, room: int) -> Texts:
    """`texts` whose held-out windows fit into `room` tokens, in base ids too."""
    size = WINDOW_BYTES
    held = [texts.held_domain, texts.held_general]

    def longest() -> int:
        lines = new.family.encode_batch([window for found in held for window in found])
        return max((len(new.spelled(line) or line) for line in lines), default=0)

    while longest() > room and size > _SMALLEST_WINDOW:
        size //= 2
        held = [[part for window in found for part in windows(window, size)] for found in held]
    return replace(texts, held_domain=held[0], held_general=held[1])


def _stream(texts: Texts, family: Family, settings: Settings) -> Iterable[tuple[list[int], int]]:
    tokens = settings.max_tokens
    if settings.max_steps is not None:
        room = settings.max_steps * settings.step_blocks * settings.block_size
        tokens = min(room, tokens or room)
    one_pass = sum(len(document.encode()) for document in texts.domain)
    if texts.general:
        one_pass = int(one_pass / (1 - settings.replay))
    size = settings.max_bytes or (one_pass if tokens is None else 2**62)
    order = reading(
        texts.domain,
        texts.general,
        seed=settings.seed,
        max_bytes=size,
        replay=settings.replay,
    )
    return encoded(order, family, max_tokens=tokens)


def _require_new_tokens(blocks: Blocks, ids: range) -> None:
    if len(ids) and not _is_new(blocks.targets, ids).any():
        raise LexigraftError(
            f"none of the {len(ids):,} new tokens occurs in the text to train on",
            needed="text of the field that the tokens were learned from",
            fix="train on the corpus that `lexigraft learn` was given",
        )


def _is_new(found: Any, ids: range) -> Any:
    return (found >= ids.start) & (found < ids.stop)


def new_target_share(job: Job) -> float:
    """Share of new tokens among all targets."""
    targets = job.blocks.targets
    return float(_is_new(targets, job.ids).sum() / max(1, (targets >= 0).sum()))


def occurrences(job: Job) -> tuple[list[int], list[int]]:
    """How often each new id was a target, and an input, in the steps of this run."""
    used = job.steps * job.settings.step_blocks
    counts = []
    for found in (job.blocks.targets[:used], job.blocks.inputs[:used]):
        new = found[_is_new(found, job.ids)] - job.ids.start
        counts.append(np.bincount(new, minlength=len(job.ids)).tolist())
    return counts[0], counts[1]


def measure(job: Job, model: Any) -> dict[str, float | None]:
    """What `model` makes of held-out text as it is now; None where there is no such text.

    Returns:
        `domain_bpb` and `general_bpb`, bits per byte; for a model with new tokens also what
        `evidence.shares` says of the domain text.
    """
    lines = job.family.encode_batch(job.texts.held_domain)
    watcher = Watcher(job.new, lines)
    domain = score(
        model, job.texts.held_domain, lines, start=job.start, new_ids=job.ids, observe=watcher
    )
    general = job.texts.held_general
    apart = score(model, general, job.family.encode_batch(general), start=job.start)
    found = {
        "domain_bpb": domain.bpb if domain.bytes else None,
        "general_bpb": apart.bpb if apart.bytes else None,
    }
    return {**found, **shares(watcher.targets, job.new, domain)} if len(job.ids) else found


def base_measure(
    job: Job, model: Any, base: Path | None, *, trust_remote_code: bool = False
) -> dict[str, float | None]:
    """`domain_bpb` and `general_bpb` of the base on the same windows; None where it is unknown.

    A model that was grafted and not trained since still is its base: the same text in base ids,
    under its old rows alone (so without the base's padding rows). A model that nothing was added
    to is its own base.

    Args:
        model: `job`'s, untrained.
        base: the base's folder, where the user names it.
    """
    history = (Manifest.read(job.folder) or Manifest()).records
    family, rows = job.family, None
    if base is not None:
        family, model = families.load(base), load_model(base, trust_remote_code=trust_remote_code)
    elif history and history[-1].stage == "graft":
        rows = job.ids.start
    elif history:
        return {"domain_bpb": None, "general_bpb": None}
    start, _ = start_and_end(family)

    def bpb(texts: list[str]) -> float | None:
        lines = family.encode_batch(texts)
        spelled = [job.new.spelled(line) if base is None else line for line in lines]
        known = [line for line in spelled if line is not None]
        room = context_limit(model) - len(start)
        if not texts or len(known) < len(lines) or max(map(len, known)) > room:
            return None
        return score(model, texts, known, start=start, rows=rows).bpb

    return {"domain_bpb": bpb(job.texts.held_domain), "general_bpb": bpb(job.texts.held_general)}


def evidence(job: Job, model: Any, moved: Sequence[float]) -> list[RowEvidence]:
    """What is known of each new row of the trained `model`; `moved` is how far each went."""
    held = [[*job.start, *ids] for ids in job.family.encode_batch(job.texts.held_domain)]
    return gather(
        model, job.new, held, job.blocks, list(zip(*occurrences(job), moved, strict=True))
    )
