"""Rows of tensors on disk: ranges, and single rows by token id."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lexigraft.checkpoints.header import Tensor, numpy_dtype
from lexigraft.errors import LexigraftError
from lexigraft.files import changed

if TYPE_CHECKING:  # shapes alone, as in a check of headers, need no numpy
    import numpy as np
    import numpy.typing as npt

# Sums run over blocks of this size, whoever calls: so two callers get the same mean, bit for bit.
BLOCK_BYTES = 4 * 2**20


def block_rows(tensor: Tensor) -> int:
    """How many rows of a tensor are read at a time."""
    return max(1, BLOCK_BYTES // max(1, tensor.row_bytes))


def widened(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows in a type that sums may run in: float32, or float64 where they are stored so."""
    return rows if rows.dtype == "f8" else rows.astype("f4", copy=False)


def lengths(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The Euclidean length of each row, in the type of `rows`: shape (n, D) -> (n,)."""
    import numpy as np

    found: npt.NDArray[Any] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return found


def by_row(tensor: Tensor) -> Tensor:
    """`tensor` with its vocabulary axis first: a (1, V) bias such as BART's is seen as (V,)."""
    if len(tensor.shape) == 2 and tensor.shape[0] == 1:
        return dataclasses.replace(tensor, shape=tensor.shape[1:])
    return tensor


def grown_shape(tensor: Tensor, rows: int) -> tuple[int, ...]:
    """The shape of a vocabulary tensor with another number of rows, stored as it was."""
    shape = (rows, *by_row(tensor).shape[1:])
    return shape if len(shape) == len(tensor.shape) else (1, *shape)


def read_rows(tensor: Tensor, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
    """Rows [start, stop) of a tensor on disk, in its storage dtype.

    Raises:
        LexigraftError: the rows do not exist, or the file became shorter.
    """
    import numpy as np

    stop = tensor.rows if stop is None else stop
    if not 0 <= start <= stop <= tensor.rows:
        raise LexigraftError(
            f"rows [{start}, {stop}) of {tensor.name}",
            needed=f"rows of the {tensor.rows} that {tensor.path} holds",
            fix="check the tokenizer against the weights: lexigraft check",
        )
    dtype = numpy_dtype(tensor.dtype)
    count = (stop - start) * tensor.row_bytes // dtype.itemsize
    with tensor.path.open("rb", buffering=0) as stream:
        data = np.fromfile(stream, dtype, count, offset=tensor.begin + start * tensor.row_bytes)
    if data.size != count:
        raise changed(tensor.path, "became shorter")
    return data.reshape((stop - start, *tensor.shape[1:]) if tensor.shape else ())


def in_blocks(
    tensor: Tensor, start: int = 0, stop: int | None = None, *, step: int | None = None
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """(first row, rows) of rows [start, stop) of a tensor on disk, in its storage dtype.

    Args:
        tensor: the tensor.
        start: the first row.
        stop: one past the last row; by default all.
        step: rows at a time; by default `block_rows`.

    Raises:
        LexigraftError: the rows do not exist, or the file became shorter.
    """
    stop, step = tensor.rows if stop is None else stop, step or block_rows(tensor)
    for first in range(start, stop, step):
        yield first, read_rows(tensor, first, min(first + step, stop))


def ids_in_blocks(
    tensor: Tensor, ids: npt.NDArray[np.int64], *, step: int | None = None
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """Some of `ids` (ascending) and their rows, a block at a time, in the storage dtype.

    Args:
        tensor: the tensor.
        ids: which rows.
        step: rows at a time; by default `block_rows`.

    Raises:
        LexigraftError: a row does not exist, or the file became shorter.
    """
    step = step or block_rows(tensor)
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        yield some, read_ids(tensor, some.tolist())


def read_ids(tensor: Tensor, ids: Sequence[int]) -> npt.NDArray[Any]:
    """Rows `ids` of a tensor on disk in their order; neighbours are read together.

    Raises:
        LexigraftError: a row does not exist, or the file became shorter.
    """
    import numpy as np

    blocks = [read_rows(tensor, start, stop) for start, stop in runs(ids)]
    if not blocks:
        return np.empty((0, *tensor.shape[1:]), numpy_dtype(tensor.dtype))
    return np.concatenate(blocks)


def runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, one past the last) of each stretch of ids that follow one another."""
    start = stop = -1
    for token_id in ids:
        if token_id != stop:
            if stop > start:
                yield start, stop
            start = token_id
        stop = token_id + 1
    if stop > start:
        yield start, stop


def same_values(one: Tensor, other: Tensor) -> bool:
    """True when two tensors on disk have equal type, shape and bytes; read in blocks.

    Raises:
        LexigraftError: a file became shorter.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(_byte_blocks(one), _byte_blocks(other), strict=True))


def _byte_blocks(tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor on disk, which need no numpy."""
    with tensor.path.open("rb", buffering=0) as stream:
        stream.seek(tensor.begin)
        for start in range(0, tensor.bytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, tensor.bytes - start)
            block = stream.read(size)
            if len(block) != size:
                raise changed(tensor.path, "became shorter")
            yield block
