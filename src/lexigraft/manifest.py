"""`lexigraft.json`: what binds tokenizer, rows and adapter to each other.

A manifest is the list of all stage records so far; each step appends one, so that any folder
suffices alone. It holds content hashes, and neither time, host nor path. Spec: docs/files.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lexigraft import files
from lexigraft.errors import LexigraftError
from lexigraft.files import read_json, read_settings, sha256_json, write_json
from lexigraft.typed_json import MisfitError, parsed

MANIFEST, NEW_TOKENS = files.MANIFEST, files.NEW_TOKENS
_RUNS = re.compile(r"(\d+(-\d+)?( \d+(-\d+)?)*)?")  # `12 40-57`


class NewIds(Sequence[int]):
    """The ids that an extension gave tokens: some old ones, then all of [first, stop).

    A file may state any `stop`: the ids are not held in memory.

    Args:
        replaced: ids below `first`, ascending.
        first: the base's tokens (max id + 1).
        stop: those of the extension.

    >>> list(NewIds((3, 7), 10, 12)), 3 in NewIds((3,), 10, 10), 4 in NewIds((3,), 10, 10)
    ([3, 7, 10, 11], True, False)
    >>> NewIds((3,), 10, 2**60).below(12), NewIds((3,), 10, 12)[-1], NewIds((3,), 10, 12)[:2]
    ([3, 10, 11], 11, (3, 10))
    """

    def __init__(self, replaced: Iterable[int], first: int, stop: int) -> None:
        self.replaced = tuple(replaced)
        self.first = first
        self._known = frozenset(self.replaced)
        self._rest = range(first, stop)

    def __len__(self) -> int:
        return len(self.replaced) + len(self._rest)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return tuple(self)[place]
        at, before = range(len(self))[place], len(self.replaced)
        return self.replaced[at] if at < before else self._rest[at - before]

    def __iter__(self) -> Iterator[int]:
        yield from self.replaced
        yield from self._rest

    def __contains__(self, token_id: object) -> bool:
        return token_id in self._known or token_id in self._rest

    def below(self, limit: int) -> list[int]:
        """Those from 0 on that are smaller than `limit`."""
        rest = range(max(0, self.first), min(self._rest.stop, limit))
        return [*(i for i in self.replaced if i < limit), *rest]


@dataclass(frozen=True)
class _Data:
    """A part of the manifest: a dataclass that is a JSON object."""

    def to_json(self) -> dict[str, Any]:
        """The object, with its fields in their order."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}


@dataclass(frozen=True)
class _Sparse(_Data):
    """What has its default is left out: a record from before a field existed keeps its hash."""

    def to_json(self) -> dict[str, Any]:
        """The object, without the fields that need not be said."""
        absent = {one.name for one in fields(self) if getattr(self, one.name) == _default(one)}
        return {key: value for key, value in super().to_json().items() if key not in absent}


def _default(one: Field[Any]) -> Any:
    if one.name == "stage":  # always said
        return MISSING
    return one.default if one.default_factory is MISSING else one.default_factory()


def _plain(value: Any) -> Any:
    if isinstance(value, _Data):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


@dataclass(frozen=True, kw_only=True)
class Probe(_Data):
    """A text and the ids it has: re-verified on load."""

    text: str
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class TextSource(_Sparse):
    """A text that was read: its name without path, content hash and size in bytes.

    Of a data set of the hub, `name` tells its commit, `sha256` is the hash of its name and commit,
    and `bytes` is 0.
    """

    name: str
    sha256: str
    bytes: int
    weight: float = 1.0
    column: str = "text"


@dataclass(frozen=True, kw_only=True)
class BaseTokenizer(_Data):
    """The tokenizer of a model: name without path, token-map hash, max id + 1."""

    name: str
    token_map: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ReplacedToken(_Data):
    """An id that means another token since: with the base's rows, all that undoing it takes."""

    id: int
    old: str
    new: str


