"""What a LoRA adds to a matrix, computed as PEFT computes it, in blocks of rows.

Formula (Hu et al. 2021, arXiv:2106.09685): W' = W + s B A. PEFT 0.21 multiplies in float32. For a
linear layer it adds the product to the stored type, so that each element is rounded once; for an
embedding it casts the product to the stored type first. This module does the same operations in
the same order and is bit-identical to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lexigraft.adapters.finite import all_finite
from lexigraft.adapters.folder import Addition
from lexigraft.checkpoints.header import Tensor, numpy_dtype
from lexigraft.checkpoints.rows import read_rows
from lexigraft.errors import LexigraftError

# Of the float32 change. Each writer holds one, the weights of the same rows, and A and B.
BLOCK_BYTES = 8 * 2**20
# Matrix kernels sum the last rows, where fewer than a tile is left, in another order. Blocks of
# whole tiles give the bits of the whole product on every shape that we tried.
TILE_ROWS = 64


class Delta:
    """The change that a LoRA makes to a matrix."""

    def __init__(self, addition: Addition) -> None:
        """Nothing is read yet."""
        self._low_rank = addition.low_rank
        self._scaling = addition.scaling
        self._transposed = addition.transposed

    def onto(self, rows: npt.NDArray[Any], dtype: str, start: int) -> npt.NDArray[Any]:
        """`rows` of safetensors type `dtype`, the first of which is row `start`, changed.

        Args:
            rows: a block of the matrix, which is overwritten.
            dtype: its safetensors type.
            start: a number below the rows of the matrix.
        """
        block = to_torch(rows, dtype)
        change = self._rows(start, start + len(rows))
        block += change.to(block.dtype) if self._low_rank.of_embedding else change
        return to_numpy(block, dtype)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of s B A, float32, in the layout of the matrix."""
        first = start - start % TILE_ROWS
        last = stop + -stop % TILE_ROWS
        if self._low_rank.of_embedding or self._transposed:
            # Formed as B A and then transposed, so that sums run in PEFT's order.
            product = (self._left @ self._right[:, first:last]).T
        else:
            product = self._left[first:last] @ self._right
        return product[start - first : stop - first].mul_(self._scaling)

    @cached_property
    def _left(self) -> torch.Tensor:
        return _matrix(self._low_rank.b)

    @cached_property
    def _right(self) -> torch.Tensor:
        return _matrix(self._low_rank.a)


def merged_blocks(weight: Tensor, addition: Addition) -> Iterator[npt.NDArray[Any]]:
    """The rows of W + s B A in the type of W, block by block.

    Args:
        weight: W on disk, shape (out, in), or (in, out) if transposed; of an embedding (V, D).
        addition: s, A and B.

    Raises:
        LexigraftError: the result is not finite.
    """
    delta = Delta(addition)
    step = max(1, BLOCK_BYTES // (4 * weight.shape[1] * TILE_ROWS)) * TILE_ROWS
    for start in range(0, weight.rows, step):
        block = read_rows(weight, start, min(start + step, weight.rows))
        merged = delta.onto(block, weight.dtype, start)
        if not all_finite(merged, weight.dtype):
            raise not_finite(weight.name, addition.low_rank.a.path)
        yield merged


def merged_bias(bias: Tensor, addition: Addition) -> npt.NDArray[Any]:
    """The bias of a layer, shape (out,), plus s times the bias of its LoRA.

    Raises:
        LexigraftError: the result is not finite.
    """
    assert addition.low_rank.bias is not None
    block = to_torch(read_rows(bias), bias.dtype)
    block += _matrix(addition.low_rank.bias).mul_(addition.scaling)
    merged = to_numpy(block, bias.dtype)
    if not all_finite(merged, bias.dtype):
        raise not_finite(bias.name, addition.low_rank.bias.path)
    return merged


def not_finite(name: str, path: Any) -> LexigraftError:
    """The fault of a merge whose result is infinite or not a number."""
    return LexigraftError(
        f"{name} is not finite after the merge",
        needed="finite numbers in the adapter, and a result within the range of the base's type",
        fix=f"look at the training run that wrote {path}: its loss became NaN or infinite",
    )


def _matrix(tensor: Tensor) -> torch.Tensor:
    # PEFT holds adapters in float32, whatever their file says (autocast_adapter_dtype).
    return to_torch(read_rows(tensor), tensor.dtype).to(torch.float32)


def to_torch(array: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    """`array` of safetensors type `dtype` as a tensor that shares its memory."""
    if dtype == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor, dtype: str) -> npt.NDArray[Any]:
    """The inverse of `to_torch`."""
    tensor = tensor.contiguous()
    if dtype == "BF16":
        tensor = tensor.view(torch.int16)
    array: npt.NDArray[Any] = tensor.numpy()
    return array.view(numpy_dtype(dtype))
