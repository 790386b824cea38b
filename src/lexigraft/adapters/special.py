"""Begin, end and padding tokens that a training changed: the config has to follow."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexigraft.families.tokenmap import TokenMap, token_text
from lexigraft.files import read_settings

_KINDS = ("bos", "eos", "pad")


def changed_special_ids(base: Path, trained: Path, tokens: TokenMap) -> dict[str, int]:
    """`eos_token_id` and the like, where `trained` names another token than `base` does.

    A model whose config keeps the old end token never stops.
    """
    before, after = _names(base), _names(trained)
    return {
        f"{kind}_token_id": tokens.ids[text]
        for kind, text in after.items()
        if text != before.get(kind) and text in tokens.ids
    }


def _names(folder: Path) -> dict[str, str]:
    content = read_settings(folder / "tokenizer_config.json")
    found = {}
    for kind in _KINDS:
        text = token_text(content.get(f"{kind}_token"))
        if text is not None:
            found[kind] = text
    return found


def with_special_ids(config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """A copy of a config with `ids` set; where it lists several, the new one comes first.

    >>> with_special_ids({"eos_token_id": [2, 7]}, {"eos_token_id": 9})
    {'eos_token_id': [9, 2, 7]}
    """
    result = copy.deepcopy(dict(config))
    for key, token_id in ids.items():
        nested = result.get("text_config")
        if isinstance(nested, dict) and key in nested:
            nested[key] = _joined(nested[key], token_id)
        if key in result or not isinstance(nested, dict):
            result[key] = _joined(result.get(key), token_id)
    return result


def _joined(old: Any, token_id: int) -> Any:
    if isinstance(old, list):
        return [token_id, *(other for other in old if other != token_id)]
    return token_id
