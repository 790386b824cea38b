"""The lines of `new_tokens.jsonl`: what each new token is and how often it comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.tokenmap import TokenMap
from lexigraft.manifest import GraftRecord, LearnRecord, Manifest, NewIds

if TYPE_CHECKING:  # which compiles loops; those who look at the lines do not need it
    from lexigraft.families.choice import Choice


class _Row(BaseModel):
    """One line, as docs/files.md has it."""

    model_config = ConfigDict(strict=True)

    id: NonNegativeInt
    token: str
    bytes: str
    text: str | None
    pieces: list[NonNegativeInt]
    count: NonNegativeInt
    tokens_saved: int
    specificity: float | None
    origin: Literal["merge", "term", "character", "bridge"]
    parts: Annotated[list[str], Field(min_length=2, max_length=2)] | None
    joined: NonNegativeInt


def new_tokens(
    extended: Family,
    choice: Choice,
    spelled: Mapping[int, Sequence[int]],
    *,
    specificity: Sequence[float] | None,
    terms: frozenset[str],
) -> Iterator[str]:
    """The lines of `new_tokens.jsonl`, in the order of the ids.

    Args:
        extended: the extension.
        choice: the merges with their counts.
        spelled: new id -> the base ids that spell it.
        specificity: z-score of each token against the contrast (or general) text.
        terms: tokens that a list asked for.
    """
    for place, merge in enumerate(choice.merges):
        token_id = extended.map.ids[merge.token]
        data = extended.token_bytes(token_id)
        pieces = list(spelled[token_id])
        count = choice.counts[merge.token]
        row: dict[str, Any] = {
            "id": token_id,
            "token": merge.token,
            "bytes": data.hex(),
            "text": _text(data),
            "pieces": pieces,
            "count": count,
            "tokens_saved": count * (len(pieces) - 1),
            "specificity": None if specificity is None else round(float(specificity[place]), 3),
            "origin": _origin(merge, choice, terms),
            "parts": None if merge.right is None else [merge.left, merge.right],
            "joined": int(choice.saved[place]),
        }
        yield json.dumps(row, ensure_ascii=False)


def new_ids(folder: Path, family: Family) -> NewIds:
    """The ids that lexigraft gave tokens, by the folder's manifest; none where there is none.

    Raises:
        LexigraftError: the tokenizer beside the manifest is another one.
    """
    manifest = Manifest.read(folder) or Manifest()
    record = manifest.last("graft") or manifest.last("learn")
    if not record:
        return NewIds((), 0, 0)
    if record.token_map != family.map.hash:
        merged = manifest.last("merge")
        if merged is not None and merged.token_map == family.map.hash:  # a union of vocabularies
            records = [r for r in manifest.records if isinstance(r, LearnRecord | GraftRecord)]
            return NewIds((), min(r.first_id for r in records), family.map.tokens)
        raise LexigraftError(
            f"{folder}: the tokenizer is not the one in its lexigraft.json",
            needed="the tokenizer that these weights were grafted for",
            fix=f"lexigraft check {folder}",
        )
    ids: NewIds = record.new_ids
    return ids


def read_rows(path: Path, new_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The lines of the `new_tokens.jsonl` at `path`, held against the tokenizer beside it.

    Args:
        path: the file in the folder that `learn` wrote.
        new_ids: the ids that are new, by the manifest; those behind the lines are special tokens.

    Raises:
        LexigraftError: a line is damaged, or the lines are not those of the tokenizer's tokens.
    """
    lines = path.read_bytes().splitlines()  # at line ends alone, unlike those of a text
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    token_map = TokenMap.read(path.parent)
    later = set(new_ids)  # tokens that have not had their line yet
    learned = [token_id for token_id in new_ids if token_id not in token_map.added]
    for number, (row, token_id) in enumerate(zip(rows, learned, strict=False), 1):
        token = token_map.texts.get(token_id)
        if (row["id"], row["token"]) != (token_id, token):
            raise _unfit(
                path,
                f"line {number} is of id {row['id']} {row['token']!r}, the tokenizer has "
                f"{token_id} {token!r} there",
            )
        left, right = row["parts"] or ("", "")  # empty: a kind whose tokens need no parts
        if (left or right) and (
            left + right != token
            or any(token_map.ids.get(part, token_id) in later for part in (left, right))
        ):
            raise _unfit(path, f"line {number}: {left!r} and {right!r} do not make {token!r}")
        later.discard(token_id)
    if len(rows) != len(learned):
        raise _unfit(path, f"{len(rows):,} lines for {len(learned):,} learned tokens")
    return rows


def cut(rows: Sequence[Mapping[str, Any]], size: int) -> tuple[list[Merge], dict[str, int]]:
    """The first `size` tokens of a `new_tokens.jsonl`, and their counts without the rest.

    A token comes out where it was joined and not joined further: what was made of it by a token
    that is cut off falls back to it. So it is with byte-pair kinds; a kind without parts (Unigram,
    WordPiece) does not say what comes out instead, and counts are those of the whole.

    Args:
        rows: the lines, as data.
        size: how many tokens to keep.
    """
    merges = []
    counts: dict[str, int] = {}
    for row in rows[:size]:
        left, right = row["parts"] or (row["token"], None)
        merges.append(Merge(row["token"], left, right, row["joined"]))
        counts[row["token"]] = row["count"]
    for row in rows[size:]:
        for part in row["parts"] or ():
            if part in counts:
                counts[part] += row["joined"]
    return merges, counts


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return _Row.model_validate_json(line).model_dump()
    except ValidationError as fault:
        first = fault.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise _unfit(path, f"line {number}: {place}{first['msg']}") from None


def _unfit(path: Path, found: str) -> LexigraftError:
    return LexigraftError(
        f"{path}: {found}",
        needed="one line for each learned token, in the order of the ids, as `learn` wrote them",
        fix=f"copy {path.name} again from where `learn` wrote it, or learn again",
    )


def _origin(merge: Merge, choice: Choice, terms: frozenset[str]) -> str:
    if merge.token in terms:
        return "term"
    if not choice.counts[merge.token]:  # a part of others, in a cut perhaps of one cut off
        return "bridge"
    return "character" if merge.right is None else "merge"


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
