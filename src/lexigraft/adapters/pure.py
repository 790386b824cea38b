"""LoRA on linear layers alone, in the one spelling that every server reads alike.

PEFT reads everything. Of `adapter_config.json` vLLM (`lora/peft_helper.py`) reads `r`, `lora_alpha`
and `use_rslora`, llama.cpp (`convert_lora_to_gguf.py`, `get_scale`) `lora_alpha` alone, which it
divides by the rank of each tensor; neither reads `rank_pattern` or `alpha_pattern`. So one rank and
one alpha stand for all layers: factors of a lower rank are filled up with zeros, and where the
layers' scalings differ they are multiplied into B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.adapters.folder import Addition
from lexigraft.adapters.keys import PREFIX
from lexigraft.checkpoints.header import Tensor, numpy_dtype
from lexigraft.checkpoints.plan import Compute, CopyRows, PlannedTensor
from lexigraft.checkpoints.rows import in_blocks

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PureLora:
    """An adapter of LoRA on linear layers, to be written.

    Attributes:
        tensors: A, shape (r, in), and B, shape (out, r), of each layer.
        rank: r of all of them.
        alpha: `lora_alpha`: the products are multiplied with alpha / r.
        folded: B of each layer was multiplied with its scaling, in float32.
        modules: the layers.
        transposed: the weights are stored (in, out), as GPT-2's Conv1D does.
    """

    tensors: tuple[PlannedTensor, ...]
    rank: int
    alpha: int
    folded: bool
    modules: tuple[str, ...]
    transposed: bool

    @classmethod
    def of(cls, additions: Collection[Addition], least: int = 1) -> PureLora:
        """One rank, at least `least`, and one alpha for plain LoRA on linear layers."""
        rank = max(least, *(addition.low_rank.rank for addition in additions))
        scalings = {addition.scaling for addition in additions}
        alpha = round(max(scalings) * rank)
        folded = scalings != {alpha / rank}
        tensors = []
        for addition in additions:
            low_rank, name = addition.low_rank, f"{PREFIX}{addition.low_rank.module}"
            tensors.append(_padded(f"{name}.lora_A.weight", low_rank.a, rank))
            scaling = addition.scaling if folded else 1.0
            tensors.append(_widened(f"{name}.lora_B.weight", low_rank.b, rank, scaling))
        return cls(
            tuple(tensors),
            rank,
            rank if folded else alpha,
            folded,
            tuple(sorted(addition.low_rank.module for addition in additions)),
            any(addition.transposed for addition in additions),
        )


def _padded(name: str, a: Tensor, rank: int) -> PlannedTensor:
    """A with rows of zeros up to `rank`."""
    if a.rows == rank:
        return dataclasses.replace(PlannedTensor.copy(a), name=name)

    def zeros() -> Iterator[Array]:
        yield np.zeros((rank - a.rows, *a.shape[1:]), numpy_dtype(a.dtype))

    parts = (CopyRows.whole(a), Compute((rank - a.rows) * a.row_bytes, zeros))
    return PlannedTensor(name, a.dtype, (rank, *a.shape[1:]), parts)


def _widened(name: str, b: Tensor, rank: int, scaling: float) -> PlannedTensor:
    """B times `scaling`, with columns of zeros up to `rank`; float32 where a number changes."""
    if b.shape[1] == rank and scaling == 1.0:
        return dataclasses.replace(PlannedTensor.copy(b), name=name)

    def blocks() -> Iterator[Array]:
        for _, rows in in_blocks(b):
            wide = np.zeros((len(rows), rank), np.float32)
            wide[:, : b.shape[1]] = rows.astype(np.float32) * np.float32(scaling)
            yield wide

    shape = (b.rows, rank)
    return PlannedTensor(name, "F32", shape, (Compute(4 * b.rows * rank, blocks),))


def targets(modules: Collection[str], weights: Collection[str]) -> list[str]:
    """`target_modules`: the last names of `modules`, or all of each where others share them.

    Args:
        modules: layers with LoRA.
        weights: names of all tensors of the model.

    >>> targets(["l.0.q", "l.1.q"], ["l.0.q.weight", "l.1.q.weight", "l.0.k.weight"])
    ['q']
    >>> targets(["l.1.q"], ["l.0.q.weight", "l.1.q.weight"])
    ['l.1.q']
    """
    short = {module.rsplit(".", 1)[-1] for module in modules}
    sharing = sum(
        name.removesuffix(".weight").rsplit(".", 1)[-1] in short
        for name in weights
        if name.endswith(".weight")
    )
    return sorted(short if sharing == len(modules) else modules)
