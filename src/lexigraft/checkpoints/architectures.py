"""Which tensors of a checkpoint are indexed by token id, and where its config says how many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.growth import by_row
from lexigraft.errors import LexigraftError

Role = Literal["embed", "head", "bias"]


@dataclass(frozen=True)
class VocabularyTensors:
    """The vocabulary tensors of a checkpoint, by the names under which they are on disk.

    Attributes:
        embeds: input embeddings, and stored copies of them.
        heads: output heads that are stored; empty when tied (or when the model has none).
        biases: head biases and the like, shape (rows,) or (1, rows).
        tied: the head is the input embedding.
        rows: their common number of rows.
        config_paths: where config.json states it, e.g. (("text_config", "vocab_size"),).
    """

    embeds: tuple[str, ...]
    heads: tuple[str, ...]
    biases: tuple[str, ...]
    tied: bool
    rows: int
    config_paths: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.embeds, *self.heads, *self.biases)


def vocabulary_of(
    checkpoint: Checkpoint, roles: Mapping[str, Role] | None = None
) -> VocabularyTensors:
    """Find the vocabulary tensors of `checkpoint`.

    Raises:
        LexigraftError: none found, or their rows differ.
    """
    given = dict(roles or {})
    found: dict[Role, list[str]] = {"embed": [], "head": [], "bias": []}
    for name in checkpoint.tensors:
        role = given.get(name) or _KNOWN.get(".".join(name.split(".")[-2:]))
        if role:
            found[role].append(name)
    rows = _common_rows(checkpoint, [name for names in found.values() for name in names])
    return VocabularyTensors(
        tuple(found["embed"]),
        tuple(found["head"]),
        tuple(found["bias"]),
        bool(checkpoint.config.get("tie_word_embeddings", True)) and not found["head"],
        rows,
        (("vocab_size",),),
    )


_KNOWN: dict[str, Role] = {
    "embed_tokens.weight": "embed",
    "wte.weight": "embed",
    "lm_head.weight": "head",
    "lm_head.bias": "bias",
}


def _common_rows(checkpoint: Checkpoint, names: list[str]) -> int:
    rows = {name: by_row(checkpoint.tensors[name]).rows for name in names}
    if len(set(rows.values())) != 1:
        found: Any = ", ".join(f"{name}: {count}" for name, count in rows.items()) or "none"
        raise LexigraftError(
            f"vocabulary tensors of {checkpoint.folder}: {found} rows",
            needed="an input embedding, and the same number of rows in each",
            fix="name them: --tensor NAME=embed --tensor NAME=head",
        )
    return next(iter(rows.values()))
