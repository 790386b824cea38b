"""`learn`: choose new tokens from a corpus and write the extended tokenizer."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from itertools import islice
from pathlib import Path
from typing import Any

from lexigraft import families
from lexigraft.checkpoints.architectures import is_tied_by_config
from lexigraft.checkpoints.fit import ids_in_use
from lexigraft.checkpoints.survey import never_trained
from lexigraft.console import note, working
from lexigraft.corpus import beginning, held_out, sources, text_files
from lexigraft.errors import LexigraftError
from lexigraft.families import Family, llama_cpp, measure
from lexigraft.families.loader import LoaderProof, TransformersLoader, prove_loader
from lexigraft.families.proof import (
    HARD_TEXTS,
    Lengths,
    Proof,
    expansion,
    prove,
)
from lexigraft.families.replacing import without_tokens
from lexigraft.files import (
    Inputs,
    publish,
    read_json,
    refuse_existing,
    refuse_overwriting,
    sha256_file,
)
from lexigraft.hub import local_folder, recorded_name
from lexigraft.manifest import (
    NEW_TOKENS,
    BaseTokenizer,
    LearnRecord,
    Manifest,
    Probe,
    ReplacedToken,
    TextSource,
    versions,
)
from lexigraft.selection.acceptance import (
    beginnings,
    hard_texts,
    prove_llama_cpp,
    require_reachable,
    write_lawful,
)
from lexigraft.selection.gathering import (
    between,
    characters_in_parts,
    units_of_texts,
)
from lexigraft.selection.judges import Contrast
from lexigraft.selection.learning import (
    MEASURED_BYTES,
    Learning,
    Lists,
    Picked,
    cut_earlier,
    read_lists,
    read_special_tokens,
)
from lexigraft.selection.pruning import Reading
from lexigraft.selection.replacing import Replacement, choose_leaving
from lexigraft.selection.sizing import MAX_SHARE, ModelSize, Size, model_size
from lexigraft.selection.terms import TermTable

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
        replaced: the old tokens whose ids new ones have; None where none was to be replaced.
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
    replaced: Replacement | None = None

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
            **({"replaced": self.replaced.to_json()} if self.replaced else {}),
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        last = self.tokens_after - self.special - 1
        ids = f", ids {self.first_id:,} to {last:,}" if last >= self.first_id else ""
        if self.replaced:
            ids = f", {self.replaced.count:,} under old ids{ids and ', the others' + ids[1:]}"
        lines = [
            f"{self.added:,} new tokens{ids}; {self.tokens_before:,} -> {self.tokens_after:,} "
            f"({self.family})"
        ]
        if self.replaced:
            lines += self.replaced.lines()
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
            lines.append("nothing was written (--dry-run)")
        return lines

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


@working("learning new tokens")
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
    replace: int | None = None,
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
        replace: so many of the new tokens take the ids and rows of old ones: of tokens that no
            text has, then of those whose rows training never moved, then of the least used of
            `general` (`selection.replacing`). Without `tokens`, it is also how many there are in
            all, and nothing grows.
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
        LexigraftError: unusable input, too few tokens to replace, or a law that the result would
            break.
        RefusalError: a kind of tokenizer that cannot be extended so.
    """
    output = Path(output)
    _refuse_odd_numbers(
        {"--min-count": min_count, "--train-bytes": train_bytes, "--replace": replace}
    )
    tokens = _with_replaced(tokens, replace, from_vocab)
    folder = local_folder(base, weights=replace is not None)
    refuse_existing(output, force=force or dry_run)
    lists = [Path(str(spec).partition("#")[0]) for spec in (*terms, *pin, *ban, *special)]
    earlier = [local_folder(from_vocab, weights=False)] if from_vocab is not None else []
    texts = [*text_files(corpus), *text_files(general), *text_files(contrast)]
    read = [folder, *texts, *lists, *earlier]
    refuse_overwriting(output, read)
    inputs = Inputs(read)
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
        words = Lists(
            terms=read_lists(terms), pins=read_lists(pin), bans=read_lists(ban),
            special=read_special_tokens(family, special),
        )  # fmt: skip
        words.refuse_contradictions()
        measured = beginning(general, MEASURED_BYTES) if general else []
        gone: dict[int, str] = {}
        if replace is not None:
            if limit < replace:
                raise LexigraftError(
                    f"--tokens {tokens} with --replace {replace}",
                    needed="no more tokens to replace than there are new ones",
                    fix=f"--replace {limit}",
                )
            seen, measured = _apart(measured)
            gone = choose_leaving(
                family, replace,
                untrained=_untrained(folder, family),
                kept=_kept(family, check_text=not change_check_text),
                texts=[*seen, *_apart(beginning(corpus, MEASURED_BYTES))[0]],
                by_use=bool(general),
            )  # fmt: skip

        def pick(base: Family) -> Picked:
            if earlier:
                return cut_earlier(base, earlier[0], None if tokens == "auto" else limit)
            learning = Learning(
                base, corpus, contrast, words, tokens=tokens, limit=limit, min_count=min_count,
                train_bytes=train_bytes, model=_model_size(folder),
                check_text=not change_check_text, engine=engine, workers=workers,
            )  # fmt: skip
            loader.start()  # its imports take the core that choosing leaves free
            return learning.choose()

        settings = {
            "tokens": tokens, "min_count": min_count, "allow_more": allow_more,
            "train_bytes": train_bytes, "change_check_text": change_check_text, "seed": seed,
            **({} if replace is None else {"replace": replace}),
        }  # fmt: skip
        named = {
            "corpus": corpus, "general": general, "contrast": contrast, "terms": terms,
            "pin": pin, "ban": ban, "special": special,
        }  # fmt: skip
        with _work_folder(output, inputs, force=force, dry_run=dry_run) as partial:
            while True:
                with without_tokens(family, sorted(gone)) as left:
                    picked = pick(left)
                    words.refuse_clashes(picked.choice)
                    found = _publish(
                        left, picked, partial, output, loader,
                        whole=family, gone=gone, general=measured,
                        domain=picked.held_out or beginning(corpus, MEASURED_BYTES)
                        if corpus else [],
                        special=words.special, dry_run=dry_run, settings=settings,
                        sources_of=named,
                    )  # fmt: skip
                if isinstance(found, LearnResult):
                    return found
                # Fewer words than ids that were to be free: the tokens that go last stay.
                gone = dict(islice(gone.items(), found))


