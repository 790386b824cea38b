"""`learn`: choose new tokens from a corpus and write the extended tokenizer."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lexigraft import families
from lexigraft.console import note, progress
from lexigraft.corpus import held_out, read_documents, sources, text_files
from lexigraft.errors import LexigraftError
from lexigraft.families import Family, measure
from lexigraft.families.choice import Choice, choose
from lexigraft.families.continued_bpe import Unit
from lexigraft.families.proof import HARD_TEXTS, Lengths, Proof, contexts, prove
from lexigraft.files import publish, refuse_existing, refuse_overwriting
from lexigraft.hub import local_folder
from lexigraft.manifest import (
    NEW_TOKENS,
    BaseTokenizer,
    LearnRecord,
    Manifest,
    Probe,
    TextSource,
    versions,
)

MAX_SHARE = 0.10
# "Drop a new token with fewer than 100 emissions in the training stream, hard floor 20": the rows
# of rarer tokens did not catch up in any experiment we know of (docs/methods.md).
SUPPORT = 100
FLOOR = 20
MEASURED_BYTES = 4_000_000  # of held-out and of general text
_BATCH = 512  # documents encoded at a time
_PROBES = ("The patient was treated.", " 患者冠状动脉正常。\n", "Привет 123 🙂  x")


@dataclass(frozen=True)
class LearnResult:
    """What `learn` made and measured. `curve` holds [k, tokens per byte of the domain text]."""

    output: Path
    added: int
    tokens_before: int
    tokens_after: int
    first_id: int
    min_count: int
    domain: Lengths
    domain_is_held_out: bool
    general: Lengths | None
    drift: int
    dead: int
    bridges: int
    rare: int
    proof: Proof
    curve: list[tuple[int, float]]

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {
            "output": str(self.output),
            "added": self.added,
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "first_id": self.first_id,
            "min_count": self.min_count,
            "domain": self.domain.to_json(),
            "domain_is_held_out": self.domain_is_held_out,
            "general": self.general.to_json() if self.general else None,
            "drift": self.drift,
            "dead": self.dead,
            "bridges": self.bridges,
            "rare": self.rare,
            "parity": {
                "texts": self.proof.texts,
                "engines": list(self.proof.engines),
                "base_differences": self.proof.base_differences,
            },
            "curve": [list(point) for point in self.curve],
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        which = "held-out" if self.domain_is_held_out else "learning"
        last = self.first_id + self.added - 1
        ids = f", ids {self.first_id:,} to {last:,}" if self.added else ""
        lines = [
            f"{self.added:,} new tokens{ids}; {self.tokens_before:,} -> {self.tokens_after:,}",
            f"domain text ({which}, {self.domain.bytes:,} bytes): {self.domain.tokens_before:,} -> "
            f"{self.domain.tokens_after:,} tokens, {self.domain.ratio:.3f} of the base",
        ]
        if self.general:
            lines.append(
                f"general text ({self.general.bytes:,} bytes): {self.general.tokens_before:,} -> "
                f"{self.general.tokens_after:,} tokens, {self.general.ratio:.4f} of the base"
            )
        engines = " and ".join(self.proof.engines)
        lines += [
            f"never emitted: {self.dead} ({self.bridges} of them bridges: parts of other tokens); "
            f"emitted fewer than {self.min_count} times: {self.rare}",
            f"proved on {self.proof.texts:,} texts with {engines}: old ids kept, texts only "
            f"coarsened, drift {self.drift}, decoded as before",
            f"next: lexigraft graft BASE {self.output} -o MODEL",
        ]
        return lines


def learn(
    base: str | Path,
    *,
    corpus: Sequence[str | Path],
    output: str | Path,
    general: Sequence[str | Path] = (),
    tokens: int | str = "auto",
    min_count: int | None = None,
    allow_more: bool = False,
    train_bytes: int | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
) -> LearnResult:
    """Learn new tokens from `corpus` and write the extended tokenizer to `output`.

    Method: continued BPE (Purason et al., arXiv 2512.03989) over the base's own segmentation of
    the corpus; new merges rank after all old ones.

    Args:
        base: folder (or hub id) with the tokenizer to extend.
        corpus: domain text: files, folders, globs.
        output: the VOCAB folder to write.
        general: text that must not get worse; used to measure, not to learn.
        tokens: how many, `"10%"` of the base's, or `"auto"`: all that the text supports, up to
            10% of the base's tokens.
        min_count: the least number of occurrences of a new token on the learning text.
            Default: `SUPPORT` occurrences in `train_bytes` of text for "auto", `FLOOR` for a
            number of tokens asked for.
        allow_more: accept more than 10% of the base's tokens.
        train_bytes: UTF-8 bytes of text that training will see; default: the corpus once.
        seed: recorded; learning itself is deterministic.
        force: replace `output`.
        dry_run: choose and prove, write nothing.

    Raises:
        LexigraftError: unusable input, or a law that the result would break.
    """
    output = Path(output)
    folder = local_folder(base)
    refuse_existing(output, force=force or dry_run)
    refuse_overwriting(output, [folder, *text_files(corpus), *text_files(general)])
    family = families.load(folder)
    limit = _limit(tokens, family.map.tokens, allow_more=allow_more)
    text = _gather(family, corpus)
    least = min_count or _default_min_count(tokens, text.bytes, train_bytes)
    choice = choose(family, text.units, limit=limit, min_count=least)
    _say_if_short(tokens, limit, least, choice)
    settings = {
        "tokens": tokens, "min_count": least, "allow_more": allow_more,
        "train_bytes": train_bytes, "seed": seed,
    }  # fmt: skip
    with _work_folder(output, force=force, dry_run=dry_run) as partial:
        family.extend(choice.merges, partial)
        extended = families.load(partial)
        domain = text.held_out or _beginning(corpus)
        hard = prove(family, extended, _hard_texts(extended, choice))
        domain_proof = prove(family, extended, domain)
        general_proof = prove(family, extended, _beginning(general)) if general else None
        proof = hard.plus(domain_proof).plus(general_proof or _NOTHING_READ)
        counts, total = measure.emissions(
            extended, family.map.tokens, filter(text.learned_from, read_documents(corpus))
        )
        _require_reachable(choice, extended, counts)
        record = _record(family, extended, settings, corpus, general)
        (Manifest.read(family.folder) or Manifest()).plus(record).write(partial)
        rows = measure.new_tokens(
            family, extended, choice, counts=counts, domain_tokens=total, general=general_proof
        )
        (partial / NEW_TOKENS).write_text("".join(f"{row}\n" for row in rows), "utf-8")
        return LearnResult(
            output=output,
            added=len(choice.merges),
            tokens_before=family.map.tokens,
            tokens_after=extended.map.tokens,
            first_id=family.map.tokens,
            min_count=least,
            domain=domain_proof.lengths,
            domain_is_held_out=bool(text.held_out),
            general=general_proof.lengths if general_proof else None,
            drift=proof.drift,
            dead=sum(not counts[merge.token] for merge in choice.merges),
            bridges=len(choice.bridges),
            rare=sum(0 < counts[merge.token] < least for merge in choice.merges),
            proof=proof,
            curve=measure.curve(family, choice.merges, domain),
        )


@contextlib.contextmanager
def _work_folder(output: Path, *, force: bool, dry_run: bool) -> Iterator[Path]:
    """Where to write: the future output, or a folder that goes away after a dry run."""
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="lexigraft-") as scratch:
            yield Path(scratch)
    else:
        with publish(output, force=force) as partial:
            yield partial


@dataclass(frozen=True)
class _Gathered:
    """The learning text as counted stretches, and the held-out documents (cut to a sample).

    A corpus too small to hold anything out is learned from whole: `held_out` is then empty.
    """

    units: Mapping[Unit, int]
    held_out: list[str]
    bytes: int

    def learned_from(self, document: str) -> bool:
        return not self.held_out or not held_out(document)


def _gather(family: Family, corpus: Sequence[str | Path]) -> _Gathered:
    """Count the stretches of the learning documents; keep the held-out ones for measuring."""
    learning = _Text(family)
    total = sum(path.stat().st_size for path in text_files(corpus))
    sample: list[str] = []
    sample_bytes = 0
    documents = read_documents(corpus)
    with progress("reading", total) as advance:
        while batch := list(islice(documents, _BATCH)):
            out = [document for document in batch if held_out(document)]
            advance(learning.add([document for document in batch if not held_out(document)]))
            if sample_bytes < MEASURED_BYTES:
                sample.extend(out)
                size = sum(len(document.encode()) for document in out)
                sample_bytes += size
                advance(size)
    if not learning.bytes:  # a handful of documents, all of them in the held-out share
        learning.add(sample)
        return _Gathered(learning.units, [], learning.bytes)
    return _Gathered(learning.units, sample, learning.bytes)


class _Text:
    """Counted stretches of some documents, and their bytes."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.units: Counter[Unit] = Counter()
        self.bytes = 0

    def add(self, documents: list[str]) -> int:
        """Count `documents`; returns their bytes."""
        self.units.update(self.family.units(documents))
        size = sum(len(document.encode()) for document in documents)
        self.bytes += size
        return size


