"""Whether weights, config and tokenizers belong together: before any work, and once it is done."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lexigraft.checkpoints.architectures import VocabularyTensors, vocabulary_of
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.config import config_rows, refuse_quantised
from lexigraft.checkpoints.header import FLOATS
from lexigraft.checkpoints.nested import get, paths_to, text_parts
from lexigraft.checkpoints.token_ids import ID_KEY, stated_ids
from lexigraft.checkpoints.tying import as_loaded
from lexigraft.console import note
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap, first_difference, without
from lexigraft.files import read_settings


def require_floats(checkpoint: Checkpoint, vocabulary: VocabularyTensors) -> None:
    """Raise a RefusalError unless every vocabulary tensor has a type that can be averaged."""
    for name in vocabulary.names:
        dtype = checkpoint.tensors[name].dtype
        if dtype not in FLOATS:
            raise RefusalError(
                f"{name} of {checkpoint.folder} is stored as {dtype}",
                needed="one of " + ", ".join(FLOATS),
                fix="use the checkpoint before quantisation",
            )


def require_computable(checkpoint: Checkpoint, vocabulary: VocabularyTensors) -> None:
    """Raise unless vocabulary tensors can be averaged and have as many rows as the config says.

    Raises:
        RefusalError: see `require_floats`.
        LexigraftError: config.json states another number of rows than the weights have.
    """
    require_floats(checkpoint, vocabulary)
    stated = config_rows(checkpoint, vocabulary)
    if stated not in (None, vocabulary.rows):
        raise LexigraftError(
            f"{checkpoint.folder / 'config.json'} says vocab_size {stated:,}, the weights have "
            f"{vocabulary.rows:,} rows",
            needed="the same number in both",
            fix=f"lexigraft check {checkpoint.folder}",
        )


def open_whole(folder: Path) -> tuple[Checkpoint, VocabularyTensors]:
    """A checkpoint that is to be computed with, and its vocabulary tensors as loaders see them.

    Raises:
        RefusalError: its weights are quantised, or stored in a type that cannot be averaged.
        LexigraftError: config.json states another number of rows than the weights have.
    """
    checkpoint = Checkpoint.open(folder)
    refuse_quantised(checkpoint)
    vocabulary = as_loaded(checkpoint, vocabulary_of(checkpoint))
    require_computable(checkpoint, vocabulary)
    return checkpoint, vocabulary


def require_consistent(
    folder: Path, *, rows: int, tokens: TokenMap, vocabulary: VocabularyTensors
) -> None:
    """Reopen what was written: rows of each vocabulary tensor == config == `rows` >= tokens.

    Args:
        folder: the result.
        rows: what was planned.
        tokens: the tokenizer that was planned; the written one has to be it, id by id.
        vocabulary: of the input: all places of its config that told its rows tell `rows` now.

    Raises:
        LexigraftError: they are not.
    """
    written = Checkpoint.open(folder)
    found = vocabulary_of(written)
    main, *others = vocabulary.config_paths
    stated = {".".join(path): get(written.config, path) for path in others}
    stated[".".join(main)] = config_rows(written, found)
    own = TokenMap.read(folder)
    wrong = [f"{key} {value}" for key, value in stated.items() if value != rows]
    if wrong or found.rows != rows or rows < own.tokens:
        raise LexigraftError(
            f"the result has {found.rows:,} rows, its config says "
            f"{', '.join(wrong) or f'{rows:,}'}, its tokenizer has {own.tokens:,} tokens",
            needed=f"{rows:,} rows, in the config too, and one for every token",
            fix="report this with the config.json of every input",
        )
    if own.hash != tokens.hash:
        moved = min(dict(own.texts.items() ^ tokens.texts.items()))
        there, wanted = (
            repr(one.texts[moved]) if moved in one.texts else "nothing" for one in (own, tokens)
        )
        raise LexigraftError(
            f"the tokenizer of the result is not the one that its rows were made for: id {moved} "
            f"is {there}",
            needed=f"{wanted} under id {moved}",
            fix="report this with the tokenizer files of every input",
        )


def require_extension(
    base: Path, old: TokenMap, vocab: Path, new: TokenMap, replaced: Collection[int] = ()
) -> None:
    """Old ids mean the same text in both, but for the `replaced` ones; new ones come after all."""
    moved = first_difference(without(old, replaced), new)
    if moved is not None:
        there = repr(new.texts[moved]) if moved in new.texts else "nothing"
        raise LexigraftError(
            f"the tokenizer in {vocab} is not one that the weights of {base} belong to: "
            f"id {moved} is {old.texts[moved]!r} in {base} and {there} in {vocab}",
            needed="an extension of the base's tokenizer, in which every old id keeps its text",
            fix=f"lexigraft learn {base} --corpus TEXT -o VOCAB",
        )
    tokens = old.tokens
    filled = min((i for i in new.texts.keys() - old.texts.keys() if i < tokens), default=None)
    if filled is not None:
        raise RefusalError(
            f"{vocab} puts {new.texts[filled]!r} at id {filled}, a gap below the base's last id "
            f"{tokens - 1}",
            needed=f"new tokens from id {tokens} on",
            fix=f"lexigraft learn {base} --corpus TEXT -o VOCAB",
        )
    if new.tokens == tokens and not replaced:
        raise LexigraftError(
            f"{vocab} adds no token to the {tokens:,} of {base}",
            needed="an extended tokenizer",
            fix=f"lexigraft learn {base} --corpus TEXT -o VOCAB",
        )


def require_fitting_rows(
    checkpoint: Checkpoint, vocabulary: VocabularyTensors, base_tokens: int, tokens: int
) -> None:
    """Every token of the base has a row. Where the config says another number, rows are believed.

    Raises:
        LexigraftError: the base's tokenizer was extended already, its weights were not.
    """
    stated, rows, folder = config_rows(checkpoint, vocabulary), vocabulary.rows, checkpoint.folder
    key = ".".join(vocabulary.config_paths[0])
    numbers = (
        f"{folder}: the weights have {rows:,} rows, config.json says {stated or rows:,}, "
        f"its tokenizer has {base_tokens:,} tokens"
    )
    if base_tokens > rows:
        raise LexigraftError(
            f"{numbers}: which of them the weights belong to cannot be known from here",
            needed=f"the tokenizer that these weights came with, of at most {rows:,} tokens",
            fix=f"put the original tokenizer files back into {folder} (config.json may stay) and "
            f"give the extended tokenizer as VOCAB: lexigraft graft {folder} VOCAB -o MODEL",
        )
    if stated is not None and stated != rows:
        note(
            f"{numbers}, VOCAB has {tokens:,}: config.json was changed by hand; the weights are "
            f"believed, and {key} becomes what the result has"
        )


def mention_normalised_head(checkpoint: Checkpoint, vocabulary: VocabularyTensors) -> None:
    """Say what a NormHead does (Baichuan 2), whose code lies in the folder of the model."""
    code = checkpoint.folder.glob("modeling_*.py")
    if vocabulary.heads and any("NormHead" in path.read_text("utf-8", "replace") for path in code):
        note(
            f"{vocabulary.head_name} is a NormHead: it normalises each row, so that the length of "
            "new rows has no effect, and padding rows score like tokens"
        )


_CONFIGS = ("config.json", "generation_config.json")


def ids_in_use(folder: Path) -> frozenset[int]:
    """The token ids to which the configs in a model's folder give a meaning."""
    return frozenset[int]().union(*(stated_ids(read_settings(folder / name)) for name in _CONFIGS))


