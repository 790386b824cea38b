"""Held-out sentences of the field, as the base and as the extended tokenizer split them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from lexigraft.corpus import held_out, read_documents
from lexigraft.errors import LexigraftError
from lexigraft.families.segments import Extension, Piece
from lexigraft.hub import HUB
from lexigraft.recipe import Recipe

SHOWN = 6
SHORTEST, LONGEST = 6, 160  # characters
_READ = 5_000  # documents that are looked through
_ENDS = re.compile(r"(?<=[。！？؟।.!?])\s*(?=\S)|\n+")


def sentences(recipe: Recipe, extension: Extension) -> dict[str, Any]:
    """The first held-out sentences that hold a new token, and the samples that the recipe names.

    Returns:
        `shown`: per sentence `text`, and `before` and `after`, lists of [id, text, is new];
        `samples`: the same of the recipe's samples; `why`: why no sentence is shown, or null.
    """
    found, why = [], None
    try:
        for text in islice(_candidates(_documents(recipe)), _READ):
            split = _split(text, extension)
            if any(new for _, _, new in split["after"]):
                found.append(split)
            if len(found) == SHOWN:
                break
    except (LexigraftError, OSError) as fault:
        why = str(getattr(fault, "found", fault))
    samples = [_split(text, extension) for text in recipe.samples]
    return {"shown": found, "samples": samples, "why": why}


def _documents(recipe: Recipe) -> Iterable[str]:
    """The text that the run is measured on."""
    specs = recipe.eval.corpus or recipe.corpus
    remote = [spec for spec in specs if spec.startswith(HUB)]
    if remote:
        raise LexigraftError(
            f"{remote[0]} would be read from the hub",
            needed="text on this machine",
            fix="name held-out text in the recipe under eval: {corpus: [...]}",
        )
    documents = islice(read_documents(specs), _READ)
    return documents if recipe.eval.corpus else filter(held_out, documents)


def _candidates(documents: Iterable[str]) -> Iterator[str]:
    """Sentences of a length that is read at a glance, each once."""
    seen: set[str] = set()
    for document in documents:
        for sentence in map(str.strip, _ENDS.split(document)):
            if SHORTEST <= len(sentence) <= LONGEST and sentence not in seen:
                seen.add(sentence)
                yield sentence


def _split(text: str, extension: Extension) -> dict[str, Any]:
    def plain(pieces: Sequence[Piece]) -> list[list[Any]]:
        return [list(piece) for piece in pieces]

    return {
        "text": text,
        "before": plain(extension.before(text)),
        "after": plain(extension.after(text)),
    }
