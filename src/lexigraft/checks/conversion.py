"""A tokenizer on its way to GGUF: written with the gguf package, read back, and compared.

Method: how llama.cpp's convert_hf_to_gguf.py fills the token list (`_create_vocab_sentencepiece`,
`get_vocab_base`, and `LlamaHfVocab` of the gguf package), and how llama.cpp reads texts with it.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lexigraft.checkpoints.gguf_header import read_gguf_header
from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Finding, finding
from lexigraft.checks.gguf_files import BYTE, CONTROL, NORMAL, TOKENS, UNUSED, USER_DEFINED
from lexigraft.checks.weights import stated_rows
from lexigraft.errors import LexigraftError
from lexigraft.families.llama_cpp import BYTE_PIECE, SPACE, check_text, simulate
from lexigraft.families.loader import TransformersLoader
from lexigraft.families.proof import HARD_TEXTS
from lexigraft.families.rank_files import is_tiktoken
from lexigraft.families.tokenmap import TokenMap, parse_sentencepiece, tokenizer_data
from lexigraft.manifest import PruneRecord

MODEL, FAST, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_BPE = 2  # sentencepiece_model.proto, TrainerSpec.ModelType
_NEW_TEXTS = 300  # at most so many new tokens are read each for itself
_MOST_ROWS = 2**20  # four times the largest vocabulary; files may state any number
# What the converter gives tokens that the model file does not score.
_UNSCORED, _PADDED = -1000.0, -10000.0


@dataclass(frozen=True)
class Converted:
    """What the converter makes of a tokenizer: one entry per id."""

    kind: str
    texts: list[str]
    scores: list[float]
    types: list[int]
    prefix: bool


def conversion_findings(facts: Facts, origin: Facts | None) -> Iterator[Finding]:
    """What llama.cpp's converter, and llama.cpp with its result, do with a tokenizer.

    Raises:
        LexigraftError: the gguf package is not installed.
    """
    if facts.tokens is None:
        return
    if importlib.util.find_spec("gguf") is None:
        raise LexigraftError(
            "--for gguf writes a GGUF file and reads it back, and gguf is not installed",
            needed="the gguf package",
            fix="pip install 'lexigraft[gguf]'",
        )
    entries = max(_stated(facts) or 0, facts.tokens.tokens)
    if entries > _MOST_ROWS:
        yield _unconverted(
            f"would be a list of {entries:,} tokens, by vocab_size in config.json or its highest id"
        )
        return
    converted = _convert(facts)
    if converted is None:
        yield finding(
            "LG915",
            "tokenizer",
            "is neither BPE with byte fallback nor byte-level BPE: the converter reads it in a way "
            "of each architecture's own, which is not looked at here",
        )
        return
    try:
        read_back = _round_trip(facts.folder, converted)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as fault:
        yield _unconverted(f"cannot be written ({type(fault).__name__}: {fault})")
        return
    yield from _lost(facts, facts.tokens, converted, read_back)
    new = facts.new_ids(origin, "learn")
    if converted.kind == "llama":
        yield from _other_ids(facts, facts.tokens, converted, read_back, new)
    elif facts.manifest is not None and (pruned := facts.manifest.last("prune")) is not None:
        yield from _renumbered(facts, pruned)
    elif new is not None:  # else what its own converter knows it by is not known here
        yield from _check_text(facts, facts.tokens, origin, new)


def _convert(facts: Facts) -> Converted | None:
    tokens = facts.tokens
    if tokens is None:
        return None
    stated = _stated(facts)
    rows = tokens.tokens if stated is None else stated
    path = facts.folder / MODEL
    data = path.read_bytes() if MODEL in facts.maps else b""
    if data and not is_tiktoken(data):
        proto = parse_sentencepiece(data, path)
        return _from_pieces(facts, proto, rows) if proto.trainer_spec.model_type == _BPE else None
    model = tokenizer_data(facts.folder / FAST)["model"] if FAST in facts.maps else {}
    if model.get("type") != "BPE":
        return None
    if model.get("byte_fallback"):
        return _listed("llama", tokens, tokens.tokens, _UNSCORED)
    return _listed("gpt2", tokens, rows, 0.0)


def _stated(facts: Facts) -> int | None:
    """The number of rows in config.json, by which the converter goes; None if it has none."""
    return next(iter(stated_rows(facts.config.get("config.json", {})).values()), None)


def _from_pieces(facts: Facts, proto: Any, rows: int) -> Converted:
    """`_create_vocab_sentencepiece`: the pieces, then added tokens where they have a row."""
    texts = [f"[PAD{i}]" for i in range(rows)]
    scores, types = [_PADDED] * rows, [UNUSED] * rows
    for i, piece in enumerate(proto.pieces[:rows]):
        texts[i], scores[i], types[i] = piece.piece, piece.score, piece.type
    for name in ("added_tokens.json", SETTINGS):
        added = facts.maps.get(name, TokenMap({}))
        for i, text in added.texts.items():
            if i < rows and types[i] == UNUSED:
                special = i in added.special
                texts[i] = text if special else text.replace(SPACE, " ")
                scores[i], types[i] = _UNSCORED, CONTROL if special else USER_DEFINED
    return Converted("llama", texts, scores, types, bool(proto.normalizer_spec.add_dummy_prefix))


def _listed(kind: str, tokens: TokenMap, rows: int, score: float) -> Converted:
    """`get_vocab_base` and `LlamaHfVocab`: every id below `rows`, in their order."""
    texts, types = [], []
    for i in range(rows):
        text = tokens.texts.get(i, f"[PAD{i}]")
        if i not in tokens.texts:
            types.append(UNUSED)
        elif i in tokens.special:
            types.append(CONTROL)
        elif i in tokens.added:
            text = text.replace(SPACE, " ")
            types.append(USER_DEFINED)
        else:
            is_byte = kind == "llama" and BYTE_PIECE.fullmatch(text)
            types.append(BYTE if is_byte else NORMAL)
        texts.append(text)
    return Converted(kind, texts, [score] * rows, types, True)


def _round_trip(folder: Path, converted: Converted) -> list[str]:
    """The token list, written with merges and special ids by the gguf package, and read back."""
    with tempfile.TemporaryDirectory(prefix="lexigraft-") as scratch:
        path = Path(scratch) / "vocab.gguf"
        writer = gguf_writer(folder, converted, path)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        # The package's own reader takes ten times as long.
        return read_gguf_header(path).texts(TOKENS)


def gguf_writer(folder: Path, converted: Converted, path: Path) -> Any:
    """A writer of the gguf package for `path`, given tokens, merges and special ids."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(converted.kind)
    writer.add_token_list([t.encode("utf-8", "surrogatepass") for t in converted.texts])
    writer.add_token_scores(converted.scores)
    writer.add_token_types(converted.types)
    # It warns of templates that it cannot follow, in the words of the file.
    logging.getLogger("gguf").setLevel(logging.CRITICAL)
    special = gguf.SpecialVocab(
        folder, load_merges=converted.kind == "gpt2", n_vocab=len(converted.texts)
    )
    special.add_to_gguf(writer, quiet=True)
    return writer