def require_free_ids(
    checkpoint: Checkpoint, old: TokenMap, new: TokenMap, replaced: Collection[int] = ()
) -> None:
    """No config gives a meaning to an id that now gets a token, be it a padding row so far or not.

    Raises:
        RefusalError: one does; the row behind it would change under what uses it.
    """
    lost = sorted(ids_in_use(checkpoint.folder).intersection(replaced))
    if lost:
        raise RefusalError(
            f"VOCAB replaces {old.texts[lost[0]]!r} (id {lost[0]}), which the configs of "
            f"{checkpoint.folder} use",
            needed="other tokens to be replaced: this row would change under what uses it",
            fix=f"lexigraft learn {checkpoint.folder} --replace N, which leaves such tokens alone",
        )
    for name in _CONFIGS:
        path = checkpoint.folder / name
        for key, token_id in _stated_ids(read_settings(path)):
            if token_id >= old.tokens and token_id in new.texts:
                raise RefusalError(
                    f"{path}: {key} is {token_id}, an id that the base's tokenizer of "
                    f"{old.tokens:,} tokens does not have and VOCAB gives to "
                    f"{new.texts[token_id]!r}",
                    needed=f"{key} below {old.tokens:,}, or a base tokenizer that has this token",
                    fix=f"add the missing token to the tokenizer of {checkpoint.folder} before "
                    f"extending it, or set {key} to an id that it has",
                )


def _stated_ids(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    keys = {key for part in text_parts(config) for key in part if ID_KEY.search(key)}
    for path in paths_to(config, sorted(keys)):
        value = get(config, path)
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int) and not isinstance(token_id, bool):
                yield ".".join(path), token_id
