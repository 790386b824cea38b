"""What a rewritten checkpoint will consist of, decided from headers before a byte is written."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexigraft.checkpoints.checkpoint import SINGLE, Checkpoint
from lexigraft.checkpoints.header import DTYPE_BITS, Tensor, data_bytes, header_bytes
from lexigraft.errors import LexigraftError

if TYPE_CHECKING:
    import numpy.typing as npt

DEFAULT_METADATA: Mapping[str, str] = {"format": "pt"}  # transformers 4 refuses files without


@dataclass(frozen=True)
class CopyRows:
    """Rows [start, stop) of a tensor on disk, copied as bytes."""

    tensor: Tensor
    start: int
    stop: int

    @classmethod
    def whole(cls, tensor: Tensor) -> CopyRows:
        """Every row."""
        return cls(tensor, 0, tensor.rows)

    @property
    def begin(self) -> int:
        """First byte, counted from the start of the file."""
        return self.tensor.begin + self.start * self.tensor.row_bytes

    @property
    def bytes(self) -> int:
        """Bytes to copy."""
        return (self.stop - self.start) * self.tensor.row_bytes


@dataclass(frozen=True)
class Compute:
    """Values that are made while writing.

    Attributes:
        bytes: their size in the file.
        blocks: gives arrays in the planned dtype whose bytes, one after another, are the values.
            Called once, in the thread that writes the file.
    """

    bytes: int
    blocks: Callable[[], Iterator[npt.NDArray[Any]]]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: its parts, one after another, are its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[CopyRows | Compute, ...]

    def __post_init__(self) -> None:
        planned = sum(part.bytes for part in self.parts)
        if planned != self.bytes:
            raise ValueError(f"{self.name}: parts of {planned} bytes for {self.bytes}")

    @classmethod
    def copy(cls, tensor: Tensor) -> PlannedTensor:
        """`tensor` as it is."""
        return cls(tensor.name, tensor.dtype, tensor.shape, (CopyRows.whole(tensor),))

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return data_bytes(self.dtype, self.shape)

    @property
    def bytes_copied(self) -> int:
        """How much of it is copied from disk."""
        return sum(part.bytes for part in self.parts if isinstance(part, CopyRows))

    @property
    def rule(self) -> str:
        """How it comes about: `copied`, `computed`, or `copied and computed`."""
        kinds = {"copied" if isinstance(part, CopyRows) else "computed" for part in self.parts}
        return " and ".join(sorted(kinds, reverse=True)) or "copied"


@dataclass(frozen=True)
class PlannedFile:
    """A shard of the output.

    Attributes:
        name: its bare file name.
        tensors: what it holds, in the order of the data.
        metadata: the header's `__metadata__`.
        verbatim: the input file that this one equals byte for byte; None if anything changes.
    """

    name: str
    tensors: tuple[PlannedTensor, ...]
    metadata: Mapping[str, str]
    verbatim: Path | None = None

    @classmethod
    def of(
        cls, name: str, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]
    ) -> PlannedFile:
        """A new file, in which tensors lie as safetensors itself puts them: widest types first."""
        return cls(name, tuple(sorted(tensors, key=_place_in_file)), metadata)

    @property
    def head(self) -> bytes:
        """Length and header."""
        return header_bytes(((t.name, t.dtype, t.shape) for t in self.tensors), self.metadata)

    @property
    def bytes(self) -> int:
        """Size of the file; of one that stays as it is, the size that its header tells."""
        if self.verbatim is not None and self.tensors:
            parts = (part for tensor in self.tensors for part in tensor.parts)
            return max(part.tensor.end for part in parts if isinstance(part, CopyRows))
        return len(self.head) + sum(tensor.bytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """A whole checkpoint to write.

    Attributes:
        files: its shards.
        index: the input's index, whose unknown keys are kept; None for a single file.
        sources: the input's tensors, for the dry run.
    """

    files: tuple[PlannedFile, ...]
    index: dict[str, Any] | None
    sources: Mapping[str, Tensor]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Plan:
        """A plan that copies everything; `replace`, `add` and `drop` change it."""
        files = tuple(
            PlannedFile(
                name,
                tuple(map(PlannedTensor.copy, header.tensors)),
                DEFAULT_METADATA if header.metadata is None else header.metadata,
                checkpoint.folder / name,
            )
            for name, header in checkpoint.headers.items()
        )
        return cls(files, checkpoint.index, checkpoint.tensors)

    def replace(self, tensors: Iterable[PlannedTensor]) -> Plan:
        """A plan in which each of `tensors` stands in the place of the one of the same name.

        Raises:
            KeyError: the plan has no tensor of that name.
        """
        changed = {tensor.name: tensor for tensor in tensors}
        if unknown := changed.keys() - self.tensors.keys():
            raise KeyError(f"not in the plan: {sorted(unknown)}")
        return self._with(lambda tensor: (changed.get(tensor.name, tensor),))

    def add(self, tensor: PlannedTensor, *, after: str) -> Plan:
        """A plan with one tensor more, in the file of the tensor `after` and next to it.

        Raises:
            KeyError: the name is taken, or `after` is not in the plan.
        """
        if tensor.name in self.tensors or after not in self.tensors:
            raise KeyError(f"cannot add {tensor.name} after {after}")
        return self._with(lambda other: (other, tensor) if other.name == after else (other,))

    def drop(self, name: str) -> Plan:
        """A plan without the tensor `name`."""
        return self._with(lambda tensor: () if tensor.name == name else (tensor,))

    def _with(self, change: Callable[[PlannedTensor], tuple[PlannedTensor, ...]]) -> Plan:
        files = []
        for file in self.files:
            tensors = tuple(new for tensor in file.tensors for new in change(tensor))
            if tensors != file.tensors:
                file = dataclasses.replace(file, tensors=tensors, verbatim=None)  # noqa: PLW2901
            files.append(file)
        return dataclasses.replace(self, files=tuple(files))

    def recut(self, size: str | int) -> Plan:
        """A plan with the same tensors in files of at most `size` bytes of them.

        A tensor that is larger has a file of its own. One file is `model.safetensors`, several
        are numbered as transformers numbers them; inside, tensors lie as safetensors itself puts
        them, the widest types first.

        Args:
            size: bytes, or a number with a unit: `5GB`, `500MB`; see `parse_size`.
        """
        limit, groups = parse_size(size), [list[PlannedTensor]()]
        for tensor in self.tensors.values():
            held = sum(other.bytes for other in groups[-1])
            if groups[-1] and held + tensor.bytes > limit:
                groups.append([])
            groups[-1].append(tensor)
        metadata = {k: v for file in self.files for k, v in file.metadata.items()}
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        files = tuple(
            PlannedFile.of(name, group, metadata)
            for name, group in zip(names if len(groups) > 1 else [SINGLE], groups, strict=True)
        )
        return dataclasses.replace(self, files=files, index=self.index if len(groups) > 1 else None)

    @property
    def tensors(self) -> dict[str, PlannedTensor]:
        """Every tensor of the output by name."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    def sizes(self, *, link: bool = False) -> tuple[int, int]:
        """Bytes of tensors copied from the input, and bytes of files put on the disk.

        With `link`, shards that become hard links count in neither.
        """
        files = [file for file in self.files if not (link and file.verbatim)]
        copied = sum(tensor.bytes_copied for file in files for tensor in file.tensors)
        return copied, sum(file.bytes for file in files)

    def index_content(self) -> dict[str, Any] | None:
        """The output's model.safetensors.index.json; None for a single file."""
        if self.index is None and len(self.files) == 1:
            return None
        content = dict(self.index or {})
        given = content.get("metadata")
        metadata = dict(given) if isinstance(given, dict) else {}
        metadata["total_size"] = sum(tensor.bytes for tensor in self.tensors.values())
        if "total_parameters" in metadata:
            count = sum(math.prod(tensor.shape) for tensor in self.tensors.values())
            metadata["total_parameters"] = count
        content["metadata"] = metadata
        places = ((t.name, file.name) for file in self.files for t in file.tensors)
        content["weight_map"] = dict(sorted(places))
        return content

    def to_json(self, *, link: bool = False) -> list[dict[str, Any]]:
        """Per tensor where from, where to, by which rule, shapes and bytes (the dry run)."""
        return [
            _entry(file, tensor, self.sources.get(tensor.name), link and bool(file.verbatim))
            for file in self.files
            for tensor in file.tensors
        ]


