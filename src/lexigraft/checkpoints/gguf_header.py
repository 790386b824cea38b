"""The header of a GGUF file: metadata and shapes, read without any library and within bounds.

Method: the GGUF specification (ggml-org/ggml, docs/gguf.md), versions 2 and 3. Every count is held
against the size of the file before anything is read for it, so that a file costs no more time and
memory than its own length justifies.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import is_there

_MAGIC = b"GGUF"
# gguf_type: 8 is a string, 9 an array; the others are numbers of fixed size.
_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
# Pairs, entries of lists and tensors together. A vocabulary of 262,144 with its merges has 1.5
# million, in 30 MB.
_MOST_ENTRIES = 2**22
_MOST_BYTES = 2**28
# ggml_type -> (numbers in a block, bytes of a block); others are not held against the file's size.
_BLOCKS = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    20: (32, 18),
    23: (256, 136),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    30: (1, 2),
    39: (32, 17),
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file; `shape` has the rows first, as in safetensors."""

    name: str
    shape: tuple[int, ...]
    kind: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its weights.

    Attributes:
        path: the file.
        metadata: key -> number, text, or list of them.
        tensors: by name, in the order of the file.
        bytes: its length.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    bytes: int

    def texts(self, key: str) -> list[str]:
        """A list of texts; [] where there is none."""
        value = self.metadata.get(key)
        texts = value if isinstance(value, list) else []
        return texts if all(isinstance(text, str) for text in texts) else []

    def numbers(self, key: str) -> list[float]:
        """A list of numbers; [] where there is none."""
        value = self.metadata.get(key)
        numbers = value if isinstance(value, list) else []
        return numbers if all(isinstance(n, int | float) for n in numbers) else []


def gguf_files(path: Path) -> list[Path]:
    """The GGUF file that `path` is, or those that are the model in a folder without safetensors."""
    if not is_there(path):
        return []
    if not path.is_dir():
        return [path] if path.suffix == ".gguf" and path.is_file() else []
    if any(path.glob("*.safetensors")):
        return []
    # mmproj: the eyes of a model.
    return sorted(file for file in path.glob("*.gguf") if not file.name.startswith("mmproj"))


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at `path`, held against the file's true size.

    Raises:
        LexigraftError: the file is missing, cut off, or breaks a rule of the format.
        RefusalError: a version or byte order that is not read.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != _MAGIC:
                raise _damaged(path, "does not begin with GGUF")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except (OSError, ValueError) as fault:  # mmap refuses an empty file with a ValueError
        words = getattr(fault, "strerror", None) or str(fault)
        raise LexigraftError(
            f"{path}: {words}", needed="a GGUF file that can be read", fix=f"ls -lL {path}"
        ) from None


def _damaged(path: Path, how: str) -> LexigraftError:
    return LexigraftError(
        f"{path} {how}", needed="a whole GGUF file", fix="download or convert this file again"
    )


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._place = path, data, 4
        self._left = _MOST_ENTRIES

    def header(self) -> GgufHeader:
        version = self._number("<I")
        if version not in (2, 3):
            raise RefusalError(
                f"{self._path} is GGUF of version {version:,}",
                needed="version 2 or 3, little endian",
                fix="convert the model again with a current llama.cpp",
            )
        tensors, pairs = self._count(24), self._count(13)  # bytes that one takes at the least
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text()
            if key in metadata:
                raise _damaged(self._path, f"gives {key!r} twice")
            metadata[key] = self._value(self._number("<I"))
        found, ends = {}, [0]
        for _ in range(tensors):
            tensor, offset = self._tensor()
            if tensor.name in found:
                raise _damaged(self._path, f"holds {tensor.name!r} twice")
            found[tensor.name] = tensor
            if tensor.kind in _BLOCKS:
                numbers, size = _BLOCKS[tensor.kind]
                ends.append(offset + -(-math.prod(tensor.shape) // numbers) * size)
        self._whole(metadata.get("general.alignment", 32), max(ends))
        return GgufHeader(self._path, metadata, found, self._place)

    def _whole(self, alignment: Any, length: int) -> None:
        if not isinstance(alignment, int) or alignment < 1 or alignment > 2**20:
            raise _damaged(self._path, f"says general.alignment = {alignment}")
        end = -(-self._place // alignment) * alignment + length if length else self._place
        if end > len(self._data):
            raise _damaged(
                self._path,
                f"is cut off: its header describes {end:,} bytes, it has {len(self._data):,}",
            )

    def _take(self, size: int) -> bytes:
        begin, self._place = self._place, self._place + size
        if self._place > len(self._data):
            raise _damaged(self._path, "is cut off inside its header")
        if self._place > _MOST_BYTES:
            raise _damaged(self._path, f"has a header of more than {_MOST_BYTES:,} bytes")
        return self._data[begin : self._place]

    def _number(self, kind: str) -> Any:
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _count(self, least: int) -> int:
        """A number of things that take `least` bytes or more each."""
        count = int(self._number("<Q"))
        if count * least > len(self._data) - self._place:
            raise _damaged(self._path, f"announces {count:,} entries in {len(self._data):,} bytes")
        self._left -= count
        if self._left < 0:
            raise _damaged(self._path, f"has a header of more than {_MOST_ENTRIES:,} entries")
        return count

    def _text(self) -> str:
        size = int(self._number("<Q"))
        return self._take(size).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(self._layout(kind))
        inner = self._number("<I")
        if inner == _STRING:
            return [self._text() for _ in range(self._count(8))]
        layout = self._layout(inner)  # lists of lists are in no file that llama.cpp reads
        size = struct.calcsize(layout)
        count = self._count(size)
        return [one for (one,) in struct.iter_unpack(layout, self._take(count * size))]

    def _layout(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise _damaged(self._path, f"holds a value of the unknown type {kind:,}")
        return _NUMBERS[kind]

    def _tensor(self) -> tuple[GgufTensor, int]:
        name, dimensions = self._text(), self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise _damaged(self._path, f"gives {name!r} {dimensions:,} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        return GgufTensor(name, shape, self._number("<I")), self._number("<Q")
