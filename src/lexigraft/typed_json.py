"""JSON objects as dataclasses, held against their types: what `lexigraft.json` is read with.

Every verb reads or writes a manifest. pydantic takes 0.2 s to be imported and to build the models
for it, this 0.02 s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from reprlib import repr as shown
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

_Read = Callable[[Any], Any]
Kind = TypeVar("Kind")
# What JSON calls the types that a field may have.
_NAMES = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


class MisfitError(ValueError):
    """A JSON value is not of the type that is asked for; says where and why."""

    def __init__(self, what: str, place: tuple[str, ...] = ()) -> None:
        super().__init__(": ".join([*([".".join(place)] if place else []), what]))
        self.what = what
        self.place = place


def parsed(kind: type[Kind], value: Any) -> Kind:
    """A JSON value as an instance of the dataclass `kind`, which has a field for each of its keys.

    Fields may be `str`, `int`, `float`, `Literal`, `Any`, such dataclasses, lists and dicts of
    these, each `| None`, and unions of dataclasses that differ in the default of `stage`.

    Raises:
        MisfitError: the first place that does not fit.
    """
    found: Kind = _reader(cast("Any", kind))(value)
    return found


@cache
def _reader(kind: Any) -> _Read:
    if is_dataclass(kind):
        return _object(kind)
    holder, inside = get_origin(kind), get_args(kind)
    if holder in (UnionType, Union):
        return _union(inside)
    if holder is Literal:
        return _literal(inside)
    if holder in (list, dict):
        return _items(holder, _reader(inside[-1]))
    return _PLAIN.get(kind) or _exactly(kind)


def _object(kind: Any) -> _Read:
    hints = get_type_hints(kind)
    reads = {one.name: _reader(hints[one.name]) for one in fields(kind)}
    exact = _exactly(dict)
    needed = [
        one.name
        for one in fields(kind)
        if one.default is MISSING and one.default_factory is MISSING
    ]

    def read(value: Any) -> Any:
        exact(value)
        for name in needed:
            if name not in value:
                raise MisfitError("is missing", (name,))
        for name in value:
            if name not in reads:
                raise MisfitError("is unknown", (name,))
        given = {name: _at(name, reads[name], one) for name, one in value.items()}
        try:
            return kind(**given)
        except ValueError as fault:
            raise MisfitError(str(fault)) from None

    return read


def _union(inside: tuple[Any, ...]) -> _Read:
    kinds = [one for one in inside if one is not NoneType]
    read = _reader(kinds[0]) if len(kinds) == 1 else _by_stage(kinds)
    if len(kinds) == len(inside):
        return read
    return lambda value: None if value is None else read(value)


def _by_stage(kinds: list[Any]) -> _Read:
    readers = {one.stage: _reader(one) for one in kinds}
    exact = _exactly(dict)

    def read(value: Any) -> Any:
        stage = exact(value).get("stage")
        if not isinstance(stage, str) or stage not in readers:
            raise MisfitError(f"{shown(stage)} is none of {', '.join(readers)}", ("stage",))
        return readers[stage](value)

    return read


def _literal(values: tuple[Any, ...]) -> _Read:
    def read(value: Any) -> Any:
        if type(value) not in map(type, values) or value not in values:
            raise MisfitError(f"{shown(value)} is not {' or '.join(map(repr, values))}")
        return value

    return read


def _items(holder: type, read: _Read) -> _Read:
    exact = _exactly(holder)
    if holder is list:
        return lambda value: [_at(i, read, one) for i, one in enumerate(exact(value))]
    return lambda value: {name: _at(name, read, one) for name, one in exact(value).items()}


def _float(value: Any) -> float:
    if type(value) in (int, float):
        with suppress(OverflowError):  # a whole number may have any length
            return float(value)
    raise MisfitError(f"{shown(value)} is not a number")


def _exactly(kind: type) -> _Read:
    def read(value: Any) -> Any:
        if type(value) is not kind:  # True is an int to isinstance
            raise MisfitError(f"{shown(value)} is not {_NAMES[kind]}")
        return value

    return read


def _at(place: object, read: _Read, value: Any) -> Any:
    try:
        return read(value)
    except MisfitError as fault:
        raise MisfitError(fault.what, (str(place), *fault.place)) from None


_PLAIN: dict[Any, _Read] = {float: _float, Any: lambda value: value}
