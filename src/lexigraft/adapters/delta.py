"""What a LoRA adds to a matrix, computed as PEFT computes it, in blocks of rows.

Formula (Hu et al. 2021, arXiv:2106.09685): W' = W + s B A. PEFT 0.21 multiplies in float32. For a
linear layer it adds the product to the stored type, so that each element is rounded once; for an
embedding it casts the product to the stored type first. This module does the same operations in
the same order and is bit-identical to it.

DoRA (Liu et al. 2024, arXiv:2402.09353): W' = m (W + s B A) / n, where n is the norm of each row of
W + s B A: the weights of one output. Where outputs are columns, as in an embedding, n runs over
the whole vocabulary.

(IA)3 (Liu et al. 2022, arXiv:2205.05638) multiplies the outputs or inputs of a layer with a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lexigraft.adapters.finite import all_finite
from lexigraft.adapters.folder import Addition, Scale
from lexigraft.adapters.rounding import Rounding
from lexigraft.checkpoints.header import Tensor, numpy_dtype, wide_type
from lexigraft.checkpoints.rows import in_blocks, read_rows
from lexigraft.errors import LexigraftError

Array = npt.NDArray[Any]

# Of the float32 change. Each writer holds one, the weights of the same rows, and A and B. At 8 MiB
# a merge of 1.7 GB took 150 MB more memory, and no fewer seconds.
BLOCK_BYTES = 2 * 2**20
# Matrix kernels sum the last rows, where fewer than a tile is left, in another order. Blocks of
# whole tiles give the bits of the whole product on every shape that we tried.
TILE_ROWS = 64
_HALF = 2  # bytes of a 16-bit number
# Of the columns that DoRA's norms are taken of at a time, in the type of W.
NORM_BYTES = 64 * 2**20


class Delta:
    """The change that a LoRA makes to a matrix W."""

    def __init__(
        self,
        addition: Addition,
        read: Callable[[int, int], Array],
        dtype: str,
        rounding: Rounding | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            addition: s, A, B and m.
            read: gives rows [start, stop) of W, as many as A and B were trained on.
            dtype: the safetensors type of W.
            rounding: is told what rounding to a 16-bit type costs.
        """
        self._rounding = rounding
        self._read = read
        self._dtype = dtype
        self._by_column = addition.low_rank.of_embedding or addition.transposed
        self._low_rank = addition.low_rank
        self._scaling = addition.scaling
        # PEFT casts what it adds to an embedding or a bare parameter first, and rounds twice.
        self._is_cast = addition.low_rank.of_embedding or addition.low_rank.expert is not None

    def onto(self, rows: Array, start: int) -> Array:
        """`rows` of W, the first of which is row `start`, changed; they are overwritten."""
        block = to_torch(rows, self._dtype)
        change = self._rows(start, start + len(rows))
        exact = None
        if self._low_rank.magnitude is not None:
            exact = self._with_magnitude(block + change, start)
            block[:] = exact
        elif block.dtype.itemsize > _HALF:
            block += change
        else:
            added = change.to(block.dtype) if self._is_cast else None
            exact = change.add_(block)  # in float32
            block[:] = exact if added is None else block + added
        if self._rounding is not None and exact is not None and exact.dtype != block.dtype:
            low, high = torch.aminmax(exact.sub_(block))
            self._rounding.see(max(-float(low), float(high)))
        return to_numpy(block, self._dtype)

    def _with_magnitude(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """DoRA: rows of W + s B A, float32, each output of which gets its trained norm."""
        if self._by_column:
            return (self._magnitude / self._column_norms).view(1, -1) * rows
        norms = torch.linalg.norm(rows, dim=1)
        return (self._magnitude[start : start + len(rows)] / norms).view(-1, 1) * rows

    @cached_property
    def _magnitude(self) -> torch.Tensor:
        assert self._low_rank.magnitude is not None
        return _matrix(self._low_rank.magnitude)

    @cached_property
    def _column_norms(self) -> torch.Tensor:
        """The norm of each column of W + s B A; W is read once for each group of columns."""
        count, width = self._right.shape[1], self._left.shape[0]
        rows = max(1, BLOCK_BYTES // (4 * width))
        group = max(1, NORM_BYTES // (4 * count * TILE_ROWS)) * TILE_ROWS
        norms = []
        for first in range(0, width, group):
            part = self._left[first : first + group]
            change = (part @ self._right).T.mul_(self._scaling)
            weight = torch.cat(
                [
                    to_torch(self._read(start, min(start + rows, count)), self._dtype)[
                        :, first : first + group
                    ]
                    for start in range(0, count, rows)
                ]
            )
            norms.append(torch.linalg.norm(weight.T + change.T, dim=1))
        return torch.cat(norms)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of s B A, float32, in the layout of the matrix."""
        first = start - start % TILE_ROWS
        last = stop + -stop % TILE_ROWS
        if self._by_column:
            # Formed as B A and then transposed, so that sums run in PEFT's order.
            product = (self._left @ self._right[:, first:last]).T
        else:
            product = self._left[first:last] @ self._right
        return product[start - first : stop - first].mul_(self._scaling)

    @cached_property
    def _left(self) -> torch.Tensor:
        left, expert = _matrix(self._low_rank.b), self._low_rank.expert
        if expert is None:
            return left
        return left.reshape(len(left), -1, expert.count)[expert.first :, :, expert.index]

    @cached_property
    def _right(self) -> torch.Tensor:
        right, expert = _matrix(self._low_rank.a), self._low_rank.expert
        if expert is None:
            return right
        return right.reshape(expert.count, -1, right.shape[1])[expert.index]


def changed_blocks(
    tensor: Tensor, change: Addition | Scale | Tensor, rounding: Rounding | None = None
) -> Iterator[Array]:
    """The rows of a tensor with one change, in its type, block by block.

    Args:
        tensor: on disk: W, shape (out, in), or (in, out) if transposed; of an embedding (V, D); or
            the bias of a layer, shape (out,).
        change: LoRA or DoRA, (IA)3, or the values that replace it.
        rounding: is told what rounding LoRA's or DoRA's sums to a 16-bit type costs.

    Raises:
        LexigraftError: the result is not finite.
    """
    changed = changer(tensor, change, rounding=rounding)
    for start, block in in_blocks(tensor, step=block_rows(tensor)):
        rows = changed(block, start)
        if not all_finite(rows, tensor.dtype):
            raise not_finite(tensor.name, source_of(change))
        yield rows


def block_rows(tensor: Tensor) -> int:
    """How many rows of a tensor are changed at a time: whole tiles."""
    width = math.prod(tensor.shape[1:])
    return max(1, BLOCK_BYTES // (4 * width * TILE_ROWS)) * TILE_ROWS


def changer(
    tensor: Tensor,
    change: Addition | Scale | Tensor,
    *,
    wide: bool = False,
    rounding: Rounding | None = None,
) -> Callable[[Array, int], Array]:
    """What makes rows of `tensor`, and the number of the first, those of the merged model.

    Args:
        tensor: see `changed_blocks`.
        change: see there.
        wide: rows come and go in float32 (or float64), and nothing is rounded to the type of W.
        rounding: see `changed_blocks`.
    """
    dtype = wide_type(tensor.dtype) if wide else tensor.dtype

    def read(start: int, stop: int) -> Array:
        return read_rows(tensor, start, stop).astype(numpy_dtype(dtype), copy=False)

    if isinstance(change, Tensor):
        values = change

        def replaced(rows: Array, start: int) -> Array:
            with np.errstate(over="ignore"):  # what is not finite is told by name
                return read_rows(values, start, start + len(rows)).astype(rows.dtype, copy=False)

        return replaced
    if isinstance(change, Scale):
        return partial(_scaled, scale=change, of=tensor, dtype=dtype)
    if len(tensor.shape) == 1:
        return partial(_with_bias, addition=change, dtype=dtype)
    return Delta(change, read, dtype, rounding).onto


def source_of(change: Addition | Scale | Tensor) -> Path:
    """The file that a change comes from."""
    if isinstance(change, Tensor):
        return change.path
    return change.vector.path if isinstance(change, Scale) else change.low_rank.a.path


def _with_bias(rows: Array, start: int, *, addition: Addition, dtype: str) -> Array:
    """The bias of a layer, shape (out,), plus s times the bias of its LoRA."""
    assert addition.low_rank.bias is not None
    block = to_torch(rows, dtype)
    block += _matrix(addition.low_rank.bias)[start : start + len(rows)].mul_(addition.scaling)
    return to_numpy(block, dtype)


def _scaled(rows: Array, start: int, *, scale: Scale, of: Tensor, dtype: str) -> Array:
    """Rows of a matrix or a bias times (IA)3's vector."""
    vector = _matrix(scale.vector)
    if len(of.shape) == 1:
        vector = vector.flatten()
    elif scale.transposed:
        vector = vector.T
    block = to_torch(rows, dtype)
    factor = vector[start : start + len(rows)] if len(vector) == of.rows else vector
    return to_numpy(torch.mul(block, factor).to(block.dtype), dtype)


def not_finite(name: str, path: Path) -> LexigraftError:
    """The fault of a merge whose result is infinite or not a number."""
    return LexigraftError(
        f"{name} is not finite after the merge",
        needed="finite numbers in the adapter, and a result within the range of the base's type",
        fix=f"look at the training run that wrote {path}: its loss became NaN or infinite",
    )


def _matrix(tensor: Tensor) -> torch.Tensor:
    # PEFT holds adapters in float32, whatever their file says (autocast_adapter_dtype).
    return to_torch(read_rows(tensor), tensor.dtype).to(torch.float32)


def to_torch(array: Array, dtype: str) -> torch.Tensor:
    """`array` of safetensors type `dtype` as a tensor that shares its memory."""
    if dtype == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor, dtype: str) -> Array:
    """The inverse of `to_torch`."""
    tensor = tensor.contiguous()
    if dtype == "BF16":
        tensor = tensor.view(torch.int16)
    array: Array = tensor.numpy()
    return array.view(numpy_dtype(dtype))