def _beginning(specs: Sequence[str | Path]) -> list[str]:
    """The first documents of some texts: a sample to prove and measure on."""
    texts: list[str] = []
    size = 0
    for document in read_documents(specs):
        if size >= MEASURED_BYTES:
            break
        texts.append(document)
        size += len(document.encode())
    return texts


def _limit(tokens: int | str, base_tokens: int, *, allow_more: bool) -> int:
    """How many tokens to add at most."""
    most = int(MAX_SHARE * base_tokens)
    if tokens == "auto":
        return most
    wanted = _wanted(tokens, base_tokens)
    if wanted > most and not allow_more:
        raise LexigraftError(
            f"--tokens {tokens} is {wanted:,} tokens, {wanted / base_tokens:.0%} of the base's "
            f"{base_tokens:,}",
            needed=f"at most {MAX_SHARE:.0%} ({most:,}): more rows than the text can train cost "
            "quality",
            fix=f"--tokens {most}, or add --allow-more if your training text is large",
        )
    return wanted


def _wanted(tokens: int | str, base_tokens: int) -> int:
    text = str(tokens).strip()
    share = text.endswith("%")
    try:
        number = float(text[:-1]) / 100 * base_tokens if share else int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise LexigraftError(
            f"--tokens {tokens}", needed="a number, a share like 5%, or auto", fix="--tokens auto"
        )
    return int(number)


