"""`lexigraft.json`: what binds tokenizer, rows and adapter to each other.

A manifest is the list of all stage records so far; each step appends one, so that any folder
suffices alone. It holds content hashes, and neither time, host nor path. Spec: docs/files.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from lexigraft import files
from lexigraft.errors import LexigraftError
from lexigraft.files import read_json, read_settings, sha256_json, write_json

MANIFEST, NEW_TOKENS = files.MANIFEST, files.NEW_TOKENS


Model = TypeVar("Model", bound=BaseModel)


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


class _Data(BaseModel):
    # Built when first used: most programs that import this read no manifest.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class _Sparse(_Data):
    """What is None is left out: a record from before a field existed keeps its hash."""

    @model_serializer(mode="wrap")
    def _without_absent(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = plain(self)
        return {key: value for key, value in data.items() if value is not None}


class Probe(_Data):
    """A text and the ids it has: re-verified on load."""

    text: str
    ids: list[int]


class TextSource(_Data):
    """A text that was read: its name without path, content hash and size in bytes.

    The last two are written where they differ from their defaults, so that the hash of a manifest
    from before they existed stays the same. Of a data set of the hub, `name` tells its commit,
    `sha256` is the hash of its name and commit, and `bytes` is 0.
    """

    name: str
    sha256: str
    bytes: int
    weight: float = 1.0
    column: str = "text"

    @model_serializer(mode="wrap")
    def _without_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = plain(self)
        defaults = {"weight": 1.0, "column": "text"}
        return {key: value for key, value in data.items() if defaults.get(key) != value}


class BaseTokenizer(_Data):
    """The tokenizer of a model: name without path, token-map hash, max id + 1."""

    name: str
    token_map: str
    tokens: int


class ReplacedToken(_Data):
    """An id that means another token since: with the base's rows, all that undoing it takes."""

    id: int
    old: str
    new: str


class LearnRecord(_Data):
    """`learn`: the extension of a tokenizer.

    Without `replaced`, a record is as it was before it existed, and keeps its hash.
    """

    stage: Literal["learn"] = "learn"
    base: BaseTokenizer
    family: str
    token_map: str
    content: str = Field(description="hash of merges or scores, normaliser, pre-tokenizer")
    tokens: int
    first_id: int
    added: int
    settings: dict[str, Any]
    sources: dict[str, list[TextSource]]
    versions: dict[str, str]
    probe: list[Probe]
    replaced: list[ReplacedToken] = Field(
        default=[], description="ids below first_id that have a new token, ascending"
    )

    @property
    def new_ids(self) -> NewIds:
        """The ids of the new tokens, special ones included."""
        return NewIds((one.id for one in self.replaced), self.first_id, self.tokens)

    @model_serializer(mode="wrap")
    def _without_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = plain(self)
        return {key: value for key, value in data.items() if key != "replaced" or value}


class CopiedRow(_Data):
    """A new token that starts as the mean of some base rows: those of a token or of a text."""

    id: int
    source: str
    pieces: list[int]


class DonorRecord(_Data):
    """The model that rows were taken from: its name without path, and its tokens."""

    name: str
    token_map: str
    atoms: int = Field(description="how many rows of shared tokens make one new row at most")
    shared: int = Field(description="tokens that it and the base have")
    known: int = Field(description="new tokens that it has as one token")


class StartRecord(_Data):
    """How new rows started."""

    methods: dict[str, str] = Field(description="tensor -> method")
    reason: str
    copies: list[CopiedRow] = []
    donor: DonorRecord | None = None


class GraftRecord(_Sparse):
    """`graft`: new rows in a checkpoint."""

    stage: Literal["graft"] = "graft"
    base: BaseTokenizer
    rows_before: int
    tied: bool
    base_rows: dict[str, str] = Field(
        description="tensor -> sha256 of its old rows: [0, first_id) without the replaced ones"
    )
    token_map: str
    tokens: int
    first_id: int
    rows: int
    pad_to: int
    init: str
    seed: int
    new_rows: dict[str, str] = Field(
        description="tensor -> sha256 of the replaced rows and rows [first_id, tokens)"
    )
    versions: dict[str, str]
    start: StartRecord | None = None
    roles: dict[str, str] | None = Field(
        default=None, description="tensor -> role, where `--tensor` named them"
    )
    replaced: list[int] | None = Field(
        default=None, description="ids below first_id that have a new token, ascending"
    )

    @property
    def new_ids(self) -> NewIds:
        """The ids of the new rows."""
        return NewIds(self.replaced or (), self.first_id, self.tokens)


