"""Token ids that config.json and generation_config.json name, wherever they stand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from lexigraft.checkpoints.nested import text_parts

ID_KEY = re.compile(r"(^|_)token_(id|ids|index)$")
# Keys of generation settings that hold ids under other names (transformers, GenerationConfig).
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def with_ids(config: Mapping[str, Any], place: Callable[[int], int]) -> dict[str, Any]:
    """A copy of a config in which every token id is replaced by `place` of it.

    Negative numbers stand for no token and stay.
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for part in text_parts(result):
        assert isinstance(part, dict)
        for key, value in part.items():
            if ID_KEY.search(key) or key in _LISTS:
                part[key] = _mapped(value, place)
            elif key == "forced_decoder_ids" and isinstance(value, list):  # [position, id] each
                part[key] = [[pair[0], *_mapped(pair[1:], place)] for pair in value]
            elif key == "sequence_bias" and isinstance(value, list):  # [ids, bias] each
                part[key] = [[_mapped(ids, place), *bias] for ids, *bias in value]
    return result


def stated_ids(config: Mapping[str, Any]) -> frozenset[int]:
    """Every token id that a config names."""
    found: set[int] = set()

    def note(token_id: int) -> int:
        found.add(token_id)
        return token_id

    with_ids(config, note)
    return frozenset(found)


def _mapped(value: Any, place: Callable[[int], int]) -> Any:
    if isinstance(value, list):
        return [_mapped(one, place) for one in value]
    is_id = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return place(value) if is_id else value
