"""Whether weights, config and tokenizers belong together, asked before any work."""

from __future__ import annotations

from pathlib import Path

from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.config import config_rows
from lexigraft.checkpoints.header import FLOATS
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import TokenMap, first_difference


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


def require_extension(base: Path, old: TokenMap, vocab: Path, new: TokenMap) -> None:
    """Old ids mean the same text in both, and new ones come after all of them."""
    moved = first_difference(old, new)
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
    if new.tokens == tokens:
        raise LexigraftError(
            f"{vocab} adds no token to the {tokens:,} of {base}",
            needed="an extended tokenizer",
            fix=f"lexigraft learn {base} --corpus TEXT -o VOCAB",
        )


def require_fitting_rows(
    checkpoint: Checkpoint, vocabulary: VocabularyTensors, base_tokens: int, tokens: int
) -> None:
    """Weights, config and base tokenizer agree; where not, the weights are believed."""
    stated, rows, folder = config_rows(checkpoint, vocabulary), vocabulary.rows, checkpoint.folder
    numbers = (
        f"{folder}: the weights have {rows:,} rows, config.json says {stated or 0:,}, "
        f"its tokenizer has {base_tokens:,} tokens"
    )
    key = ".".join(vocabulary.config_paths[0])
    if base_tokens > rows:
        raise LexigraftError(
            f"{numbers} ({folder / 'config.json'} or the tokenizer was changed by hand)",
            needed=f"a base tokenizer of at most {rows:,} tokens",
            fix=f"put the original tokenizer files back into {folder}, set {key} to {rows} there, "
            f"and give the extended tokenizer as VOCAB: lexigraft graft {folder} VOCAB -o MODEL",
        )
    if stated is not None and stated != rows:
        raise LexigraftError(
            f"{numbers} (config.json was changed by hand); VOCAB has {tokens:,}",
            needed=f"{key} = {rows}, the number of rows that the weights have",
            fix=f"set {key} to {rows} in {folder / 'config.json'}; graft itself adds the rows",
        )
