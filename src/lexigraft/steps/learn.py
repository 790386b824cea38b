"""`learn`: choose new tokens from a corpus and write the extended tokenizer."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lexigraft import families
from lexigraft.checkpoints.architectures import is_tied_by_config
from lexigraft.console import note
from lexigraft.corpus import beginning, sources, text_files
from lexigraft.errors import LexigraftError
from lexigraft.families import Family, measure
from lexigraft.families.choice import Choice, Judge, choose, with_parts
from lexigraft.families.llama_cpp import simulate
from lexigraft.families.loader import LoaderProof, TransformersLoader, prove_loader
from lexigraft.families.proof import (
    HARD_TEXTS,
    Lengths,
    Proof,
    contexts,
    expansion,
    long_text,
    offenders,
    prove,
)
from lexigraft.families.special import add_special
from lexigraft.families.units import Units
from lexigraft.files import publish, read_json, refuse_existing, refuse_overwriting, sha256_file
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
from lexigraft.selection.gathering import (
    between,
    characters_in_parts,
    gather,
    units_of_texts,
)
from lexigraft.selection.judges import Contrast, check_text_judge
from lexigraft.selection.lists import Term, read_special, read_words
from lexigraft.selection.sizing import MAX_SHARE, ModelSize, Size, choose_size, model_size
from lexigraft.selection.terms import TermTable, variants
from lexigraft.selection.wanted import Wanted, want

# "Drop a new token with fewer than 100 emissions in the training stream, hard floor 20": the rows
# of rarer tokens did not catch up in any experiment we know of (docs/methods.md).
SUPPORT = 100
FLOOR = 20
MEASURED_BYTES = 4_000_000  # of held-out and of general text
# What slower engines read of the domain and of the general text.
_FEW_TEXTS, _FEW_CHARACTERS = 200, 1000
_MOST_TRIES = 2000  # chunks in which a token is looked for
_PROBES = ("The patient was treated.", " 患者冠状动脉正常。\n", "Привет 123 🙂  x")


@dataclass(frozen=True)
class LearnResult:
    """What `learn` made and measured.

    Attributes:
        output: the VOCAB folder.
        family: the kind of tokenizer.
        added: new tokens.
        tokens_before: max id + 1 of the base.
        tokens_after: max id + 1 of the extension.
        first_id: id of the first new token.
        min_count: occurrences asked of a new token.
        domain: lengths of the domain text.
        domain_is_held_out: whether that text was kept out of learning.
        general: lengths of the general text.
        drift: texts whose ids differ although no new token is in them.
        dead: tokens that never come out of the learning text.
        bridges: those of them that are parts of others.
        rare: tokens that come out fewer than `min_count` times (parts of others).
        proof: what was proved, all texts together.
        loader: the same for transformers' own loader.
        size: how many tokens, and why.
        terms: what became of each listed term; None without a list.
        limits: what is to be known of this kind of tokenizer.
        addresses: words of URLs and e-mail addresses that were not learned from.
        in_parts: letters and symbols of the corpus that are still no token, with occurrences.
        special: new special tokens, behind the others.
        dry_run: nothing was written.
    """

    output: Path
    family: str
    added: int
    tokens_before: int
    tokens_after: int
    first_id: int
    min_count: int
    domain: Lengths | None
    domain_is_held_out: bool
    general: Lengths | None
    drift: int
    dead: int
    bridges: int
    rare: int
    proof: Proof
    loader: LoaderProof
    size: Size | None
    terms: TermTable | None
    limits: tuple[str, ...]
    addresses: int
    in_parts: list[tuple[str, int]]
    special: int
    dry_run: bool

    @property
    def curve(self) -> list[tuple[int, float]]:
        """[k, tokens per byte of the domain text]."""
        return self.size.curve if self.size else []

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        engines = [*self.proof.engines, *(["transformers"] if self.loader.compared else [])]
        return {
            "output": str(self.output),
            "family": self.family,
            "added": self.added,
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "first_id": self.first_id,
            "min_count": self.min_count,
            "domain": self.domain.to_json() if self.domain else None,
            "domain_is_held_out": self.domain_is_held_out,
            "general": self.general.to_json() if self.general else None,
            "drift": self.drift,
            "dead": self.dead,
            "bridges": self.bridges,
            "rare": self.rare,
            "parity": {
                "texts": self.proof.texts,
                "engines": engines,
                "base_differences": self.proof.base_differences,
                "unknown": self.proof.unknown,
                "loader": {
                    "compared": self.loader.compared,
                    "base_differences": self.loader.base_differences,
                    "reason": self.loader.reason,
                },
            },
            "curve": [list(point) for point in self.curve],
            "size": self.size.to_json() if self.size else None,
            "terms": self.terms.to_json() if self.terms else None,
            "limits": list(self.limits),
            "addresses": self.addresses,
            "special": self.special,
            "in_parts": [list(row) for row in self.in_parts[:100]],
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        last = self.first_id + self.added - 1
        ids = f", ids {self.first_id:,} to {last:,}" if self.added else ""
        lines = [
            f"{self.added:,} new tokens{ids}; {self.tokens_before:,} -> {self.tokens_after:,} "
            f"({self.family})"
        ]
        if self.special:
            lines.append(f"{self.special:,} new special tokens behind them")
        if self.size:
            lines.append(self.size.why)
        lines += self._measures()
        lines += [
            f"never emitted: {self.dead} ({self.bridges} of them bridges: parts of other tokens); "
            f"emitted fewer than {self.min_count} times: {self.rare}",
            *self._proved(),
        ]
        if self.terms:
            lines += self.terms.lines()
        if self.in_parts:
            first = ", ".join(f"{character} {n:,}" for character, n in self.in_parts[:8])
            lines.append(
                f"{len(self.in_parts):,} characters of the corpus have no token of their own, "
                f"most frequent: {first}"
            )
        if self.addresses:
            lines.append(f"not learned from: {self.addresses:,} URLs and e-mail addresses")
        lines += [f"note: {limit}" for limit in self.limits]
        if self.dry_run:
            return [*lines, "nothing was written (--dry-run)"]
        return [*lines, f"next: lexigraft graft BASE {self.output} -o MODEL"]

    def _measures(self) -> Iterator[str]:
        if self.domain:
            which = "held-out" if self.domain_is_held_out else "learning"
            yield (
                f"domain text ({which}, {self.domain.bytes:,} bytes): "
                f"{self.domain.tokens_before:,} -> {self.domain.tokens_after:,} tokens, "
                f"{self.domain.ratio:.3f} of the base"
            )
        if self.general:
            yield (
                f"general text ({self.general.bytes:,} bytes): {self.general.tokens_before:,} -> "
                f"{self.general.tokens_after:,} tokens, {self.general.ratio:.4f} of the base"
            )
        if self.size and self.size.median is not None:
            yield (
                f"in training a new token is seen {self.size.median:,.0f} times (median), nine in "
                f"ten at least {self.size.low:,.0f} times"
            )
        if self.size and self.size.speed is not None:
            yield f"estimated speed on the domain text: {self.size.speed:.2f} times the base's"

    def _proved(self) -> Iterator[str]:
        engines = list(self.proof.engines)
        if self.loader.compared:
            engines.append("transformers")
        yield (
            f"proved on {self.proof.texts:,} texts with {' and '.join(engines)}: old ids kept, "
            f"texts only coarsened, drift {self.drift}, decoded as before"
        )
        if self.proof.base_differences:
            yield (
                f"the base's own files differ on {self.proof.base_differences:,} of these texts; "
                "each keeps its own reading"
            )
        if self.proof.unknown:
            yield f"{self.proof.unknown:,} of these texts hold what the base cannot spell"
        if self.loader.reason:
            yield f"not compared with transformers: {self.loader.reason}"


def learn(
    base: str | Path,
    *,
    corpus: Sequence[str | Path] = (),
    output: str | Path,
    general: Sequence[str | Path] = (),
    terms: Sequence[str | Path] = (),
    contrast: Sequence[str | Path] = (),
    pin: Sequence[str | Path] = (),
    ban: Sequence[str | Path] = (),
    special: Sequence[str | Path] = (),
    tokens: int | str = "auto",
    min_count: int | None = None,
    allow_more: bool = False,
    train_bytes: int | None = None,
    change_check_text: bool = False,
    from_vocab: str | Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
) -> LearnResult:
    """Learn new tokens from `corpus` and write the extended tokenizer to `output`.

    Method: continued BPE (Purason et al., arXiv 2512.03989) over the base's own segmentation of
    the corpus; new merges rank after all old ones.

    Args:
        base: folder (or hub id) with the tokenizer to extend.
        corpus: domain text: files, folders, globs, `hf:` data sets.
        output: the VOCAB folder to write.
        general: text that must not get worse; used to measure, not to learn.
        terms: lists of words that come first where the corpus holds them.
        contrast: text of other fields; tokens that are no more frequent in the corpus than there
            (log-odds with a Dirichlet prior, z < 1.96) are not learned.
        pin: lists of words that become tokens however rare they are.
        ban: lists of words that never become tokens.
        special: lists of new special tokens, which get the ids behind all others.
        tokens: how many, `"10%"` of the base's, or `"auto"`: all that the text supports, up to
            10% of the base's tokens, and no more than make the model fastest.
        min_count: the least number of occurrences of a new token on the learning text.
            Default: `SUPPORT` occurrences in `train_bytes` of text for "auto", `FLOOR` for a
            number of tokens asked for.
        allow_more: accept more than 10% of the base's tokens.
        train_bytes: UTF-8 bytes of text that training will see; default: the corpus once.
        change_check_text: keep tokens that llama.cpp's check text is read with.
        from_vocab: an earlier result on the same base, of which the first tokens are taken;
            nothing is learned then, and a corpus is only measured on.
        engine: where the corpus is counted: `local` processes or a `ray` cluster.
        workers: processes (or tasks at a time) that count; default: one per core.
        seed: recorded; learning itself is deterministic.
        force: replace `output`.
        dry_run: choose and prove, write nothing.

    Raises:
        LexigraftError: unusable input, or a law that the result would break.
    """
    output = Path(output)
    _refuse_odd_numbers({"--min-count": min_count, "--train-bytes": train_bytes})
    folder = local_folder(base)
    refuse_existing(output, force=force or dry_run)
    lists = [Path(str(spec).partition("#")[0]) for spec in (*terms, *pin, *ban, *special)]
    earlier = [Path(from_vocab)] if from_vocab is not None else []
    texts = [*text_files(corpus), *text_files(general), *text_files(contrast)]
    refuse_overwriting(output, [folder, *texts, *lists, *earlier])
    if not corpus and from_vocab is None:
        raise LexigraftError(
            "no corpus", needed="text of your field", fix="--corpus FILE (or --from VOCAB)"
        )
    choosing = (terms, contrast, pin, ban, min_count, train_bytes)
    if from_vocab is not None and any(choosing):
        raise LexigraftError(
            "--from with --terms, --contrast, --pin, --ban, --min-count or --train-bytes",
            needed="either: of an earlier result the first tokens are taken, whatever they are",
            fix="leave these out, or leave --from out and learn again",
        )
    with contextlib.closing(TransformersLoader()) as loader:
        family = families.load(folder)
        limit = _limit(tokens, family.map.tokens, allow_more=allow_more)
        words = _Lists(
            terms=_read_lists(terms), pins=_read_lists(pin), bans=_read_lists(ban),
            special=_read_special(family, special),
        )  # fmt: skip
        words.refuse_contradictions()
        if from_vocab is not None:
            picked = _cut(family, Path(from_vocab), None if tokens == "auto" else limit)
        else:
            learning = _Learning(
                family, corpus, contrast, words, tokens=tokens, limit=limit, min_count=min_count,
                train_bytes=train_bytes, check_text=not change_check_text, engine=engine,
                workers=workers,
            )  # fmt: skip
            loader.start()  # its imports take the core that choosing leaves free
            picked = learning.choose()
        words.refuse_clashes(picked.choice)
        settings = {
            "tokens": tokens, "min_count": min_count, "allow_more": allow_more,
            "train_bytes": train_bytes, "change_check_text": change_check_text, "seed": seed,
        }  # fmt: skip
        named = {
            "corpus": corpus, "general": general, "contrast": contrast, "terms": terms,
            "pin": pin, "ban": ban, "special": special,
        }  # fmt: skip
        with _work_folder(output, force=force, dry_run=dry_run) as partial:
            return _publish(
                family, picked, partial, output, loader,
                general=beginning(general, MEASURED_BYTES) if general else [],
                domain=picked.held_out or beginning(corpus, MEASURED_BYTES) if corpus else [],
                special=words.special, dry_run=dry_run, settings=settings, sources_of=named,
            )  # fmt: skip


def _refuse_odd_numbers(options: Mapping[str, int | None]) -> None:
    for name, number in options.items():
        if number is not None and not 1 <= number < 2**62:
            raise LexigraftError(
                f"{name} {number}", needed="a number from 1", fix=f"leave {name} out"
            )


@dataclass(frozen=True)
class _Lists:
    terms: list[Term]
    pins: list[Term]
    bans: list[Term]
    special: list[str]

    def banned(self, family: Family) -> Callable[[str], bool]:
        """Whether a token (as in the files) is a banned word in any spelling, or special."""
        tokens = {
            token for term in self.bans for v in variants(term.text) for token in family.written(v)
        }
        return (tokens | set(self.special)).__contains__

    def refuse_contradictions(self) -> None:
        """A word cannot be pinned and banned, nor be pinned and special."""
        banned = {variant: term.text for term in self.bans for variant in variants(term.text)}
        for term in self.pins:
            where = "--ban" if term.text in banned else "--special"
            if term.text in banned or term.text in self.special:
                raise LexigraftError(
                    f"{term.text!r} is pinned, and {where} has it too",
                    needed="each word in one of these lists",
                    fix=f"take {banned.get(term.text, term.text)!r} out of --pin or {where}",
                )

    def refuse_clashes(self, choice: Choice) -> None:
        """A special token cannot be a learned token of an earlier result."""
        for token in sorted({merge.token for merge in choice.merges}.intersection(self.special)):
            raise LexigraftError(
                f"--special {token!r} is a token that was learned",
                needed="another text for it: one text has one id",
                fix=f"leave {token!r} out of --special, or learn again with it",
            )


def _read_lists(specs: Sequence[str | Path]) -> list[Term]:
    words: dict[str, Term] = {}
    for spec in specs:
        found = read_words(spec)
        note(found.summary())
        for word in found.words:
            words.setdefault(word.text, word)
    return list(words.values())


def _read_special(family: Family, specs: Sequence[str | Path]) -> list[str]:
    found: dict[str, None] = {}
    for spec in specs:
        listed = read_special(spec, family.map.ids.keys())
        note(listed.summary())
        found.update(dict.fromkeys(word.text for word in listed.words))
    return list(found)


@dataclass(frozen=True)
class _Picked:
    """The tokens to add, and what is known of them before anything is written."""

    choice: Choice
    least: int
    wanted: Wanted
    held_out: list[str]
    size: Size | None = None
    contrast: Contrast | None = None
    stretches: Units | None = None
    addresses: int = 0
    chunks: Mapping[str, int] = field(default_factory=dict)


class _Learning:
    """One learning run: from a corpus to the chosen tokens."""

    def __init__(
        self,
        family: Family,
        corpus: Sequence[str | Path],
        contrast: Sequence[str | Path],
        lists: _Lists,
        *,
        tokens: int | str,
        limit: int,
        min_count: int | None,
        train_bytes: int | None,
        check_text: bool,
        engine: str,
        workers: int | None,
    ) -> None:
        self.family = family
        self.lists = lists
        self.tokens = tokens
        self.limit = limit
        self.train_bytes = train_bytes
        self.text = gather(
            family, corpus, measured=MEASURED_BYTES, special=lists.special, engine=engine,
            workers=workers,
        )  # fmt: skip
        self.contrast = self._contrast(contrast, engine, workers)
        self.least = min_count or _default_min_count(tokens, self.text.bytes, train_bytes)
        self.check_text = check_text

    def _contrast(
        self, specs: Sequence[str | Path], engine: str, workers: int | None
    ) -> Contrast | None:
        if not specs:
            return None
        other = gather(
            self.family, specs, measured=0, special=self.lists.special, engine=engine,
            workers=workers,
        )  # fmt: skip
        return Contrast(self.family, self.text.units, other.units)

    def choose(self) -> _Picked:
        family, text = self.family, self.text
        banned = self.lists.banned(family)
        # Counts are of a sample where the corpus is large: so is what is asked of them.
        least = max(1, math.ceil(self.least * text.counted.share))
        wanted = want(
            family, text.chunks, terms=self.lists.terms, pins=self.lists.pins, min_count=least,
            limit=self.limit, banned=banned,
        )  # fmt: skip
        asked = frozenset(wanted.tokens.values())
        judges = self._judges()
        if self.contrast is not None:
            self.contrast.asked = asked

        def chosen(limit: int) -> Choice:
            return choose(
                family, text.units, limit=limit, min_count=least, first=wanted.merges,
                asked=asked, pinned=wanted.pinned, banned=banned, judges=judges,
                refuse=self.contrast.refuse if self.contrast else None,
                budget=limit if self.contrast and self.tokens != "auto" else None,
            )  # fmt: skip

        choice = chosen(self.limit)
        _say_if_short(
            self.tokens, self.limit, self.least, choice, contrast=self.contrast is not None
        )
        size = self._size(choice)
        if size is not None and size.k < len(choice.merges):
            choice = chosen(size.k)
            size = replace(self._size(choice) or size, why=size.why)
        times = round(1 / text.counted.share)  # a share is 1, 1/2, 1/4 ...
        if times > 1:
            counts = {token: count * times for token, count in choice.counts.items()}
            choice = replace(choice, counts=counts, saved=choice.saved * times)
        return _Picked(
            choice, self.least, wanted, text.counted.held_out, size, self.contrast, text.units,
            text.addresses, text.chunks,
        )  # fmt: skip

    def _judges(self) -> list[Judge]:
        judges: list[Judge] = []
        if self.check_text and self.family.guaranteed:
            judges.append(check_text_judge(self.family))
        breakers = getattr(self.family, "breakers", None)
        if breakers is not None:
            stretches = ["".join(unit) for unit in self.text.units.to_tuples()]
            judges.append(lambda kept, _: set(breakers(kept, stretches)))
        return judges

    def _size(self, choice: Choice) -> Size | None:
        """How many of the chosen tokens are worth it, by the held-out text."""
        text = self.text
        if not choice.merges:
            return None
        held = text.counted.held_out
        measured = units_of_texts(self.family, held) if held else text.units
        saved = self.family.replay(measured, choice.merges).saved
        if held:
            tokens = sum(map(len, self.family.encode_batch(held)))
            size = sum(len(document.encode()) for document in held)
        else:
            tokens = text.units.total
            size = max(1, round(text.bytes * text.counted.share))
        return choose_size(
            saved, base_tokens=max(tokens, int(saved.sum()) + 1), text_bytes=size,
            vocabulary=self.family.map.tokens,
            requested=None if self.tokens == "auto" else self.limit,
            model=_model_size(self.family.folder),
            counts=[choice.counts[merge.token] for merge in choice.merges],
            counted_bytes=max(1, round(text.bytes * text.counted.share)),
            train_bytes=self.train_bytes or text.bytes,
        )  # fmt: skip


def _model_size(folder: Path) -> ModelSize | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    if not isinstance(config, dict):
        return None
    return model_size(config, tied=is_tied_by_config(config))


def _cut(family: Family, vocab: Path, size: int | None) -> _Picked:
    """The first tokens of an earlier result."""
    record = _earlier_record(family, vocab)
    rows = measure.read_rows(vocab / NEW_TOKENS, record.first_id, record.added)
    if size is not None and size > len(rows):
        raise LexigraftError(
            f"{vocab} has {len(rows):,} new tokens, --tokens asks for {size:,}",
            needed=f"at most {len(rows):,}",
            fix="learn from the corpus again for more",
        )
    if record.added > len(rows):
        note(
            f"{vocab} has {record.added - len(rows):,} special tokens behind its words: name them "
            "with --special to have them again"
        )
    merges, counts = measure.cut(rows, len(rows) if size is None else size)
    saved = np.array([merge.occurrences for merge in merges], dtype=np.int64)
    asked = {row["token"]: row["token"] for row in rows[: len(merges)] if row["origin"] == "term"}
    least = record.settings.get("least") or FLOOR
    wanted = Wanted(tokens=asked)
    return _Picked(Choice(merges, counts, saved), least, wanted, [])


def _earlier_record(family: Family, vocab: Path) -> LearnRecord:
    manifest = Manifest.read(vocab)
    record: LearnRecord | None = manifest.last("learn") if manifest else None
    if record is None or not (vocab / NEW_TOKENS).is_file():
        raise LexigraftError(
            f"{vocab} is no result of learn",
            needed=f"a folder with lexigraft.json and {NEW_TOKENS}",
            fix="--from VOCAB, the folder that learn wrote",
        )
    if record.base.token_map != family.map.hash:
        raise LexigraftError(
            f"{vocab} extends another base ({record.base.name}, {record.base.tokens:,} tokens)",
            needed=f"an extension of {family.folder} ({family.map.tokens:,} tokens)",
            fix=f"name the base that {vocab} was learned for",
        )
    return record


def _publish(
    base: Family,
    picked: _Picked,
    partial: Path,
    output: Path,
    loader: TransformersLoader,
    *,
    domain: list[str],
    general: list[str],
    special: list[str],
    dry_run: bool,
    settings: dict[str, Any],
    sources_of: Mapping[str, Sequence[str | Path]],
) -> LearnResult:
    """Write the extension, prove it, and measure it."""
    # A special token cuts the text that it stands in: the laws hold for what is between.
    domain, general = (between(texts, special) for texts in (domain, general))
    extended, choice = _written(base, picked, partial, special, [*domain, *general])
    first = base.map.tokens
    few = [*between(HARD_TEXTS, special), *_beginnings(domain), *_beginnings(general)]
    pool = ThreadPoolExecutor(1)  # the child reads while this process proves
    asked_loader = pool.submit(prove_loader, base, extended, few, loader)
    spelled = expansion(base, extended)
    hard = prove(base, extended, between(_hard_texts(extended, choice), special), spelled)
    domain_proof = prove(base, extended, domain, spelled)
    general_proof = prove(base, extended, general, spelled)
    proof = hard.plus(domain_proof).plus(general_proof)
    _prove_llama_cpp(base, extended, choice, domain)
    by_loader = asked_loader.result()
    _require_reachable(extended, choice, proof.emitted, picked.chunks)
    record = _record(base, extended, {**settings, "least": picked.least}, sources_of)
    (Manifest.read(base.folder) or Manifest()).plus(record).write(partial)
    specificity = None
    contrast = picked.contrast
    if contrast is None and general and picked.stretches is not None:
        contrast = Contrast(base, picked.stretches, units_of_texts(base, general))
    if contrast is not None:
        specificity = [float(z) for z in contrast.z_scores(choice.merges)]
    asked = frozenset(picked.wanted.tokens.values())
    rows = measure.new_tokens(extended, choice, spelled, specificity=specificity, terms=asked)
    (partial / NEW_TOKENS).write_text("".join(f"{row}\n" for row in rows), "utf-8")
    ids = {merge.token: extended.map.ids[merge.token] for merge in choice.merges}
    joined = choice.saved if base.guaranteed else [choice.counts[m.token] for m in choice.merges]
    formed = {m.token: int(n) for m, n in zip(choice.merges, joined, strict=True)}
    return LearnResult(
        output=output,
        family=base.name,
        added=len(choice.merges),
        tokens_before=first,
        tokens_after=extended.map.tokens,
        first_id=first,
        min_count=picked.least,
        domain=domain_proof.lengths if domain else None,
        domain_is_held_out=bool(picked.held_out),
        general=general_proof.lengths if general else None,
        drift=proof.drift,
        dead=sum(not choice.counts[merge.token] for merge in choice.merges),
        bridges=len(choice.bridges),
        rare=sum(0 < choice.counts[merge.token] < picked.least for merge in choice.merges),
        proof=proof,
        loader=by_loader,
        size=picked.size,
        terms=picked.wanted.table(formed, ids) if picked.wanted.reports else None,
        limits=tuple(extended.limits()),
        addresses=picked.addresses,
        in_parts=characters_in_parts(extended, picked.chunks),
        special=len(special),
        dry_run=dry_run,
    )


def _written(
    base: Family, picked: _Picked, partial: Path, special: Sequence[str], texts: Sequence[str]
) -> tuple[Family, Choice]:
    """The extension in `partial`, without tokens that break law 2 where it is no theorem."""
    choice = picked.choice
    while True:
        base.extend(choice.merges, partial)
        add_special(partial, special, base.map.tokens + len(choice.merges))
        extended = families.load(partial, own=True)
        if base.guaranteed:
            return extended, choice
        hard = between(_hard_texts(extended, choice), special)
        bad = offenders(base, extended, chain(hard, texts))
        if not bad.intersection(merge.token for merge in choice.merges):
            return extended, choice
        note(f"{len(bad):,} tokens dropped: with them a text would be cut differently")
        kept = [merge for merge in choice.merges if merge.token not in bad]
        counts = choice.counts
        saved = choice.saved[[m.token not in bad for m in choice.merges]]
        if picked.stretches is not None:
            again = base.replay(picked.stretches, kept)
            counts, saved = again.counts, again.saved
        choice = Choice(kept, counts, saved, choice.detours)


def _prove_llama_cpp(base: Family, extended: Family, choice: Choice, domain: Sequence[str]) -> None:
    """Law 5 for llama.cpp's SentencePiece tokenizer, simulated on some texts."""
    old, new = (getattr(family, "sentencepiece_proto", None) for family in (base, extended))
    if old is None or new is None:
        return
    words = [extended.token_bytes(extended.map.ids[m.token]) for m in choice.merges[:200]]
    texts = [
        *HARD_TEXTS,
        *(word.decode("utf-8", "replace") for word in words),
        *_beginnings(domain),
    ]
    before, after = simulate(old)(texts), simulate(new)(texts)
    for text, was, now, base_ids, ids in zip(
        texts, before, after, base.encode_batch(texts), extended.encode_batch(texts), strict=True
    ):
        if was == base_ids and now != ids:
            raise LexigraftError(
                f"law 5 is broken on {text[:200]!r}: llama.cpp's tokenizer would read it otherwise",
                needed="files that every engine of the base reads alike; nothing was written",
                fix="report this base tokenizer and text as a bug of lexigraft",
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
    if not 0 <= number < 2**31:
        raise LexigraftError(
            f"--tokens {tokens}", needed="a number, a share like 5%, or auto", fix="--tokens auto"
        )
    return int(number)


def _default_min_count(tokens: int | str, corpus_bytes: int, train_bytes: int | None) -> int:
    """Occurrences in the corpus that give `SUPPORT` (or `FLOOR`) in the training text."""
    target = SUPPORT if tokens == "auto" else FLOOR
    return max(1, math.ceil(target * corpus_bytes / (train_bytes or corpus_bytes or 1)))


def _say_if_short(
    tokens: int | str, limit: int, least: int, choice: Choice, *, contrast: bool
) -> None:
    added = len(choice.merges)
    if not limit:
        return
    how = "that occur" if not contrast else "of the field (beside --contrast) that occur"
    if tokens != "auto" and added < limit:
        note(
            f"asked for {limit:,} tokens, the corpus supports {added:,} {how} at least "
            f"{least:,} times; taking those (lower --min-count or add text for more)"
        )
    elif not added:
        note(
            f"no sequence {'of the field ' if contrast else ''}occurs {least:,} times in the "
            "corpus: 0 new tokens (lower --min-count or add text)"
        )


def _beginnings(texts: Sequence[str]) -> list[str]:
    return [text[:_FEW_CHARACTERS] for text in texts[:_FEW_TEXTS]]


def _hard_texts(extended: Family, choice: Choice) -> Iterator[str]:
    data = (extended.token_bytes(extended.map.ids[merge.token]) for merge in choice.merges)
    words = [word.decode("utf-8", "replace") for word in data]
    return chain(HARD_TEXTS, contexts(words), [long_text(words)])


def _require_reachable(
    extended: Family, choice: Choice, emitted: Mapping[int, int], chunks: Mapping[str, int]
) -> None:
    """Law 4: each token that is no bridge comes out of running text, as the engine reads it.

    Nearly all do in the proof, or what is made of them does. The others (without a leading space,
    or the first bytes of a character) are looked for where the corpus holds their letters.
    """
    ids = extended.map.ids
    alive = {m.token for m in choice.merges if emitted.get(ids[m.token])}
    alive = with_parts(choice.merges, frozenset(alive))
    left = [m.token for m in choice.merges if choice.counts[m.token] and m.token not in alive]
    if not left:
        return
    text = "\0".join(chunks)
    data = text.encode()
    for token in left:
        token_id = ids[token]
        if extended.pieces(token) == [token_id] and (
            not chunks or _comes_out(extended, token_id, data)
        ):
            continue
        raise LexigraftError(
            f"law 4 is broken: {token!r} never comes out of the text that it was counted in",
            needed="tokens that the engine emits; nothing was written",
            fix=f"report this {extended.name} base and corpus as a bug of lexigraft",
        )


def _comes_out(extended: Family, token_id: int, data: bytes) -> bool:
    """Whether the engine emits a token in one of the chunks (joined by NUL) that hold its bytes."""
    wanted = extended.token_bytes(token_id)
    place = data.find(wanted)
    tries: list[str] = []
    while place >= 0 and len(tries) < _MOST_TRIES:
        start, end = data.rfind(b"\0", 0, place) + 1, data.find(b"\0", place)
        chunk = data[start : end if end >= 0 else len(data)].decode()
        tries.append(chunk.removeprefix(extended.prefix))
        place = data.find(wanted, end) if end >= 0 else -1
    return any(token_id in ids for ids in extended.encode_batch(tries))


def _list_source(path: str) -> TextSource:
    """A word list of any form, a `.model` included, which is no text to learn from."""
    file = Path(path)
    return TextSource(name=file.name, sha256=sha256_file(file), bytes=file.stat().st_size)


def _record(
    base: Family,
    extended: Family,
    settings: dict[str, Any],
    sources_of: Mapping[str, Sequence[str | Path]],
) -> LearnRecord:
    texts: dict[str, list[TextSource]] = {
        name: [_list_source(str(spec).partition("#column=")[0]) for spec in specs]
        if name in ("terms", "pin", "ban", "special")
        else sources(specs)
        for name, specs in sources_of.items()
        if specs
    }
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
