"""From texts and a tokenizer to the blocks of a training run, checked before a model is loaded."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lexigraft import families
from lexigraft.console import Advance, note, progress, working
from lexigraft.corpus import content_digest, read_documents, sources, weighted_documents
from lexigraft.corpus import held_out as is_held_out
from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.families.measure import new_ids
from lexigraft.families.tokenmap import readable
from lexigraft.files import read_json, require_free_space, sha256_json, write_json
from lexigraft.manifest import Manifest, NewIds, TextSource
from lexigraft.models.bits import score, windows
from lexigraft.models.evidence import (
    NewTokens,
    RowEvidence,
    TrainingLines,
    Watcher,
    bits_of,
    gather,
    new_tokens,
    places_of,
    shares,
    within_longer,
)
from lexigraft.models.load import (
    context_limit,
    load_model,
    require_rows,
    rows_on_disk,
    start_and_end,
)
from lexigraft.models.packing import Blocks, pack, packed, repeated
from lexigraft.models.reading import Documents, encoded, in_order, pieces, reading
from lexigraft.models.settings import Settings
from lexigraft.models.verdict import Thresholds
from lexigraft.recipe import SMALLEST_BLOCK

WINDOW_BYTES = 1024  # of held-out text; the same in `eval`
_SMALLEST_WINDOW = 64
_SHOWN = 60  # characters of a document, in a message
_KEY = "key.json"
_PACKED = 8  # bytes of packed blocks per byte of text: three numbers of 4 bytes for each token
_FIRST = 64  # documents that tell how long tokens are
_CHUNK = 2**18  # tokens that are looked at together


@dataclass(frozen=True)
class Texts:
    """Documents to train on and windows to measure on, domain and general.

    Attributes:
        general: in the pieces that are mixed in.
    """

    domain: Documents
    general: Documents
    held_domain: list[str]
    held_general: list[str]
    sources: dict[str, list[TextSource]]

    @property
    def held_bytes(self) -> int:
        """UTF-8 bytes to measure on."""
        return sum(len(text.encode()) for text in (*self.held_domain, *self.held_general))


@dataclass(frozen=True)
class Subject:
    """A model folder, and the text that its model is measured on.

    Attributes:
        new: the new tokens, which may be none.
        start: what stands before a text.
    """

    folder: Path
    family: Family
    new: NewTokens
    start: list[int]
    texts: Texts

    @property
    def ids(self) -> NewIds:
        """The new ids."""
        return self.new.ids

    def held_lines(self) -> list[list[int]]:
        """The lines of held-out text, of either kind, each with what stands before a text."""
        held = [*self.texts.held_domain, *self.texts.held_general]
        return [[*self.start, *ids] for ids in self.family.encode_batch(held)]


@dataclass(frozen=True)
class Job(Subject):
    """A training run, ready but for the model.

    Attributes:
        highest: the highest id in the blocks.
    """

    blocks: Blocks
    highest: int
    steps: int
    settings: Settings


def read_texts(
    corpus: Sequence[str | Path],
    general: Sequence[str | Path],
    held_out: Sequence[str | Path],
    *,
    seed: int,
    measured_bytes: int,
    near: Path | None = None,
) -> Texts:
    """Read and split the texts; what is measured is at most `measured_bytes` of each kind.

    Args:
        near: a folder on whose disk texts are kept that do not fit into memory.

    Raises:
        LexigraftError: nothing to read, or a document of `held_out` that would be trained on too.
    """
    separate = list(read_documents(held_out)) if held_out else []
    given = set(map(_fingerprint, separate))
    domain, apart = _split(corpus, given, near, "corpus", whole=bool(held_out))
    if held_out:
        apart = Documents((document, 1.0) for document in separate)
    replayed, general_apart = (
        _split(general, given, near, "general") if general else (Documents(), Documents())
    )
    for name, texts in (("corpus", apart), ("general", general_apart)):
        if not texts and (name == "corpus" or general):
            note(
                f"nothing of --{name} is held out, so nothing of it is measured: it has too few "
                "documents (blank lines part them)"
            )
    named = {"corpus": corpus, "general": general, "held_out": held_out}
    pick = partial(_measured, seed=seed, limit=measured_bytes)
    return Texts(
        domain,
        replayed,
        pick(apart),
        pick(general_apart),
        {name: sources(specs) for name, specs in named.items() if specs},
    )


def measured_subject(
    folder: Path,
    corpus: Sequence[str | Path],
    general: Sequence[str | Path],
    *,
    seed: int,
    measured_bytes: int,
) -> Subject:
    """The model in `folder`, to be measured on all of these texts, as far as `measured_bytes` go.

    Raises:
        LexigraftError: nothing to read.
    """
    family = families.load(folder)
    new = new_tokens(folder, family, new_ids(folder, family))
    start, _ = start_and_end(family)
    held = [
        _measured(
            Documents((document, 1.0) for document in read_documents(specs)),
            seed=seed,
            limit=measured_bytes,
        )
        if specs
        else []
        for specs in (corpus, general)
    ]
    texts = Texts(Documents(), Documents(), held[0], held[1], {})
    return Subject(
        folder, family, new, start, _fitted(texts, new, context_limit(folder) - len(start))
    )


def _fingerprint(document: str) -> bytes:
    """The hash of a document, whatever white space its format left around it."""
    return content_digest(document.strip())


def _split(
    specs: Sequence[str | Path],
    given: set[bytes],
    near: Path | None,
    name: str,
    *,
    whole: bool = False,
) -> tuple[Documents, Documents]:
    """Documents to train on, general ones in pieces, and those held out unless all are trained on.

    Of general text some pieces are held out where no whole document is.

    Raises:
        LexigraftError: one to train on is among those that are `given` to be measured on.
    """
    apart = Documents(near=near)
    shared: dict[bytes, str] = {}

    def kept(texts: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
        for text, weight in texts:
            if not whole and is_held_out(text):
                apart.add(text)
                continue
            if given and (mark := _fingerprint(text)) in given:
                shared[mark] = text
            yield text, weight

    if name == "general":
        found = Documents(pieces(kept(weighted_documents(specs))), near)
        if not apart:  # a few long documents: then some of their pieces
            found = Documents(kept(pieces(weighted_documents(specs))), near)
    else:
        found = Documents(kept(weighted_documents(specs)), near)
    if shared:
        first = " ".join(next(iter(shared.values())).split())[:_SHOWN]
        raise LexigraftError(
            f"{len(shared):,} of {len(given):,} documents of --held-out are in --{name} too, the "
            f"first: {first!r}",
            needed="text to measure on that is not trained on",
            fix=f"remove them from --{name}, or leave out --held-out: then a part of the corpus is "
            "held out",
        )
    return found, apart


def _measured(documents: Documents, *, seed: int, limit: int) -> list[str]:
    """Windows of `documents`, in a fixed random order, up to `limit` bytes in all."""
    found: list[str] = []
    left = limit
    for document in in_order(documents, seed):
        for window in windows(document, min(WINDOW_BYTES, limit)):
            left -= len(window.encode())
            if left < 0:
                return found
            found.append(window)
    return found


def plan_of(family: Family, texts: Texts, settings: Settings) -> dict[str, Any]:
    """What a resumed run must share with the one it continues; `family` is the model's."""
    return {
        "settings": asdict(settings),
        "tokens": family.map.tokens,
        "tokenizer": sha256_json([family.map.hash, family.content_hash]),
        "model": (Manifest.read(family.folder) or Manifest()).hash,
        "texts": sha256_json(
            {
                name: [[s.sha256, s.weight, s.column] for s in found]
                for name, found in texts.sources.items()
            }
        ),
    }


