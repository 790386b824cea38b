"""A merge as a plan: which tensors of the base are copied, and how the others are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy.typing as npt

from lexigraft.adapters.expand import Expansion
from lexigraft.adapters.folder import Addition, Scale
from lexigraft.adapters.match import Matched
from lexigraft.adapters.rounding import Rounding
from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.plan import Compute, Plan, PlannedTensor


def merged_plan(
    checkpoint: Checkpoint,
    vocabulary: VocabularyTensors,
    matched: Matched,
    expansion: Expansion,
    *,
    dropped: Iterable[str] = (),
    rounding: Rounding | None = None,
) -> Plan:
    """The base with every change of an adapter: LoRA, replaced tensors, vocabulary rows.

    Args:
        checkpoint: the base.
        vocabulary: its vocabulary tensors.
        matched: the adapter by tensors of the base.
        expansion: the vocabulary tensors of the result.
        dropped: tensors of the base that the result has not.
        rounding: is told what rounding sums to a 16-bit type costs.
    """
    plan = without(Plan.of(checkpoint), dropped)
    plan = plan.replace(
        _changed(checkpoint.tensors[name], by, rounding) for name, by in matched.changes.items()
    )
    tables = [rows.planned() for rows in expansion.tensors]
    plan = with_tables(plan, tables, vocabulary, tied=expansion.tied)
    labels = matched.labels.items()
    return with_labels(
        plan, (dataclasses.replace(PlannedTensor.copy(t), name=n) for n, t in labels)
    )


def with_labels(plan: Plan, heads: Iterable[PlannedTensor]) -> Plan:
    """`plan` with the tensors of a head over labels, which the base has not."""
    for head in heads:
        plan = plan.add(head, after=list(plan.tensors)[-1])
    return plan


def with_tables(
    plan: Plan, tables: Sequence[PlannedTensor], vocabulary: VocabularyTensors, *, tied: bool
) -> Plan:
    """`plan` with the vocabulary tensors that a result has instead of the base's.

    A head that the base does not store is put next to the embedding. Where the result is tied, a
    stored copy of the embedding goes: loaders tie the two again.
    """
    if tied and tables and vocabulary.head_name in plan.tensors:
        plan = without(plan, [vocabulary.head_name])
    for table in tables:
        if table.name not in plan.tensors:
            plan = plan.add(table, after=vocabulary.embeds[0])
    return plan.replace(tables)


def without(plan: Plan, names: Iterable[str]) -> Plan:
    """`plan` without some tensors, and without the files that held nothing else."""
    for name in names:
        plan = plan.drop(name)
    return dataclasses.replace(plan, files=tuple(file for file in plan.files if file.tensors))


def _changed(
    tensor: Tensor, change: Addition | Scale | Tensor, rounding: Rounding | None
) -> PlannedTensor:
    def blocks() -> Iterator[npt.NDArray[Any]]:
        from lexigraft.adapters.delta import changed_blocks

        return changed_blocks(tensor, change, rounding)

    return PlannedTensor(tensor.name, tensor.dtype, tensor.shape, (Compute(tensor.bytes, blocks),))
