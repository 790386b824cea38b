"""`show`: what a tokenizer makes of a text, and what one of its tokens is; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lexigraft.console import plain_line
from lexigraft.errors import LexigraftError
from lexigraft.families.segments import Extension, Piece, visible
from lexigraft.hub import local_folder

# What a span of text is; the command line gives each a colour.
Style = Literal["label", "plain", "old", "other old", "new"]
Line = list[tuple[str, Style]]
LISTED = 20  # new tokens, where neither a text nor a token is asked for
_INDENT = 10


@dataclass(frozen=True)
class Tree:
    """A token as visible text, above the two that it is joined of; letters have no parts."""

    text: str
    parts: tuple[Tree, ...] = ()

    def lines(self, before: str = "") -> Iterator[str]:
        """The tree as text; `before` stands before the branches."""
        yield self.text
        for part, corner, below in zip(self.parts, ("├─ ", "└─ "), ("│  ", "   "), strict=False):
            first, *rest = part.lines(before + below)
            yield f"{before}{corner}{first}"
            yield from rest


@dataclass(frozen=True)
class Entry:
    """A token, looked up.

    Attributes:
        spelling: as the tokenizer files have it.
        pieces: the base tokens that spell it.
        row: its line of `new_tokens.jsonl`; None for a token of the base, and for special ones.
        rank: its place among the new tokens, the first learned is 1; None for a token of the base.
        tree: how the engine makes it.
    """

    piece: Piece
    spelling: str
    bytes: bytes
    pieces: list[Piece]
    row: Mapping[str, Any] | None
    rank: int | None
    tree: Tree

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        row = self.row or {}
        return {
            **self.piece._asdict(),
            "token": self.spelling,
            "bytes": self.bytes.hex(),
            "pieces": [piece._asdict() for piece in self.pieces],
            "rank": self.rank,
            **{key: row.get(key) for key in ("count", "tokens_saved", "specificity", "origin")},
            "tree": asdict(self.tree),
        }

    def styled(self, added: int) -> Iterator[Line]:
        """What a person reads."""
        kind: Style = "new" if self.piece.new else "old"
        yield [_label("token"), (self.piece.text, kind), (f"  id {self.piece.id}", "plain")]
        yield [_label("in files"), (plain_line(self.spelling), "plain")]
        yield [_label("bytes"), (self.bytes.hex(" "), "plain")]
        if self.piece.new:
            yield [_label("base"), *_chips(self.pieces)]
            yield [_label("ids"), (" ".join(str(piece.id) for piece in self.pieces), "plain")]
            yield [_label("rank"), (f"{self.rank:,} of {added:,} new tokens", "plain")]
        if self.row is not None:
            saved = f"saves {self.row['tokens_saved']:,} tokens there"
            yield [
                _label("count"),
                (f"{self.row['count']:,} in the learning text, {saved}", "plain"),
            ]
            special = self.row["specificity"]
            told = "" if special is None else f", specificity {special:.1f}"
            yield [_label("origin"), (f"{self.row['origin']}{told}", "plain")]
        if self.tree.parts:
            for place, line in enumerate(self.tree.lines()):
                yield [_label("" if place else "joined"), (line, "plain")]


@dataclass(frozen=True)
class ShowResult:
    """A text in both tokenizers, tokens looked up, or the first new tokens.

    Attributes:
        text: the text, if one was given.
        before, after: its pieces in the base and in the extension.
        entries: the tokens that were looked up.
        first: the first new tokens, where nothing was asked for.
        added: how many tokens are new.
        exact: `before` is what the base makes of any text.
    """

    text: str | None
    before: list[Piece]
    after: list[Piece]
    entries: list[Entry]
    first: list[Entry]
    added: int
    exact: bool

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        return {
            "text": self.text,
            "added": self.added,
            "exact": self.exact,
            "before": [piece._asdict() for piece in self.before],
            "after": [piece._asdict() for piece in self.after],
            "tokens": [entry.to_json() for entry in (*self.entries, *self.first)],
        }

    def lines(self) -> list[str]:
        """`styled`, where there are no colours: new tokens stand in brackets."""
        return [
            "".join(f"[{text}]" if style == "new" else text for text, style in line)
            for line in self.styled()
        ]

    def styled(self) -> list[Line]:
        """What a person reads, as spans with what they are."""
        lines = [] if self.text is None else list(self._readings())
        for entry in self.entries:
            lines += [*([[]] if lines else []), *entry.styled(self.added)]
        if not lines:
            told = f"{self.added:,} new tokens, the first of them:"
            unknown = "no new tokens are known here; --base BASE tells which the base lacks"
            lines.append([(told if self.first else unknown, "plain")])
        for entry in self.first:
            count = "" if entry.row is None else f"{entry.row['count']:,}"
            head: tuple[str, Style] = (f"{entry.piece.id:>8}  {count:>9}  ", "label")
            chips = _chips(entry.pieces)
            lines.append([head, (entry.piece.text, "new"), ("  ", "plain"), *chips])
        return lines

    def _readings(self) -> Iterator[Line]:
        """The text in both tokenizers; in one where nothing tells of another."""
        if self.after != self.before or self.added:
            yield [_label("base"), (f"{len(self.before):,} tokens", "plain")]
            yield [_label(""), *_chips(self.before)]
            new = sum(piece.new for piece in self.after)
            share = 1 - len(self.after) / max(1, len(self.before))
            told = f"{len(self.after):,} tokens, {share:.0%} fewer; {new:,} new"
            yield [_label("extended"), (told, "plain")]
        else:
            yield [_label("tokens"), (f"{len(self.after):,}", "plain")]
        yield [_label(""), *_chips(self.after)]
        if not self.exact and self.added:
            note = "base: by the spellings of new tokens; --base BASE asks the base itself"
            yield [_label(""), (note, "label")]


def show(
    path: str | Path,
    text: str | None = None,
    *,
    token: str | None = None,
    token_id: int | None = None,
    base: str | Path | None = None,
) -> ShowResult:
    """A text as the base and as the extended tokenizer split it, or a token looked up.

    Args:
        path: a vocabulary, model or adapter folder, or a hub id.
        text: the text to split.
        token: the text of a token, with or without the space before it, or its spelling in the
            files.
        token_id: the id of a token.
        base: the base's folder; without it, its reading is told by `new_tokens.jsonl`.

    Raises:
        LexigraftError: no tokenizer there, or no such token.
    """
    folder = local_folder(path)
    extension = Extension.open(folder, None if base is None else local_folder(base))
    wanted = [] if token is None else _ids_of(extension, token, path)
    if token_id is not None:
        if token_id not in extension.family.map.texts:
            raise LexigraftError(
                f"no token has id {token_id}",
                needed=f"an id below {extension.family.map.tokens:,}",
                fix=f"lexigraft show {path} --id {extension.family.map.tokens - 1}",
            )
        wanted.append(token_id)
    asked = text is not None or token is not None or token_id is not None
    return ShowResult(
        text=text,
        before=[] if text is None else extension.before(text),
        after=[] if text is None else extension.after(text),
        entries=[_entry(extension, i) for i in dict.fromkeys(wanted)],
        first=[] if asked else [_entry(extension, i) for i in islice(extension.ids, LISTED)],
        added=len(extension.ids),
        exact=extension.exact,
    )


def _ids_of(extension: Extension, token: str, path: str | Path) -> list[int]:
    """The ids that `token` may mean: as the files spell it, as a text, behind a space."""
    family = extension.family
    spellings = [token, *family.written(token), *family.written(f" {token}")]
    found = [family.map.ids[spelled] for spelled in spellings if spelled in family.map.ids]
    if not found:
        raise LexigraftError(
            f"{plain_line(token)!r} is no single token here",
            needed="a token of this vocabulary",
            fix=f"lexigraft show {path} TEXT, which tells the tokens of a text",
        )
    return found


def _entry(extension: Extension, token: int) -> Entry:
    family = extension.family
    piece = extension.piece(token)
    return Entry(
        piece=piece,
        spelling=family.map.texts[token],
        bytes=family.token_bytes(token),
        pieces=[extension.piece(i) for i in extension.spelled(token)],
        row=extension.rows.get(token),
        rank=extension.ids.index(token) + 1 if piece.new else None,
        tree=_tree(extension, token),
    )


def _tree(extension: Extension, token: int) -> Tree:
    joins = extension.joins(token)
    made = {left + right: (left, right) for left, right in joins}

    def tree(part: str) -> Tree:
        return Tree(_seen(extension, part), tuple(map(tree, made.get(part, ()))))

    return Tree(extension.piece(token).text, tuple(map(tree, joins[-1])) if joins else ())


def _seen(extension: Extension, part: str) -> str:
    """A part of a token, as the files spell it, as visible text."""
    known = extension.family.map.ids.get(part)
    return plain_line(part) if known is None else visible(extension.family.token_bytes(known))


def _label(text: str) -> tuple[str, Style]:
    return f"{text:{_INDENT}}", "label"


def _chips(pieces: Sequence[Piece]) -> Line:
    """Pieces side by side: neighbours differ, and a bar stands between them."""
    line: Line = []
    kinds: tuple[Style, Style] = ("old", "other old")
    for place, piece in enumerate(pieces):
        bar: Line = [("|", "label")] if place else []
        line += [*bar, (piece.text, "new" if piece.new else kinds[place % 2])]
    return line
