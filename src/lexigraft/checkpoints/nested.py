"""Places inside config.json, as paths of keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Nested configs with these words in their key have vocabularies that are not the text's.
_NOT_TEXT = ("vision", "audio", "image", "speech", "vq", "codec", "depth", "talker", "code2wav")


def paths_to(config: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Where any of `keys` stands, in the config and in nested ones that belong to the text."""
    found: list[tuple[str, ...]] = [(key,) for key in keys if key in config]
    for name, value in _nested_text(config):
        found += [(name, *path) for path in paths_to(value, keys)]
    return found


def text_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and all nested ones that belong to the text."""
    yield config
    for _, value in _nested_text(config):
        yield from text_parts(value)


def _nested_text(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in config.items():
        if isinstance(value, dict) and not any(word in name for word in _NOT_TEXT):
            yield name, value


def get(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The value at `path`; None where there is none."""
    place: Any = config
    for key in path:
        place = place.get(key) if isinstance(place, Mapping) else None
    return place


def put(config: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set the value at `path`, whose parents are made if they are missing."""
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value