@dataclass(frozen=True, kw_only=True)
class LearnRecord(_Sparse):
    """`learn`: the extension of a tokenizer.

    Attributes:
        content: hash of merges or scores, normaliser, pre-tokenizer.
        replaced: ids below first_id that have a new token, ascending.
    """

    stage: Literal["learn"] = "learn"
    base: BaseTokenizer
    family: str
    token_map: str
    content: str
    tokens: int
    first_id: int
    added: int
    settings: dict[str, Any]
    sources: dict[str, list[TextSource]]
    versions: dict[str, str]
    probe: list[Probe]
    replaced: list[ReplacedToken] = field(default_factory=list)

    @property
    def new_ids(self) -> NewIds:
        """The ids of the new tokens, special ones included."""
        return NewIds((one.id for one in self.replaced), self.first_id, self.tokens)


@dataclass(frozen=True, kw_only=True)
class CopiedRow(_Data):
    """A new token that starts as the mean of some base rows: those of a token or of a text."""

    id: int
    source: str
    pieces: list[int]


@dataclass(frozen=True, kw_only=True)
class DonorRecord(_Data):
    """The model that rows were taken from: its name without path, and its tokens.

    Attributes:
        atoms: how many rows of shared tokens make one new row at most.
        shared: tokens that it and the base have.
        known: new tokens that it has as one token.
    """

    name: str
    token_map: str
    atoms: int
    shared: int
    known: int


@dataclass(frozen=True, kw_only=True)
class StartRecord(_Data):
    """How new rows started; `methods` is tensor -> method."""

    methods: dict[str, str]
    reason: str
    copies: list[CopiedRow] = field(default_factory=list)
    donor: DonorRecord | None = None


@dataclass(frozen=True, kw_only=True)
class GraftRecord(_Sparse):
    """`graft`: new rows in a checkpoint.

    Attributes:
        base_rows: tensor -> sha256 of its old rows: [0, first_id) without the replaced ones.
        new_rows: tensor -> sha256 of the replaced rows and rows [first_id, tokens).
        roles: tensor -> role, where `--tensor` named them.
        replaced: ids below first_id that have a new token, ascending.
    """

    stage: Literal["graft"] = "graft"
    base: BaseTokenizer
    rows_before: int
    tied: bool
    base_rows: dict[str, str]
    token_map: str
    tokens: int
    first_id: int
    rows: int
    pad_to: int
    init: str
    seed: int
    new_rows: dict[str, str]
    versions: dict[str, str]
    start: StartRecord | None = None
    roles: dict[str, str] | None = None
    replaced: list[int] | None = None

    @property
    def new_ids(self) -> NewIds:
        """The ids of the new rows."""
        return NewIds(self.replaced or (), self.first_id, self.tokens)


