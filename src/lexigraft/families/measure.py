"""The lines of `new_tokens.jsonl`: what each new token is and how often it comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lexigraft.families import Family
from lexigraft.families.choice import Choice
from lexigraft.families.continued_bpe import Merge


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