def _default_min_count(tokens: int | str, corpus_bytes: int, train_bytes: int | None) -> int:
    """Occurrences in the corpus that give `SUPPORT` (or `FLOOR`) in the training text."""
    target = SUPPORT if tokens == "auto" else FLOOR
    return max(1, math.ceil(target * corpus_bytes / (train_bytes or corpus_bytes or 1)))


def _say_if_short(tokens: int | str, limit: int, least: int, choice: Choice) -> None:
    added = len(choice.merges)
    if tokens != "auto" and added < limit:
        note(
            f"asked for {limit:,} tokens, the corpus supports {added:,} that occur at least "
            f"{least:,} times; taking those (lower --min-count or add text for more)"
        )
    elif not added:
        note(
            f"no sequence occurs {least:,} times in the corpus: 0 new tokens "
            "(lower --min-count or add text)"
        )


_NOTHING_READ = Proof(0, 0, (), 0, Lengths(0, 0, 0), Counter())


def _hard_texts(extended: Family, choice: Choice) -> Iterator[str]:
    words = (extended.token_bytes(extended.map.ids[merge.token]) for merge in choice.merges)
    return chain(HARD_TEXTS, contexts(word.decode("utf-8", "replace") for word in words))


def _require_reachable(choice: Choice, extended: Family, counts: Mapping[str, int]) -> None:
    """Law 4, by the engine itself on the learning text."""
    for merge in choice.merges:
        if counts[merge.token] != choice.counts[merge.token]:
            raise LexigraftError(
                f"law 4 is broken: {merge.token!r} comes out {counts[merge.token]:,} times, "
                f"expected {choice.counts[merge.token]:,}",
                needed="tokens that the engine emits where they were counted; nothing was written",
                fix=f"report this {extended.name} base and corpus as a bug of lexigraft",
            )


def _record(
    base: Family,
    extended: Family,
    settings: dict[str, Any],
    corpus: Sequence[str | Path],
    general: Sequence[str | Path],
) -> LearnRecord:
    texts: dict[str, list[TextSource]] = {"corpus": sources(corpus)}
    if general:
        texts["general"] = sources(general)
    return LearnRecord(
        base=BaseTokenizer(name=base.folder.name, token_map=base.map.hash, tokens=base.map.tokens),
        family=base.name,
        token_map=extended.map.hash,
        content=extended.content_hash,
        tokens=extended.map.tokens,
        first_id=base.map.tokens,
        added=extended.map.tokens - base.map.tokens,
        settings=settings,
        sources=texts,
        versions=versions(["lexigraft", "numpy", "sentencepiece", "tokenizers"]),
        probe=[Probe(text=text, ids=extended.encode(text)) for text in _PROBES],
    )
