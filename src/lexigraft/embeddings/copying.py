"""`--init-from FILE`: which base token, or which text, each listed new token starts as.

A line is `TOKEN<TAB>SOURCE`, or in a .jsonl file `{"token": ..., "copy": BASE TOKEN}` or
`{"token": ..., "text": WORDS}`. TOKEN is a new token as the tokenizer's files spell it, or its
text. SOURCE is a base token if it is exactly one as the files spell it, and else a text, which the
base tokenizer spells; the two keys of JSON say which is meant. Tokens that are not listed start as
the mean of their own pieces.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError
from lexigraft.families import Family, TokenMap, new_ids

_SHOWN = 5


@dataclass(frozen=True)
class Copied:
    """A new token that starts as the mean of the base rows `pieces`, which spell `source`."""

    id: int
    source: str
    pieces: tuple[int, ...]


def read_copies(path: Path, base: Family, extended: TokenMap) -> list[Copied]:
    """The listed tokens, by id.

    Args:
        path: .jsonl, or any other text file with a TAB in each line. Blank lines are passed over.
        base: the tokenizer whose rows are copied.
        extended: the tokenizer with the new tokens.

    Raises:
        LexigraftError: no such file, or lines that name no new token, no source, or one token
            twice: all of them in one message.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as fault:
        raise LexigraftError(
            f"--init-from {path} cannot be read ({fault})",
            needed="a text file in UTF-8, TOKEN<TAB>SOURCE in each line",
            fix=f"ls -l {path}",
        ) from None
    names = _names(base, extended)
    found: dict[int, Copied] = {}
    faults = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            copied = _read(line.rstrip("\r"), base, names, json_lines=path.suffix == ".jsonl")
            if copied.id in found:
                raise ValueError(f"{extended.texts[copied.id]!r} was listed before")
            found[copied.id] = copied
        except ValueError as fault:
            faults.append(f"line {number}: {fault}")
    if not found and not faults:
        faults.append("it lists no token")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise LexigraftError(
            f"--init-from {path}: " + "; ".join(faults[:_SHOWN]) + more,
            needed="each line a new token, a TAB, and a base token or a text "
            '(in .jsonl: {"token": ..., "copy": ...} or {"token": ..., "text": ...})',
            fix="mend or delete these lines (new_tokens.jsonl of VOCAB lists the new tokens)",
        )
    return [found[token_id] for token_id in sorted(found)]


def _names(base: Family, extended: TokenMap) -> Mapping[str, list[int]]:
    """What a line may call a new token -> its id: the files' spelling first, then its text."""
    new = {i: extended.texts[i] for i in new_ids(base, extended) if i in extended.texts}
    exact = {text: [i] for i, text in new.items()}
    plain: dict[str, list[int]] = defaultdict(list)
    for token_id, text in new.items():
        spelt = base.pieces(text, added=token_id in extended.added)
        content = b"".join(map(base.token_bytes, spelt)).decode("utf-8", "replace")
        for name in {content, content.strip()} - {""}:
            plain[name].append(token_id)
    return {**plain, **exact}


def _read(line: str, base: Family, names: Mapping[str, list[int]], *, json_lines: bool) -> Copied:
    token, source, kind = _parsed_json(line) if json_lines else _parsed(line)
    ids = names.get(token, [])
    if not ids:
        known = token in base.map.ids
        raise ValueError(f"{token!r} is " + ("a base token" if known else "no new token"))
    if len(ids) > 1:
        raise ValueError(f"{token!r} could be any of the new ids {', '.join(map(str, ids))}")
    return Copied(ids[0], source, tuple(_pieces(source, kind, base)))


def _pieces(source: str, kind: str, base: Family) -> Iterator[int]:
    known = base.map.ids.get(source)
    if kind == "copy" and known is None:
        raise ValueError(f"{source!r} is no token of the base")
    if known is not None and kind != "text":
        yield known
        return
    pieces = base.encode(source)
    if not pieces or (base.unknown_id is not None and base.unknown_id in pieces):
        raise ValueError(f"the base cannot spell {source!r}")
    yield from pieces


def _parsed(line: str) -> tuple[str, str, str]:
    token, tab, source = line.partition("\t")
    if not tab or not token or not source.strip() or "\t" in source:
        raise ValueError(f"{line[:60]!r} is not TOKEN<TAB>SOURCE")
    return token, source, "either"


def _parsed_json(line: str) -> tuple[str, str, str]:
    try:
        data: Any = json.loads(line)
    except ValueError:
        data = None
    fits = isinstance(data, dict) and all(isinstance(v, str) and v.strip() for v in data.values())
    for kind in ("copy", "text"):
        if fits and data.keys() == {"token", kind}:
            return data["token"], data[kind], kind
    raise ValueError(f'{line[:60]!r} is no object of "token" and "copy" or "text"')
