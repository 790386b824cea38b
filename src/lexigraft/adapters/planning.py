"""A merge as a plan: which tensors of the base are copied, and how the others are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy.typing as npt

from lexigraft.adapters.expand import Expansion
from lexigraft.adapters.folder import Addition, Scale
from lexigraft.adapters.match import Matched
from lexigraft.adapters.vocabulary import replaced_blocks
from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.plan import Compute, Plan, PlannedTensor


def merged_plan(
    checkpoint: Checkpoint,
    vocabulary: VocabularyTensors,
    matched: Matched,
    expansion: Expansion,
) -> Plan:
    """The base with every change of an adapter: LoRA, replaced tensors, vocabulary rows.

    Args:
        checkpoint: the base.
        vocabulary: its vocabulary tensors.
        matched: the adapter by tensors of the base.
        expansion: the vocabulary tensors of the result.
    """
    plan = Plan.of(checkpoint)
    changed = [
        _with_lora(checkpoint.tensors[name], addition) for name, addition in matched.linear.items()
    ]
    changed += [
        _with_lora_bias(checkpoint.tensors[name], addition)
        for name, addition in matched.biases.items()
    ]
    changed += [_scaled(checkpoint.tensors[name], scale) for name, scale in matched.scaled.items()]
    changed += [
        _replaced(checkpoint.tensors[name], tensor) for name, tensor in matched.replaced.items()
    ]
    if expansion.tied and expansion.tensors and vocabulary.head_name in checkpoint.tensors:
        # A stored copy of the embedding: loaders tie the two again.
        plan = plan.drop(vocabulary.head_name)
        plan = dataclasses.replace(plan, files=tuple(file for file in plan.files if file.tensors))
    for rows in expansion.tensors:
        if rows.name in checkpoint.tensors:
            changed.append(rows.planned())
        else:
            plan = plan.add(rows.planned(), after=vocabulary.embeds[0])
    return plan.replace(changed)


def _with_lora(weight: Tensor, addition: Addition) -> PlannedTensor:
    def blocks() -> Iterator[npt.NDArray[Any]]:
        from lexigraft.adapters.delta import merged_blocks

        return merged_blocks(weight, addition)

    return PlannedTensor(weight.name, weight.dtype, weight.shape, (Compute(weight.bytes, blocks),))


def _with_lora_bias(bias: Tensor, addition: Addition) -> PlannedTensor:
    def blocks() -> Iterator[npt.NDArray[Any]]:
        from lexigraft.adapters.delta import merged_bias

        yield merged_bias(bias, addition)

    return PlannedTensor(bias.name, bias.dtype, bias.shape, (Compute(bias.bytes, blocks),))


def _scaled(tensor: Tensor, scale: Scale) -> PlannedTensor:
    def blocks() -> Iterator[npt.NDArray[Any]]:
        from lexigraft.adapters.delta import scaled_blocks

        return scaled_blocks(tensor, scale)

    return PlannedTensor(tensor.name, tensor.dtype, tensor.shape, (Compute(tensor.bytes, blocks),))


def _replaced(weight: Tensor, values: Tensor) -> PlannedTensor:
    blocks = partial(replaced_blocks, weight, values)
    return PlannedTensor(weight.name, weight.dtype, weight.shape, (Compute(weight.bytes, blocks),))
