"""An adapter folder, written as PEFT reads it: its config and the one file of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lexigraft.adapters.config import CONFIG
from lexigraft.adapters.folder import WEIGHTS
from lexigraft.checkpoints.plan import DEFAULT_METADATA, Plan, PlannedFile, PlannedTensor
from lexigraft.checkpoints.write import write_plan
from lexigraft.console import progress
from lexigraft.files import write_json


def adapter_plan(tensors: Iterable[PlannedTensor]) -> Plan:
    """The one file that PEFT reads."""
    return Plan((PlannedFile.of(WEIGHTS, tensors, DEFAULT_METADATA),), None, {})


def write_adapter(folder: Path, plan: Plan, config: dict[str, Any]) -> None:
    """Write an adapter into an existing folder.

    Args:
        folder: where to.
        plan: of its tensors.
        config: what differs from PEFT's defaults, of a LoRA that is loaded to be used.
    """
    with progress("writing the adapter", total=sum(file.bytes for file in plan.files)) as advance:
        write_plan(plan, folder, threads=1, advance=advance)
    usual = {"peft_type": "LORA", "inference_mode": True, "bias": "none", "lora_dropout": 0.0}
    write_json(folder / CONFIG, dict(sorted((usual | config).items())))
