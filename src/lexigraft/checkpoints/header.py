"""The header of a safetensors file, read with every rule of the format, and written.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the data of all tensors
without a hole. Source: github.com/huggingface/safetensors, README and safetensors/src/tensor.rs.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexigraft.errors import LexigraftError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# tensor.rs, MAX_HEADER_SIZE.
HEADER_LIMIT_BYTES = 100_000_000

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        name: its key in the header.
        dtype: safetensors' name of its storage type (`BF16`, `F16`, `F32` ...).
        shape: its dimensions; `()` is a scalar.
        path: the file that holds it.
        begin: first byte of its data, counted from the start of the file.
        end: one past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.end - self.begin

    @property
    def rows(self) -> int:
        """First dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of axis 0."""
        return self.bytes // self.rows if self.rows else 0


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its tensors in the order of their data."""

    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str] | None


@cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type of a storage type; bfloat16 and float8 come from ml_dtypes.

    Raises:
        LexigraftError: numpy has no such type (types of less than a byte).

    >>> numpy_dtype("BF16").itemsize
    2
    """
    import ml_dtypes
    import numpy as np  # headers alone need no numbers

    types: dict[str, Any] = {
        "BOOL": np.bool_,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "BF16": ml_dtypes.bfloat16,
        "C64": np.complex64,
        **{f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)},
        **{f"F{8 * n}": f"<f{n}" for n in (2, 4, 8)},
    }
    if dtype not in types:
        raise LexigraftError(
            f"a tensor of type {dtype}",
            needed="one of " + ", ".join(types),
            fix="use the checkpoint before quantisation",
        )
    found: np.dtype[Any] = np.dtype(types[dtype])
    return found


def wide_type(dtype: str) -> str:
    """The type that sums of several changes start from."""
    return "F64" if dtype == "F64" else "F32"


def raw(block: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return memoryview(block.reshape(-1).view("u1"))  # type: ignore[arg-type]


def data_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return -(-math.prod(shape) * DTYPE_BITS[dtype] // 8)


def read_header(path: Path) -> Header:
    """The header of a safetensors file, held against the file's true size.

    Raises:
        LexigraftError: the file is missing, truncated, or breaks a rule of the format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            first = stream.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
                raise _damaged(path, _what_it_is(first, length, size))
            text = stream.read(length)
    except OSError as fault:
        raise LexigraftError(
            f"{path}: {fault.strerror}",
            needed="a safetensors file that can be read",
            fix=f"ls -lL {path}",
        ) from None
    return _checked(path, _parse(path, text), 8 + length, size)


def _what_it_is(first: bytes, length: int, size: int) -> str:
    if first.startswith(b"version "):
        return "is a Git LFS pointer, not the weights"
    if size < 8:
        return f"has only {size} bytes"
    return f"announces a header of {length:,} bytes in a file of {size:,}"


def _damaged(path: Path, how: str) -> LexigraftError:
    return LexigraftError(
        f"{path} {how}",
        needed="a whole safetensors file",
        fix="download this file again",
    )


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _damaged(path, f"names {twice!r} twice in its header")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if b"\\ud" in text.lower():  # half a character: it could be read, and not be written
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise _damaged(path, "has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "has a header that is not a JSON object")
    return header


def _checked(path: Path, header: dict[str, Any], start: int, size: int) -> Header:
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise _damaged(path, "has metadata that is not text")
    tensors = sorted(
        (_tensor(path, name, entry, start) for name, entry in header.items()),
        key=lambda tensor: (tensor.begin, tensor.end),
    )
    place = start
    for tensor in tensors:
        if tensor.begin != place:
            kind = "a hole" if tensor.begin > place else "an overlap"
            raise _damaged(path, f"has {kind} before the data of {tensor.name}")
        place = tensor.end
    if place != size:
        lost = "is truncated" if place > size else "has bytes that belong to no tensor"
        raise _damaged(path, f"{lost}: its header describes {place:,} bytes, the file has {size:,}")
    return Header(tuple(tensors), metadata)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _tensor(path: Path, name: str, entry: Any, start: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"has an incomplete entry for {name}") from None
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise _damaged(path, f"has a shape or offsets for {name} that are not sizes")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise LexigraftError(
            f"{path} holds {name} in the unknown type {dtype!r}",
            needed="one of " + ", ".join(DTYPE_BITS),
            fix="pip install -U lexigraft, or save the model in bfloat16",
        )
    if end - begin != data_bytes(dtype, shape):
        raise _damaged(
            path,
            f"gives {name} {end - begin:,} bytes where {dtype} of shape {shape} "
            f"has {data_bytes(dtype, shape):,}",
        )
    return Tensor(name, dtype, tuple(shape), path, start + begin, start + end)


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The start of a file: length and header of `(name, dtype, shape)`, laid out in that order.

    Padded with spaces so that the data starts at a multiple of 8, as the reference writer does.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, dtype, shape in tensors:
        end = place + data_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