def _unconverted(found: str) -> Finding:
    return finding(
        "LG913",
        "tokenizer",
        found,
        needed="one entry of the token list for each row, with the text of its id",
        fix="lexigraft check MODEL, and mend what it finds first; where rows are padded, put the "
        f"model's {MODEL} beside {FAST}",
    )


def _lost(
    facts: Facts, tokens: TokenMap, converted: Converted, read_back: Sequence[str]
) -> Iterator[Finding]:
    """Each id of the tokenizer against the list that was read back."""
    wrong = [
        i
        for i, text in sorted(tokens.texts.items())
        if i >= len(read_back) or read_back[i].replace(" ", SPACE) != text.replace(" ", SPACE)
    ]
    if wrong:
        there = repr(read_back[wrong[0]]) if wrong[0] < len(read_back) else "left out"
        said = _stated(facts)
        yield _unconverted(
            f"loses {len(wrong):,} ids in the conversion, the first is {wrong[0]} "
            f"({tokens.texts[wrong[0]]!r}, then {there}): the tokenizer has {tokens.tokens:,} "
            f"tokens, the list {len(converted.texts):,}"
            + (f" because config.json says vocab_size = {said:,}" if said else "")
        )
    rows = facts.rows or _stated(facts)
    if rows is not None and rows != len(read_back) and not wrong:
        yield _unconverted(
            f"becomes a list of {len(read_back):,} tokens for {rows:,} rows: without {MODEL} the "
            "converter does not name padding, and llama.cpp stops with `wrong shape`"
        )
    double = len(read_back) - len(set(read_back))
    if double and not wrong:
        yield _unconverted(f"has {double:,} texts with two ids, with which llama.cpp ends")