def with_blocks_of_text(family: Family, texts: Texts, settings: Settings) -> Settings:
    """`settings` whose blocks hold as much text as `block_size` tokens of the base do.

    So a step sees as much text as it would without new words, and rates, schedule and number of
    steps are those that suit the base. Blocks of as many new tokens would make fewer and larger
    steps of the same text, which teaches a model less (measured: docs/log.md).

    Args:
        family: the model's; one without new tokens keeps its `block_size`.

    Raises:
        LexigraftError: such a block is longer than the positions that the config tells of.
    """
    ids = new_ids(family.folder, family)
    if not len(ids):
        require_block(settings.block_size, context_limit(family.folder))
        return settings
    new = new_tokens(family.folder, family, ids)
    sample = itertools.islice(in_order(texts.domain, 0), _FIRST)
    pairs = [(line, new.spelled(line)) for line in family.encode_batch(list(sample))]
    known = [(len(line), len(spelled)) for line, spelled in pairs if spelled is not None]
    after, before = (sum(lengths) for lengths in zip(*known, strict=True)) if known else (1, 1)
    size = max(SMALLEST_BLOCK, round(settings.block_size * after / max(before, 1)))
    require_block(size, context_limit(family.folder), asked=settings.block_size)
    if size != settings.block_size:
        note(
            f"blocks of {size:,} tokens: as much text as {settings.block_size:,} tokens of the base"
        )
    return replace(settings, block_size=size)