def _place_in_file(tensor: PlannedTensor) -> tuple[int, str]:
    return -DTYPE_BITS[tensor.dtype], tensor.name


def parse_size(size: str | int) -> int:
    """A number of bytes, or a text such as `500MB`, `5GB` (powers of 1000) or `2GiB` (of 1024).

    Raises:
        LexigraftError: it is none, or less than one byte.

    >>> parse_size("1.5GB"), parse_size("2KiB"), parse_size(7)
    (1500000000, 2048, 7)
    """
    found = re.fullmatch(
        r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", str(size).strip(), re.IGNORECASE
    )
    if found is not None:
        number, unit, binary = found.groups()
        power = "KMGT".index(unit.upper()) + 1 if unit else 0
        from fractions import Fraction

        count = int(Fraction(number) * (1024 if binary else 1000) ** power)
        if count > 0:
            return count
    raise LexigraftError(
        f"the size {size}", needed="a number of bytes above 0, such as 500MB", fix="5GB"
    )


def _entry(
    file: PlannedFile, tensor: PlannedTensor, old: Tensor | None, linked: bool
) -> dict[str, Any]:
    return {
        "tensor": tensor.name,
        "file": file.name,
        "source": old.path.name if old else None,
        "rule": "linked" if linked else tensor.rule,
        "dtype": tensor.dtype,
        "old_shape": list(old.shape) if old else None,
        "shape": list(tensor.shape),
        "bytes_copied": 0 if linked else tensor.bytes_copied,
        "bytes_computed": tensor.bytes - tensor.bytes_copied,
        "bytes_written": 0 if linked else tensor.bytes,
    }
