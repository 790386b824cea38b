"""A configuration of another tool on its way to a recipe: what became of each of its keys."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lexigraft.console import plain_line
from lexigraft.corpus import SUFFIXES, inputs
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import is_there
from lexigraft.hub import is_hub_id

_VALUE_SHOWN = 60


@dataclass(frozen=True)
class Tool:
    """What is known of another tool's configurations.

    Attributes:
        name: as its makers write it.
        version: whose sources the tables below were made from.
        base: its key of the model.
        pretraining: how it says continued pretraining.
        defaults: key -> what the tool takes where the key is absent.
        left_out: reason -> keys that have no place in a recipe, and need none; `x_*` stands for
            all that begin with `x_`.
        stops: reason -> keys that no recipe can say, and that change what is learned.
    """

    name: str
    version: str
    base: str
    pretraining: str
    defaults: Mapping[str, Any]
    left_out: Mapping[str, str]
    stops: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """What became of a key.

    Attributes:
        key: of the other tool; None for what the recipe has beyond it.
        value: what it was.
        place: where the recipe says it; None for a key that is left out.
        note: what is different here, or why it is left out.
        default: the key was absent, and the value is the other tool's default.
    """

    key: str | None
    value: Any
    place: str | None
    note: str = ""
    default: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def line(self) -> str:
        """What a person reads."""
        value = plain_line(str(self.value))
        if len(value) > _VALUE_SHOWN:
            value = value[: _VALUE_SHOWN - 3] + "..."
        what = value if self.key is None else f"{self.key}: {value}"
        place = "" if self.place is None else f" -> {self.place}"
        return f"{what}{' (its default)' if self.default else ''}{place}" + (
            f"  [{self.note}]" if self.note else ""
        )


@dataclass
class Translation:
    """A configuration, taken apart key by key.

    Attributes:
        tool: whose it is.
        rest: keys that nobody has looked at yet.
        home: folder of the recipe, which its paths are relative to.
        given: the keys that are there and not empty.
        defaults: what the tool takes for those that are not.
        asked: the keys that were looked for.
        recipe: what there is of the recipe.
        stage: its stage of training.
        rows: what became of each key so far.
        faults: found and needed of what no recipe can say.
        lists: end of a file's name -> the lines of a list that the recipe names.
    """

    tool: Tool
    rest: dict[str, Any]
    home: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    given: frozenset[str] = field(init=False)
    defaults: dict[str, Any] = field(init=False)
    asked: set[str] = field(default_factory=set)
    rows: list[Row] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    lists: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rest = {k: v for k, v in self.rest.items() if v not in (None, "", [], {})}
        self.given = frozenset(self.rest)
        self.defaults = dict(self.tool.defaults)

    def take(self, key: str) -> Any:
        """The value of a key, which is then dealt with; None where it is absent or empty."""
        self.asked.add(key)
        return self.rest.pop(key, None)

    def mapped(self, key: str, value: Any, place: str, note: str = "") -> None:
        """Say that the recipe holds a key, or the tool's default for it, and where."""
        default = key.partition(".")[0] not in self.given
        self.rows.append(Row(key, value, place, note, default))

    def leave(self, key: str, value: Any, reason: str) -> None:
        """Say that a key is left out."""
        self.rows.append(Row(key, value, None, reason))

    def leave_given(self, keys: str, reason: str) -> None:
        """Leave out those of `keys`, names between spaces, that are there and not off."""
        for key in keys.split():
            if value := self.take(key):
                self.leave(key, value, reason)

    def beyond(self, what: str, place: str, note: str) -> None:
        """Say what the recipe does that the configuration does not."""
        self.rows.append(Row(None, what, place, note))

    def fault(self, found: str, needed: str) -> None:
        """Note what no recipe can say; all faults are told together."""
        self.faults.append((found, needed))

    def number(
        self, key: str, place: str | None, kind: type = float, note: str = "", least: float = 0
    ) -> Any:
        """A number, or the tool's default; with a `place` it goes into the stage of training.

        Numbers may be texts: YAML reads `1e-4` as one.
        """
        value = self.take(key)
        if value is None:
            value = self.defaults.get(key)
        if value is None:
            return None
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
            if not (math.isfinite(number) and number >= least) or (
                kind is int and number != int(number)
            ):
                raise ValueError
        except (TypeError, ValueError):
            what = "a whole number" if kind is int else "a number"
            self.fault(f"{key}: {value}", f"{key}: {what} from {least:g}")
            return None
        number = kind(number)
        if place is not None:
            self.stage[place] = number
            self.mapped(key, number, f"train.{place}", note)
        return number

    def model(self, name: Any, revision: Any) -> None:
        """The base, a folder here or a model of the hub."""
        key = self.tool.base
        if not isinstance(name, str):
            self.fault(f"no {key}", f"{key}: a model folder or hub id")
            return
        pinned = f"{name}@{revision}" if revision else name
        if is_there(Path(name).expanduser()):
            if revision:
                self.fault(f"a revision of the folder {name}", "a revision of a model of the hub")
            self.recipe["base"] = self.relative(name)
        elif is_hub_id(pinned):
            self.recipe["base"] = pinned
        else:
            self.fault(f"{key}: {pinned} is no folder here", f"{key}: a model folder or hub id")
            return
        self.mapped(key, name, "base")

    def relative(self, path: str) -> str:
        """A path from here as the recipe has it, from its own folder."""
        given = Path(path).expanduser()
        return path if given.is_absolute() else os.path.relpath(given, self.home)

    def text(
        self, path: str, column: str, *, key: str, config: Any = None, split: Any = None
    ) -> str | None:
        """The spec of a data set, a file or folder here or one of the hub; None with a fault.

        Args:
            path: file, folder or hub id.
            column: the field that holds the text.
            key: where the configuration says so, for messages.
            config, split: of a data set of the hub.
        """
        split = split or "train"
        ending = "" if column == "text" else f"#column={column}"
        if not is_there(Path(path).expanduser()):
            file = path.lower().endswith((*SUFFIXES, ".json", ".arrow"))
            if file or not is_hub_id(path) or "[" in str(split):
                self.fault(
                    f"{key}: {path}" + (f", split {split}" if split != "train" else ""),
                    f"{key}: a file or folder that is here, or a whole split of a data set of the "
                    "hub (paths start from the folder where this is run)",
                )
                return None
            part = [config or "", split] if split != "train" else [config] if config else []
            return ":".join(map(str, ("hf", path, *part))) + ending
        if split != "train" or config:
            self.fault(
                f"{key}: a part of {path}",
                f"{key}: a whole local file; write the part to a .jsonl file of its own",
            )
            return None
        try:
            inputs([path])
        except LexigraftError as unread:
            self.fault(f"{key}: {unread.found}", f"{unread.needed} (jq -c '.[]' a.json > a.jsonl)")
            return None
        return self.relative(path) + ending

    def texts_read(self, specs: Sequence[str], key: str, value: Any, place: str) -> None:
        """Say where texts went, and how lines become documents."""
        lines = any(spec.partition("#")[0].endswith(".txt") for spec in specs)
        note = "documents of .txt are its lines there, its blocks between blank lines here"
        self.mapped(key, value, place, note if lines else "")

    def finish(self) -> None:
        """Deal with what is left: keys without a place, keys that stop, and unknown ones.

        Raises:
            RefusalError: the configuration says what no recipe can.
        """
        left_out, stops = _by_key(self.tool.left_out), _by_key(self.tool.stops)
        known = [*sorted(self.asked), *left_out, *stops]
        for key in list(self.rest):
            value = self.take(key)
            if (reason := _reason(stops, key)) is not None:
                if value:
                    self.fault(f"{key}: {plain_line(str(value))[:_VALUE_SHOWN]}", reason)
            elif (reason := _reason(left_out, key)) is not None:
                if value:
                    self.leave(key, value, reason)
            else:
                near = difflib.get_close_matches(key, known, n=1)
                meant = f"{near[0]}?" if near else f"a key of {self.tool.name} {self.tool.version}"
                self.fault(f"unknown key {plain_line(key)}", meant)
        if self.faults:
            found, needed = zip(*self.faults, strict=True)
            raise RefusalError(
                "; ".join(found),
                needed="; ".join(dict.fromkeys(needed)),
                fix="mend these keys, or take out of a copy of the configuration those that it "
                "can do without",
            )

    def refuse_kind(self, found: str) -> RefusalError:
        """What to say of training that is not continued pretraining."""
        return RefusalError(
            f"{found}: training on chats, instructions or preferences",
            needed=f"continued pretraining on plain texts, all that a recipe says: "
            f"{self.tool.pretraining}",
            fix="teach the words first: import a configuration with the raw texts of the field, "
            f"run it, then give RUN/merged to {self.tool.name} as `{self.tool.base}` of this one "
            "(docs/ecosystem.md)",
        )


def _by_key(groups: Mapping[str, str]) -> dict[str, str]:
    return {key: reason for reason, keys in groups.items() for key in keys.split()}


def _reason(reasons: Mapping[str, str], key: str) -> str | None:
    """The reason that a key has, by its name or by how it begins."""
    if key in reasons:
        return reasons[key]
    begins = (name for name in reasons if name.endswith("*") and key.startswith(name[:-1]))
    return next((reasons[name] for name in begins), None)
