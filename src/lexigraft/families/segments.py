"""A text as the base splits it and as its extension does, and the joins that make a token.

What people look at: `show`, `serve` and the report.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lexigraft import families
from lexigraft.console import plain_line
from lexigraft.families.gpt2_files import read_merges
from lexigraft.families.measure import new_ids, read_rows
from lexigraft.families.merges import Pair, joins, merge_pairs
from lexigraft.families.tokenmap import readable, tokenizer_data
from lexigraft.manifest import NEW_TOKENS, NewIds

_ALONE = "\N{DOTTED CIRCLE}"  # what a mark stands on that has no letter before it


def visible(data: bytes) -> str:
    r"""A token's bytes as text in which nothing is hidden.

    Bytes that are no whole character are hexadecimal, controls are escaped, so is a text of
    nothing but invisible characters; a mark without a letter stands on a dotted circle.

    >>> visible(b"\xe5\xbf"), visible(b"a\x1b"), visible("\u200d".encode())
    ('<E5BF>', 'a\\x1b', '\\u200d')
    """
    text = readable(data)
    if text and all(unicodedata.category(character) == "Cf" for character in text):
        return text.encode("unicode_escape").decode("ascii")
    alone = text and unicodedata.category(text[0]).startswith("M")
    return plain_line(_ALONE + text if alone else text)


class Piece(NamedTuple):
    """A token in a text: its id, what is seen of it, and whether the base lacks it."""

    id: int
    text: str
    new: bool


@dataclass(frozen=True)
class Extension:
    """An extended tokenizer with what is known of its new tokens.

    Attributes:
        family: the tokenizer.
        ids: the ids that the base lacks; empty where no manifest tells, and no base is at hand.
        rows: learned id -> its line of `new_tokens.jsonl`.
        base: the base's own tokenizer, if it is at hand.
    """

    family: families.Family
    ids: NewIds
    rows: Mapping[int, Mapping[str, Any]]
    base: families.Family | None = None

    @classmethod
    def open(cls, folder: Path, base: Path | None = None) -> Extension:
        """The tokenizer in `folder`, which may be a vocabulary, a model or an adapter.

        Raises:
            LexigraftError: no tokenizer there, one that the manifest beside it does not know, or
                a damaged `new_tokens.jsonl`.
        """
        family = families.load(folder)
        own = families.load(base) if base is not None else None
        ids = new_ids(folder, family)
        listed = folder / NEW_TOKENS
        rows = read_rows(listed, ids) if ids and listed.is_file() else []
        if not ids and own is not None:
            ids = NewIds((), own.map.tokens, family.map.tokens)
        return cls(family, ids, {row["id"]: row for row in rows}, own)

    @property
    def exact(self) -> bool:
        """`before` is what the base makes of any text; else of texts like those learned from."""
        return self.base is not None or self.family.guaranteed

    def after(self, text: str) -> list[Piece]:
        """`text` in the tokens of the extension."""
        return [self.piece(token) for token in self.family.encode(text)]

    def before(self, text: str) -> list[Piece]:
        """`text` in the tokens of the base.

        Without the base, each new token is replaced by the pieces that spelled it: for kinds of
        BPE that is what the base makes of any text (law 2).
        """
        if self.base is not None:
            own = self.base
            return [Piece(i, visible(own.token_bytes(i)), False) for i in own.encode(text)]
        return [self.piece(i) for token in self.family.encode(text) for i in self.spelled(token)]

    def piece(self, token: int) -> Piece:
        """One token of the extension."""
        return Piece(token, visible(self.family.token_bytes(token)), token in self.ids)

    def spelled(self, token: int) -> list[int]:
        """The base ids that spell `token`; itself, if the base has it or nothing is known."""
        if token not in self.ids:
            return [token]
        if token in self.rows:
            return list(self.rows[token]["pieces"])
        # A special token, which stands for itself, as the characters that the base has.
        text = self.family.map.texts[token]
        parts = self.family.pieces(text, added=token in self.family.map.added)
        return [i for part in parts if part != token for i in self.spelled(part)] or [token]

    def joins(self, token: int) -> list[Pair]:
        """The joins by which the engine makes `token` of its letters, in their order.

        They are replayed on the token alone. Empty for letters, added tokens and tokenizers
        without joins (Unigram, WordPiece).
        """
        if token in self.family.map.added or not self.family.guaranteed:
            return []
        return joins(self.family.map.texts[token], self._rank)

    @cached_property
    def _rank(self) -> Callable[[Pair], int | None]:
        """A pair -> where their join stands in the order of all joins."""
        if self.family.implicit:  # any pair that makes a token, old ones in the order of their ids
            texts = self.family.map.texts
            old = [i for i in sorted(texts) if i not in self.ids]
            places = {texts[i]: rank for rank, i in enumerate([*old, *self.ids]) if i in texts}
            return lambda pair: places.get("".join(pair))
        return {pair: rank for rank, pair in enumerate(_merges(self.family.folder))}.get


def _merges(folder: Path) -> Sequence[Pair]:
    """The merge list of `tokenizer.json`, or of `merges.txt` where that is all there is."""
    if not (folder / "tokenizer.json").is_file():
        return read_merges(folder / "merges.txt")
    return merge_pairs(tokenizer_data(folder / "tokenizer.json")["model"]["merges"])