def require_block(size: int, limit: int, *, asked: int | None = None) -> None:
    """Stop where blocks are longer than a model's positions.

    Args:
        size: tokens of a block.
        limit: the most that the model can place.
        asked: what the user asked for, in tokens of the base, where that is another number.

    Raises:
        LexigraftError: they are.
    """
    if size <= limit:
        return
    asked = asked or size
    same = "" if asked == size else f" (as much text as {size} tokens with new words)"
    raise LexigraftError(
        f"--block-size {asked}{same}",
        needed=f"blocks of at most {limit} tokens, the model's positions",
        fix=f"use --block-size {max(SMALLEST_BLOCK, limit * asked // size)}",
    )


@working("packing texts")
def prepare(folder: Path, texts: Texts, settings: Settings, cache: Path | None = None) -> Job:
    """Encode, order and pack the texts, and check them against tokenizer and rows.

    Args:
        folder: the model's.
        cache: where the packed blocks are kept; those of an earlier call are taken if texts,
            tokenizer and settings are the same by their content. Without it they are in memory.

    Raises:
        LexigraftError: nothing is left to train on, no new token occurs in it, or an id in it has
            no row.
    """
    family = families.load(folder)
    ids = new_ids(folder, family)
    start, _ = start_and_end(family)
    blocks = pack_texts(family, texts, settings, cache)
    if settings.passes > 1:
        blocks = repeated(blocks, settings.passes, settings.seed)
    steps = -(-len(blocks) // settings.step_blocks)
    steps = min(steps, settings.max_steps or steps)
    highest = max(int(found.max()) for found in _chunks(blocks.targets, blocks.inputs))
    rows = rows_on_disk(folder)
    if rows is not None:  # before the model is loaded
        require_rows(folder, rows, family, highest)
    _require_new_tokens(blocks, ids)
    new = new_tokens(folder, family, ids)
    texts = _fitted(texts, new, context_limit(folder) - len(start))
    job = Job(folder, family, new, start, texts, blocks, highest, steps, settings)
    _tell_of_rare_ones(job)
    return job


def pack_texts(family: Family, texts: Texts, settings: Settings, cache: Path | None) -> Blocks:
    """The packed texts: those in `cache` if they are of this plan, else made anew.

    Raises:
        LexigraftError: nothing is left to train on, or the disk has no room.
    """
    if not texts.domain:
        raise LexigraftError(
            "every document of the corpus is held out",
            needed="documents to train on",
            fix="give a larger --corpus, or separate texts for --held-out",
        )
    if cache is None:
        return _pack(texts, family, settings, None)
    key = {"plan": sha256_json(plan_of(family, texts, settings))}
    if (cache / _KEY).is_file() and read_json(cache / _KEY) == key:
        return packed(cache, settings.block_size)
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    require_free_space(cache, _PACKED * _planned_bytes(texts, family, settings))
    blocks = _pack(texts, family, settings, cache)
    write_json(cache / _KEY, key)  # last: without it, they are not whole
    return blocks


def _pack(texts: Texts, family: Family, settings: Settings, folder: Path | None) -> Blocks:
    start, end = start_and_end(family)
    size, apart = settings.block_size, settings.apart
    with progress("packing texts", _planned_bytes(texts, family, settings)) as advance:
        documents = _told(_stream(texts, family, settings), advance)
        return pack(documents, size, start=start, end=end, apart=apart, folder=folder)


def _told(
    documents: Iterable[tuple[list[int], int]], advance: Advance
) -> Iterator[tuple[list[int], int]]:
    for ids, size in documents:
        advance(size)
        yield ids, size


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
    tokens = _token_limit(settings)
    order = reading(
        texts.domain,
        texts.general,
        seed=settings.seed,
        max_bytes=settings.max_bytes
        or (_one_pass(texts, settings)[1] if tokens is None else 2**62),
        skipped=_one_pass(texts, settings)[0],
        replay=settings.replay,
        early=(
            _one_pass(texts, settings)[0] + _planned_bytes(texts, family, settings)
            if settings.replay_schedule == "early"
            else None
        ),
    )
    return encoded(order, family, max_tokens=tokens)


def _token_limit(settings: Settings) -> int | None:
    if settings.max_steps is None:
        return settings.max_tokens
    room = settings.max_steps * settings.step_blocks * settings.block_size
    return min(room, settings.max_tokens or room)


def _one_pass(texts: Texts, settings: Settings) -> tuple[int, int]:
    """Where a pass over the domain text, and the general text in it, begins and ends, in bytes."""
    replay = settings.replay if texts.general else 0.0
    begin, end = settings.share or (0.0, 1.0)
    whole = texts.domain.bytes / (1 - replay)
    return int(whole * begin), int(whole * end)


def _planned_bytes(texts: Texts, family: Family, settings: Settings) -> int:
    """About how many bytes will be read; tokens are taken to be as long as in the first texts."""
    tokens = _token_limit(settings)
    if tokens is None:
        begin, end = _one_pass(texts, settings)
        return settings.max_bytes or end - begin
    first = texts.domain[:_FIRST]
    length = sum(len(text.encode()) for text in first) / sum(map(len, family.encode_batch(first)))
    planned = int(tokens * length)
    return min(planned, settings.max_bytes or planned)


def _chunks(*arrays: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    """Mapped arrays piece by piece, so that what is computed of them needs little memory."""
    for found in arrays:
        for part in _parts(found):
            yield found[part]


def _parts(blocks: NDArray[np.int32]) -> Iterator[slice]:
    step = max(1, _CHUNK // blocks.shape[1])
    return (slice(begin, begin + step) for begin in range(0, len(blocks), step))


def _require_new_tokens(blocks: Blocks, ids: NewIds) -> None:
    if len(ids) and not any((places_of(t, ids) >= 0).any() for t in _chunks(blocks.targets)):
        raise LexigraftError(
            f"none of the {len(ids):,} new tokens occurs in the text to train on",
            needed="text of the field that the tokens were learned from",
            fix="train on the corpus that `lexigraft learn` was given",
        )


def new_target_share(job: Job) -> float:
    """Share of new tokens among all targets."""
    new = sum(int((places_of(t, job.ids) >= 0).sum()) for t in _chunks(job.blocks.targets))
    return new / max(1, int(job.blocks.tokens[-1]))


def occurrences(job: Job, steps: int | None = None) -> tuple[list[int], list[int]]:
    """How often each new id is a target, and an input, in the steps of this run, or its first."""
    used = (job.steps if steps is None else steps) * job.settings.step_blocks
    counts = []
    for column in (job.blocks.targets[:used], job.blocks.inputs[:used]):
        count = np.zeros(len(job.ids), dtype=np.int64)
        for found in _chunks(column):
            places = places_of(found, job.ids)
            count += np.bincount(places[places >= 0], minlength=len(job.ids))
        counts.append(count.tolist())
    return counts[0], counts[1]


def _tell_of_rare_ones(job: Job) -> None:
    """Warn of new tokens that this run will predict too seldom to learn; not of those in others."""
    targets, _ = occurrences(job)
    texts = [job.family.token_bytes(token) for token in job.ids]
    within = within_longer(texts, targets)
    few = sorted(
        (count, i) for i, count in enumerate(targets) if count + within[i] < Thresholds.floor
    )
    if few:
        named = ", ".join(repr(readable(texts[i])) for _, i in few[: Thresholds.weakest])
        note(
            f"{len(few):,} of {len(targets):,} new tokens will be predicted fewer than "
            f"{Thresholds.floor} times, the rarest: {named}; train on more text, or learn fewer "
            "tokens"
        )


def measure(job: Subject, model: Any) -> dict[str, float | None]:
    """The figures of `look`."""
    return look(job, model)[0]


def look(job: Subject, model: Any) -> tuple[dict[str, float | None], dict[int, float]]:
    """What `model` makes of held-out text as it is now; None where there is no such text.

    Returns:
        `domain_bpb` and `general_bpb`, bits per byte; for a model with new tokens also what
        `evidence.shares` says of the domain text. And `evidence.bits_of` these tokens in both.
    """
    field, general = job.texts.held_domain, job.texts.held_general
    lines, everyday = map(job.family.encode_batch, (field, general))
    watchers = Watcher(job.new, lines), Watcher(job.new, everyday)
    with progress("measuring held-out text", job.texts.held_bytes) as advance:
        domain = score(
            model,
            field,
            lines,
            start=job.start,
            new_ids=job.ids,
            advance=advance,
            observe=watchers[0],
        )
        apart = score(
            model, general, everyday, start=job.start, advance=advance, observe=watchers[1]
        )
    found = {
        "domain_bpb": domain.bpb if domain.bytes else None,
        "general_bpb": apart.bpb if apart.bytes else None,
    }
    if len(job.ids):
        found |= shares(watchers[0].targets, job.new, domain)
    return found, bits_of([target for watcher in watchers for target in watcher.targets])


def base_measure(
    job: Subject, model: Any, base: Path | None, *, trust_remote_code: bool = False
) -> dict[str, float | None]:
    """`domain_bpb` and `general_bpb` of the base on the same windows; None where it is unknown.

    A model that was grafted and not trained since still is its base: the same text in base ids,
    under its old rows alone (so without the base's padding rows); unless it gave up old tokens,
    which its base would read. A model that nothing was added to is its own base.

    Args:
        model: `job`'s, untrained.
        base: the base's folder, where the user names it.
    """
    history = (Manifest.read(job.folder) or Manifest()).records
    family, rows = job.family, None
    if base is not None:
        family, model = families.load(base), load_model(base, trust_remote_code=trust_remote_code)
    elif history and history[-1].stage == "graft" and not job.ids.replaced:
        rows = job.ids.first
    elif history:
        return {"domain_bpb": None, "general_bpb": None}
    start, _ = start_and_end(family)

    def bpb(texts: list[str], advance: Advance) -> float | None:
        lines = family.encode_batch(texts)
        spelled = [job.new.spelled(line) if base is None else line for line in lines]
        known = [line for line in spelled if line is not None]
        room = context_limit(model) - len(start)
        if not texts or len(known) < len(lines) or max(map(len, known)) > room:
            return None
        return score(model, texts, known, start=start, rows=rows, advance=advance).bpb

    with progress("measuring the base", job.texts.held_bytes) as advance:
        return {
            "domain_bpb": bpb(job.texts.held_domain, advance),
            "general_bpb": bpb(job.texts.held_general, advance),
        }


def evidence(
    job: Job, model: Any, moved: Sequence[float], steps: int, before: Mapping[int, float]
) -> list[RowEvidence]:
    """What is known of each new row of a `model` trained so many steps.

    Args:
        moved: as in `NewRows`.
        before: the bits of `look` before training.
    """
    held, blocks = job.held_lines(), job.blocks
    training = TrainingLines(job.ids, held)
    for part in _parts(blocks.targets):
        if training.are_enough:
            break
        training.look(blocks.inputs[part], blocks.targets[part], blocks.positions[part])
    seen = list(zip(*occurrences(job, steps), moved, strict=True))
    return gather(model, job.new, held, training.lines, seen, before=before)
