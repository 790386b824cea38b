"""What a LoRA adds to a linear layer, computed as PEFT computes it, in blocks of rows.

Formula (Hu et al. 2021, arXiv:2106.09685): W' = W + s B A. PEFT 0.21 multiplies in float32 and
adds to the stored type, so each element is rounded once; this module does the same operations in
the same order and is bit-identical where a whole tensor fits into one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lexigraft.adapters.finite import all_finite
from lexigraft.adapters.folder import LowRank
from lexigraft.checkpoints.header import Tensor, numpy_dtype
from lexigraft.checkpoints.rows import read_rows
from lexigraft.errors import LexigraftError

# Of the float32 change. Each writer holds one, the weights of the same rows, and A and B.
BLOCK_BYTES = 8 * 2**20
# Matrix kernels sum the last rows, where fewer than a tile is left, in another order. Blocks of
# whole tiles give the bits of the whole product on every shape that we tried.
TILE_ROWS = 64


def merged_blocks(
    weight: Tensor, low_rank: LowRank, scaling: float, *, transposed: bool
) -> Iterator[npt.NDArray[Any]]:
    """The rows of W + scaling * B A in the type of W, block by block.

    Args:
        weight: W on disk, shape (out, in), or (in, out) if `transposed`.
        low_rank: A, shape (r, in), and B, shape (out, r).
        scaling: s.
        transposed: W is stored (in, out), as GPT-2's Conv1D does.

    Raises:
        LexigraftError: the result is not finite.
    """
    left, right = _matrix(low_rank.b), _matrix(low_rank.a)
    if transposed:
        # The product is formed as B A and then transposed, so that sums run in PEFT's order.
        whole = (left @ right).T
    step = max(1, BLOCK_BYTES // (4 * weight.shape[1] * TILE_ROWS)) * TILE_ROWS
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        change = whole[start:stop] if transposed else left[start:stop] @ right
        block = to_torch(read_rows(weight, start, stop), weight.dtype)
        block += change.mul(scaling) if transposed else change.mul_(scaling)
        merged = to_numpy(block, weight.dtype)
        if not all_finite(merged, weight.dtype):
            raise not_finite(weight.name, low_rank.a.path)
        yield merged


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