@dataclass(frozen=True, kw_only=True)
class TrainRecord(_Data):
    """`train`: what was trained on what; `model` is the hash of the trained model's manifest."""

    stage: Literal["train"] = "train"
    model: str
    mode: str
    settings: dict[str, Any]
    sources: dict[str, list[TextSource]]
    steps: int
    text_bytes: int
    new_rows: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class MergeRecord(_Sparse):
    """`merge`: adapters that went into the weights.

    Attributes:
        adapters: sha256 of each adapter's weights file.
        weights: of each adapter, where they were merged side by side.
        body_only: what the adapters hold of the vocabulary was left out.
        trimmed: padding rows of the base were left out.
        changed: tensors outside the vocabulary that changed.
    """

    stage: Literal["merge"] = "merge"
    adapters: list[str]
    token_map: str
    rows: int
    tied: bool
    versions: dict[str, str]
    weights: list[float] | None = None
    body_only: Literal[True] | None = None
    trimmed: Literal[True] | None = None
    changed: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class SplitRecord(_Sparse):
    """`split`: LoRA that stayed beside the weights, and what went into them.

    Attributes:
        adapter: sha256 of the adapter's weights file.
        changed: tensors outside the vocabulary that changed in the base.
    """

    stage: Literal["split"] = "split"
    adapter: str
    token_map: str
    rows: int
    tied: bool
    versions: dict[str, str]
    changed: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class ExtractRecord(_Data):
    """`extract`: what a model has beyond its base, as an adapter.

    `rank` is that of every layer; None where each has its own.
    """

    stage: Literal["extract"] = "extract"
    base: BaseTokenizer
    token_map: str
    tokens: int
    rows: int
    rank: int | None
    max_error: float | None
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class AlignRecord(_Data):
    """`align`: one of several models that were put on one vocabulary.

    `place` is which of them this one is, from 0.
    """

    stage: Literal["align"] = "align"
    models: list[BaseTokenizer]
    place: int
    token_map: str
    rows: int
    tied: bool
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class BlendRecord(_Data):
    """`blend`: whole models that became one."""

    stage: Literal["blend"] = "blend"
    base: BaseTokenizer
    models: list[BaseTokenizer]
    method: str
    settings: dict[str, Any]
    token_map: str
    rows: int
    tied: bool
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class PruneRecord(_Data):
    """`prune`: tokens that were removed; the others are numbered anew in their order.

    It is the first record of a manifest: what the base's said is of other ids (`undo` has it).

    Attributes:
        base_rows: tensor -> sha256 of its rows [0, base.tokens).
        removed: base ids below base.tokens that have no new id: `12 40-57`, ascending.
        roles: tensor -> role, where the base's manifest had them.
    """

    stage: Literal["prune"] = "prune"
    base: BaseTokenizer
    rows_before: int
    tied: bool
    base_rows: dict[str, str]
    removed: str
    token_map: str
    content: str
    tokens: int
    rows: int
    settings: dict[str, Any]
    sources: dict[str, list[TextSource]]
    versions: dict[str, str]
    roles: dict[str, str] | None = None

    def __post_init__(self) -> None:
        """Ids are needed as numbers."""
        if not _RUNS.fullmatch(self.removed):
            raise ValueError(f"removed: {self.removed!r} is not ids such as '12 40-57'")

    @property
    def places(self) -> dict[int, int]:
        """Base id -> new id of every token that was kept, holes of the base left out."""
        gone: set[int] = set()
        for run in self.removed.split():
            first, _, last = run.partition("-")
            gone.update(range(int(first), int(last or first) + 1))
        kept = (i for i in range(self.base.tokens) if i not in gone)
        return {old: new for new, old in enumerate(kept)}


Record = (
    LearnRecord
    | GraftRecord
    | TrainRecord
    | MergeRecord
    | SplitRecord
    | ExtractRecord
    | AlignRecord
    | BlendRecord
    | PruneRecord
)


@dataclass(frozen=True, kw_only=True)
class Manifest(_Data):
    """All stage records, oldest first."""

    format: Literal[1] = 1
    records: list[Record] = field(default_factory=list)

    def last(self, stage: str) -> Any:
        """The newest record of a stage, or None."""
        return next((r for r in reversed(self.records) if r.stage == stage), None)

    def replaced(self, old: str, new: str) -> tuple[int, ...]:
        """Ids whose token `learn --replace` changed on the way between two token maps, ascending.

        Args:
            old: hash of the earlier one.
            new: hash of the later one.
        """
        found: set[int] = set()
        for record in self.records:
            if isinstance(record, LearnRecord) and record.base.token_map == old != new:
                found.update(record.new_ids.replaced)
                old = record.token_map
        return tuple(sorted(found)) if old == new else ()

    def plus(self, record: Any) -> Manifest:
        """A manifest with one record more."""
        return Manifest(records=[*self.records, record])

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the canonical content."""
        return sha256_json(self.to_json())

    def write(self, folder: Path) -> None:
        """Write `lexigraft.json` into `folder`."""
        write_json(folder / MANIFEST, self.to_json())

    def begin(self, folder: Path) -> None:
        """Write it into a folder whose tokenizer settings may still name an earlier lineage."""
        self.write(folder)
        path = folder / "tokenizer_config.json"
        write_json(path, {**read_settings(path), "lexigraft": {"manifest": self.hash}})

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest in `folder`; None where there is none.

        Raises:
            LexigraftError: the file is damaged or of a newer format.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            return parsed(cls, read_json(path))
        except MisfitError as fault:
            raise LexigraftError(
                f"{path}: {fault}",
                needed="a manifest of format 1 as lexigraft wrote it",
                fix="copy lexigraft.json again from the step that wrote it, or update lexigraft",
            ) from None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of `packages` by name: those that are imported, else those that are installed."""
    return {name: _version(name) for name in sorted(packages)}


def _version(package: str) -> str:
    loaded = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return str(loaded)
    import importlib.metadata  # which takes longer than all else that is done here

    return importlib.metadata.version(package)