def _with_replaced(
    tokens: int | str, replace: int | None, from_vocab: str | Path | None
) -> int | str:
    """How many tokens are asked for, where so many are to be replaced."""
    if replace is None:
        return tokens
    if from_vocab is not None:
        raise LexigraftError(
            "--from with --replace",
            needed="either: pieces of earlier words may be among the tokens that go",
            fix="leave --from out and learn again",
        )
    return replace if tokens == "auto" else tokens


def _apart(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts to choose by, and others to measure on; where no text is held out, all are both."""
    kept = [text for text in texts if held_out(text)]
    seen = [text for text in texts if not held_out(text)]
    return seen or kept, kept or seen


def _untrained(folder: Path, family: Family) -> frozenset[int]:
    found = never_trained(folder, family.map.tokens)
    if found is None:
        note(f"{folder} holds no weights: which rows training never moved is not known")
    return found or frozenset()


def _kept(family: Family, *, check_text: bool) -> set[int]:
    """Ids that must not be given away: the configs use them, or llama.cpp's check text."""
    kept = set(ids_in_use(family.folder))
    return kept.union(family.encode(llama_cpp.check_text())) if check_text else kept


def _refuse_odd_numbers(options: Mapping[str, int | None]) -> None:
    for name, number in options.items():
        if number is not None and not 1 <= number < 2**62:
            raise LexigraftError(
                f"{name} {number}", needed="a number from 1", fix=f"leave {name} out"
            )


def _model_size(folder: Path) -> ModelSize | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    if not isinstance(config, dict):
        return None
    return model_size(config, tied=is_tied_by_config(config))


def _publish(
    base: Family,
    picked: Picked,
    partial: Path,
    output: Path,
    loader: TransformersLoader,
    *,
    whole: Family,
    gone: Mapping[int, str],
    domain: list[str],
    general: list[str],
    special: list[str],
    dry_run: bool,
    settings: dict[str, Any],
    sources_of: Mapping[str, Sequence[str | Path]],
) -> LearnResult | int:
    """Write the extension, prove it, and measure it.

    Args:
        base: the base, without the tokens that are `gone`.
        whole: the base as it is.

    Returns:
        The result; or, where new words are fewer than tokens are gone, how many there are.
    """
    # A special token cuts the text that it stands in: the laws hold for what is between.
    domain, general = (between(texts, special) for texts in (domain, general))
    extended, choice = write_lawful(base, picked, partial, special, [*domain, *general])
    if len(choice.merges) < len(gone):
        return len(choice.merges)
    first = base.map.tokens
    few = [*between(HARD_TEXTS, special), *beginnings(domain), *beginnings(general)]
    spelled = expansion(base, extended)
    with ThreadPoolExecutor(1) as pool:  # the child reads while this process proves
        asked_loader = pool.submit(prove_loader, base, extended, few, loader)
        hard = prove(base, extended, between(hard_texts(extended, choice), special), spelled)
        domain_proof = prove(base, extended, domain, spelled)
        general_proof = prove(base, extended, general, spelled)
        prove_llama_cpp(base, extended, choice, domain)
        by_loader = asked_loader.result()
    proof = hard.plus(domain_proof).plus(general_proof)
    require_reachable(extended, choice, proof.emitted, picked.chunks)
    record = _record(whole, base, extended, {**settings, "least": picked.least}, sources_of)
    (Manifest.read(whole.folder) or Manifest()).plus(record).write(partial)
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
    replaced = None
    if gone:
        reasons = list(gone.values())
        replaced = Replacement.of(whole, base, reasons, domain=domain, general=general)
    return LearnResult(
        output=output,
        family=base.name,
        added=len(choice.merges),
        tokens_before=first,
        tokens_after=extended.map.tokens,
        first_id=first,
        min_count=picked.least,
        domain=_lengths(domain_proof, replaced.domain if replaced else None),
        domain_is_held_out=bool(picked.held_out),
        general=_lengths(general_proof, replaced.general if replaced else None),
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
        replaced=replaced,
    )


def _lengths(proof: Proof, without: Reading | None) -> Lengths | None:
    """A text under base and extension; None where there is no text."""
    if not proof.texts:
        return None
    if without is None:
        return proof.lengths
    return replace_fields(proof.lengths, tokens_before=without.tokens_before)


@contextlib.contextmanager
def _work_folder(output: Path, inputs: Inputs, *, force: bool, dry_run: bool) -> Iterator[Path]:
    """Where to write: the future output, or a folder that goes away after a dry run."""
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="lexigraft-") as scratch:
            yield Path(scratch)
    else:
        with publish(output, force=force, inputs=inputs) as partial:
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


def _list_source(path: str) -> TextSource:
    """A word list of any form, a `.model` included, which is no text to learn from."""
    file = Path(path)
    return TextSource(name=file.name, sha256=sha256_file(file), bytes=file.stat().st_size)


def _record(
    whole: Family,
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
        base=BaseTokenizer(
            name=recorded_name(whole.folder), token_map=whole.map.hash, tokens=whole.map.tokens
        ),
        family=base.name,
        token_map=extended.map.hash,
        content=extended.content_hash,
        tokens=extended.map.tokens,
        first_id=base.map.tokens,
        added=len(families.new_ids(base, extended.map)),
        settings=settings,
        sources=texts,
        versions=versions(["lexigraft", "numpy", "sentencepiece", "tokenizers"]),
        probe=[Probe(text=text, ids=extended.encode(text)) for text in _PROBES],
        replaced=[
            ReplacedToken(id=i, old=whole.map.texts[i], new=extended.map.texts[i])
            for i in base.vacant
        ],
    )
