"""Do the files of one base say the same? A new token must get one id in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError
from lexigraft.families.gpt2_files import read_merges
from lexigraft.families.tokenmap import TokenMap, read_token_maps


def require_agreement(folder: Path, data: Mapping[str, Any] | None) -> None:
    """Stop where a byte-level folder holds files of different tokenizers.

    Args:
        folder: holds any of tokenizer.json, a rank file, vocab.json and merges.txt.
        data: the content of tokenizer.json, if it is there.

    Raises:
        LexigraftError: names the file that disagrees with the others.
    """
    names = {path.name for path in folder.iterdir()}
    if sum(_is_vocabulary(name) or name == "merges.txt" for name in names) < 2:
        return
    maps = read_token_maps(folder)
    added = frozenset[int]().union(*(token_map.added for token_map in maps.values()))
    own = {name: _own(maps[name], added) for name in maps if _is_vocabulary(name)}
    for one, other in combinations(own, 2):
        if own[one] != own[other]:
            raise _disagreement(folder, own, one, other)
    listed = folder / "merges.txt"
    if data is None or not listed.is_file():
        return
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in _merges(data)]
    if merges != read_merges(listed):
        raise LexigraftError(
            f"{folder}: merges.txt lists other merges than tokenizer.json",
            needed="files of one tokenizer",
            fix=f"move {listed} away, or copy it again from the model that tokenizer.json is of",
        )


def _is_vocabulary(name: str) -> bool:
    return name in ("tokenizer.json", "tokenizer.model", "vocab.json") or name.endswith(".tiktoken")


def _own(token_map: TokenMap, added: frozenset[int]) -> dict[int, str]:
    """The vocabulary proper: added tokens need not stand in every file."""
    return {i: text for i, text in token_map.texts.items() if i not in added}


def _merges(data: Mapping[str, Any]) -> list[Any]:
    merges: list[Any] = data["model"]["merges"]
    return merges


def _disagreement(
    folder: Path, own: Mapping[str, Mapping[int, str]], one: str, other: str
) -> LexigraftError:
    first = next(
        i for i in sorted({*own[one], *own[other]}) if own[one].get(i) != own[other].get(i)
    )
    said = " and ".join(
        f"{name} {repr(own[name][first]) if first in own[name] else 'nothing'}"
        for name in (one, other)
    )
    odd = _odd_one(own, one, other)
    return LexigraftError(
        f"{folder}: for id {first} {said}" + (f": {odd} is the odd one out" if odd else ""),
        needed="files of one tokenizer, with one meaning for every id",
        fix=f"move {odd or f'{one} or {other}'} away, or copy it again from its model",
    )


def _odd_one(own: Mapping[str, Mapping[int, str]], one: str, other: str) -> str | None:
    """The file that a third one contradicts, or that was left behind when the other grew."""
    for third in own:
        agrees = [name for name in (one, other) if own[name] == own[third]]
        if third not in (one, other) and len(agrees) == 1:
            return other if agrees[0] == one else one
    shorter, longer = sorted((one, other), key=lambda name: len(own[name]))
    left_behind = all(own[longer].get(i) == text for i, text in own[shorter].items())
    return shorter if left_behind else None