def _texts(facts: Facts, tokens: TokenMap, new_ids: Collection[int] | None) -> Iterator[str]:
    """What both are to read: hard texts, the manifest's probe, new tokens in a sentence."""
    literal = [tokens.texts[i] for i in tokens.added | tokens.special]
    record = facts.manifest.last("learn") if facts.manifest else None
    new = [
        tokens.texts[i].replace(SPACE, " ").strip()
        for i in sorted(tokens.texts.keys() - tokens.added)
        if new_ids is not None and i in new_ids
    ]
    for text in (
        *HARD_TEXTS,
        *(probe.text for probe in (record.probe if record else [])),
        *(f"so {one} and {one}" for one in new[:: max(1, len(new) // _NEW_TEXTS)]),
    ):
        # Special tokens are matched in a text by rules of their own.
        if text and not any(one in text for one in literal if one):
            yield text


def _check_text(
    facts: Facts, tokens: TokenMap, origin: Facts | None, new: Collection[int]
) -> Iterator[Finding]:
    """Does the extension read the text by which the converter knows a tokenizer as the base did?"""
    with TransformersLoader() as loader:
        ids = loader.encode(facts.folder, [check_text()])
        if ids is None:
            return  # nothing to compare with; the tokenizer's own findings say why
        changed = [i for i in ids[0] if i in new]
        if not changed:
            if origin is None or origin.tokens is None or origin.gguf is not None:
                return
            if loader.encode(origin.folder, [check_text()]) in (None, ids):
                return
    token = f": its new token {tokens.texts.get(changed[0])!r} is in it" if changed else ""
    yield finding(
        "LG911",
        "tokenizer",
        f"reads llama.cpp's check text otherwise than its base{token}; the converter stops with "
        "`BPE pre-tokenizer was not recognized`",
        needed="the base's ids for that text",
        fix="lexigraft learn BASE --corpus TEXT -o VOCAB, which leaves such tokens out",
    )


def _renumbered(facts: Facts, pruned: PruneRecord) -> Iterator[Finding]:
    """Do the tokens of the text by which the converter knows a tokenizer have other ids since?"""
    with TransformersLoader() as loader:
        ids = loader.encode(facts.folder, [check_text()])
    if ids is None:
        return  # nothing to compare with; the tokenizer's own findings say why
    moved = [(old, new) for old, new in pruned.places.items() if old != new and new in ids[0]]
    if moved:
        old, new = moved[0]
        yield finding(
            "LG911",
            "tokenizer",
            f"was pruned: {len(moved)} tokens of llama.cpp's check text have other ids since (the "
            f"first {new}, in the base {old}); the converter stops with `BPE pre-tokenizer was not "
            "recognized`",
            needed="a converter that is told the name of the base's pre-tokenizer",
            fix="convert it by the command in docs/prune.md, under GGUF",
        )


def _other_ids(
    facts: Facts,
    tokens: TokenMap,
    converted: Converted,
    texts: Sequence[str],
    new: Collection[int] | None,
) -> Iterator[Finding]:
    """llama.cpp joins pieces by their scores; do the files of the tokenizer?"""
    spelled = {
        text.upper()
        for text, kind in zip(texts, converted.types, strict=True)
        if kind == BYTE and BYTE_PIECE.fullmatch(text)
    }
    if len(spelled) < 256:
        return  # llama.cpp has no ids for the bytes that it would fall back to
    given = list(_texts(facts, tokens, new))
    with TransformersLoader() as loader:
        ids = loader.encode(facts.folder, given)
    if ids is None:
        return  # nothing to compare with; the tokenizer's own findings say why
    pieces = [
        SimpleNamespace(piece=text.replace(" ", SPACE), score=score, type=kind)
        for text, score, kind in zip(texts, converted.scores, converted.types, strict=True)
    ]
    proto = SimpleNamespace(
        pieces=pieces, normalizer_spec=SimpleNamespace(add_dummy_prefix=converted.prefix)
    )
    differing = [
        (text, one, own)
        for text, one, own in zip(given, simulate(proto)(given), ids, strict=True)
        if one != own
    ]
    scored = len(set(converted.scores)) > 2  # those of pieces, of added tokens, of padding
    ours = [
        (text, one, own)
        for text, one, own in differing
        if not text.startswith((" ", SPACE))  # the base is read otherwise there as well
        and (not scored or not set(new or ()).isdisjoint([*one, *own]))
    ]
    if not differing:
        return
    text, one, own = (ours or differing)[0]
    found = (
        f"is read otherwise by llama.cpp, which joins pieces by their scores: {text!r} is {one} "
        f"there and {own} in transformers ({len(differing)} of {len(given)} texts)"
    )
    if not ours:
        yield finding("LG916", "tokenizer", found)
        return
    yield finding(
        "LG912",
        "tokenizer",
        found,
        needed="scores in the order of the merges",
        fix="lexigraft learn BASE --corpus TEXT -o VOCAB, which writes such scores"
        if scored
        else f"put the tokenizer.model beside {FAST}: without it every score is the same",
    )