class TrainRecord(_Data):
    """`train`: what was trained on what."""

    stage: Literal["train"] = "train"
    model: str = Field(description="hash of the trained model's manifest")
    mode: str
    settings: dict[str, Any]
    sources: dict[str, list[TextSource]]
    steps: int
    text_bytes: int
    new_rows: dict[str, str]
    versions: dict[str, str]


class MergeRecord(_Sparse):
    """`merge`: adapters that went into the weights."""

    stage: Literal["merge"] = "merge"
    adapters: list[str] = Field(description="sha256 of each adapter's weights file")
    token_map: str
    rows: int
    tied: bool
    versions: dict[str, str]
    weights: list[float] | None = Field(
        default=None, description="of each adapter, where they were merged side by side"
    )
    body_only: Literal[True] | None = Field(
        default=None, description="what the adapters hold of the vocabulary was left out"
    )
    trimmed: Literal[True] | None = Field(
        default=None, description="padding rows of the base were left out"
    )
    changed: list[str] | None = Field(
        default=None, description="tensors outside the vocabulary that changed"
    )


class SplitRecord(_Sparse):
    """`split`: LoRA that stayed beside the weights, and what went into them."""

    stage: Literal["split"] = "split"
    adapter: str = Field(description="sha256 of the adapter's weights file")
    token_map: str
    rows: int
    tied: bool
    versions: dict[str, str]
    changed: list[str] | None = Field(
        default=None, description="tensors outside the vocabulary that changed in the base"
    )


class ExtractRecord(_Data):
    """`extract`: what a model has beyond its base, as an adapter."""

    stage: Literal["extract"] = "extract"
    base: BaseTokenizer
    token_map: str
    tokens: int
    rows: int
    rank: int | None = Field(description="of every layer; None where each has its own")
    max_error: float | None
    seed: int
    versions: dict[str, str]


class AlignRecord(_Data):
    """`align`: one of several models that were put on one vocabulary."""

    stage: Literal["align"] = "align"
    models: list[BaseTokenizer]
    place: int = Field(description="which of them this one is, from 0")
    token_map: str
    rows: int
    tied: bool
    versions: dict[str, str]


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


class PruneRecord(_Data):
    """`prune`: tokens that were removed; the others are numbered anew in their order.

    It is the first record of a manifest: what the base's said is of other ids (`undo` has it).
    """

    stage: Literal["prune"] = "prune"
    base: BaseTokenizer
    rows_before: int
    tied: bool
    base_rows: dict[str, str] = Field(description="tensor -> sha256 of its rows [0, base.tokens)")
    removed: Annotated[str, Field(pattern=r"^(\d+(-\d+)?( \d+(-\d+)?)*)?$")] = Field(
        description="base ids below base.tokens that have no new id: `12 40-57`, ascending"
    )
    token_map: str
    content: str
    tokens: int
    rows: int
    settings: dict[str, Any]
    sources: dict[str, list[TextSource]]
    versions: dict[str, str]
    roles: dict[str, str] | None = Field(
        default=None, description="tensor -> role, where the base's manifest had them"
    )

    @property
    def places(self) -> dict[int, int]:
        """Base id -> new id of every token that was kept, holes of the base left out."""
        gone: set[int] = set()
        for run in self.removed.split():
            first, _, last = run.partition("-")
            gone.update(range(int(first), int(last or first) + 1))
        kept = (i for i in range(self.base.tokens) if i not in gone)
        return {old: new for new, old in enumerate(kept)}


Record = Annotated[
    LearnRecord
    | GraftRecord
    | TrainRecord
    | MergeRecord
    | SplitRecord
    | ExtractRecord
    | AlignRecord
    | BlendRecord
    | PruneRecord,
    Field(discriminator="stage"),
]


class Manifest(_Data):
    """All stage records, oldest first."""

    format: Literal[1] = 1
    records: list[Record] = []

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
        return sha256_json(self.model_dump())

    def write(self, folder: Path) -> None:
        """Write `lexigraft.json` into `folder`."""
        write_json(folder / MANIFEST, self.model_dump())

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
        return read_model(
            cls,
            path,
            needed="a manifest of format 1 as lexigraft wrote it",
            fix="copy lexigraft.json again from the step that wrote it, or update lexigraft",
        )


def read_model(kind: type[Model], path: Path, *, needed: str, fix: str) -> Model:
    """The JSON file at `path` as an instance of `kind`.

    Raises:
        LexigraftError: it is no such JSON; names the first place that does not fit.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LexigraftError(f"{path}: {where}: {first['msg']}", needed=needed, fix=fix) from None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions of `packages`, by name."""
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in sorted(packages)}
