"""Several processes that train one model together, as `accelerate launch` starts them.

Every process reads the texts and loads the model; blocks are dealt out among them, and only the
first one prints and writes. Each holds the model (torch's DistributedDataParallel) or a part of it
(FSDP2, DeepSpeed's ZeRO), through Accelerate.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from lexigraft.console import is_first_process
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.models.load import FLOATS, device

# What `accelerate launch` puts into the environment: what it then means, and what to do instead.
_ELSEWHERE = "launch it with DistributedDataParallel (accelerate launch --multi_gpu, or torchrun)"
_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", _ELSEWHERE),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("tensor or context parallelism", _ELSEWHERE),
}
_REFUSED_OF_FSDP = {
    "FSDP_ACTIVATION_CHECKPOINTING": ("FSDP's own checkpointing", "add --gradient-checkpointing"),
    "FSDP_OFFLOAD_PARAMS": ("FSDP with weights on the CPU", "leave it out, or use more devices"),
}
_NEEDED = "DistributedDataParallel, FSDP2 or DeepSpeed's ZeRO-2 and 3, as docs/training.md says"


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded() -> bool:
    """Whether each process is to hold a part of the model, or of what moves it (FSDP2, ZeRO)."""
    return _uses_fsdp() or uses_deepspeed()


def uses_deepspeed() -> bool:
    """Whether DeepSpeed is to share the work."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def where() -> dict[str, Any]:
    """Device and backend, as Accelerate's states take them; it has DeepSpeed on no `cpu`."""
    if device() != "cpu":
        return {}
    return {"backend": "gloo"} if uses_deepspeed() else {"cpu": True}


def require_known_way(*, objective: str, dtype: str) -> None:
    """Stop where a launcher asks for a way of sharing the work that was never seen to work.

    Of FSDP2's ways to load a model this leaves one: every process reads it, for it is measured
    before it is cut.

    Raises:
        LexigraftError: DeepSpeed is not installed.
        RefusalError: it does.
    """
    for name, (way, fix) in {**_REFUSED, **(_REFUSED_OF_FSDP if _uses_fsdp() else {})}.items():
        if _is_set(name):
            raise RefusalError(f"{way} ({name} is set)", needed=_NEEDED, fix=fix)
    if not is_sharded():
        return
    name = "DeepSpeed" if uses_deepspeed() else "FSDP2"
    types = ("auto", "float32") if uses_deepspeed() else ("auto", *FLOATS)
    for option, given, allowed in (("--objective", objective, ("lm",)), ("--dtype", dtype, types)):
        if given not in allowed:
            raise RefusalError(f"{option} {given} under {name}", needed=_NEEDED, fix=_ELSEWHERE)
    if uses_deepspeed():
        if process_count() == 1:
            raise RefusalError("DeepSpeed in one process", needed=_NEEDED, fix="leave it out")
        if importlib.util.find_spec("deepspeed") is None:
            raise LexigraftError(
                "DeepSpeed is asked for (ACCELERATE_USE_DEEPSPEED is set) and not installed",
                needed="the package deepspeed",
                fix="pip install 'lexigraft[deepspeed]'",
            )
        return
    _require_fsdp2()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _uses_fsdp() -> bool:
    return _is_set("ACCELERATE_USE_FSDP")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _require_fsdp2() -> None:
    """Refuse the older FSDP, and cuts that part a matrix from the module that computes with it."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RefusalError(
            "FSDP 1 (ACCELERATE_USE_FSDP is set, FSDP_VERSION is not 2)",
            needed="FSDP2, whose parameters stay apart",
            fix="add --fsdp_version 2 to accelerate launch",
        )
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper()
    if policy == "SIZE_BASED_WRAP" or os.environ.get("FSDP_IGNORED_MODULES"):
        raise RefusalError(
            "FSDP by size, or with modules left out",
            needed="a cut between the layers",
            fix="add --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP to accelerate launch",
        )


def require_sharding(trainer: Any) -> None:
    """Make ready what shards the model of a Trainer, before it is prepared.

    Raises:
        RefusalError: Accelerate does not do what it was asked for, and says nothing; or a
            configuration of DeepSpeed that would move the rows in another way.
    """
    state = trainer.accelerator.state
    if uses_deepspeed():
        _require_zero(state.deepspeed_plugin.hf_ds_config, trainer.args.max_grad_norm)
        _name_borrowed_weights(trainer.model)
        return
    if not trainer.is_fsdp_enabled:
        raise RefusalError(
            f"FSDP on {trainer.args.device.type}, where Accelerate copies the model instead",
            needed="GPUs",
            fix=_ELSEWHERE,
        )
    policy = state.fsdp_plugin.mixed_precision_policy
    if policy is not None:  # 16-bit floats compute, and gradients are summed in 32
        import torch

        state.fsdp_plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def _require_zero(config: Any, clip_norm: float) -> None:
    config.config["gradient_clipping"] = clip_norm  # a file that does not say it means none
    found = {
        f"other settings ({'; '.join(config.mismatches)})": config.mismatches,
        f"stage {config.get_value('zero_optimization.stage')}": not (
            config.is_zero2() or config.is_zero3()
        ),
        "16-bit floats": config.is_true("bf16.enabled") or config.is_true("fp16.enabled"),
        "offloading": config.is_offload(),
        "an optimizer or a schedule of its own": not {"optimizer", "scheduler"}.isdisjoint(
            config.config
        ),
    }
    for what, is_asked in found.items():
        if is_asked:
            raise RefusalError(
                f"DeepSpeed with {what}",
                needed="ZeRO-2 or 3 in float32 on the devices, with this program's own optimizer",
                fix="accelerate launch --use_deepspeed --zero_stage 2 --mixed_precision no",
            )


def _name_borrowed_weights(model: Any) -> None:
    """Tell ZeRO-3 that a head with new rows computes with the weights of the one inside."""
    from deepspeed.runtime.zero import register_external_parameter

    head = model.get_output_embeddings()
    for parameter in getattr(head, "inner", head).parameters():
        register_external_parameter(head, parameter)


@contextmanager
def deepspeed_forgotten() -> Iterator[None]:
    """At its end transformers, which remembers DeepSpeed, loads models whole again."""
    try:
        yield
    finally:
        if uses_deepspeed():
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()


def wait_for_all() -> None:
    """Go on when each process has come here: the first one may then remove what all have read."""
    if process_count() > 1:
        import torch

        torch.distributed.barrier()


@contextmanager
def shared(workplace: AbstractContextManager[Path], folder: Path) -> Iterator[Path]:
    """`workplace`, entered by the first process alone; the others work in `folder` with it.

    Where the first one cannot enter it, the others end with it and say nothing.
    """
    if process_count() == 1:
        with workplace as entered:
            yield entered
        return
    import torch
    from accelerate import PartialState

    with redirect_stdout(sys.stderr):  # DeepSpeed talks
        state = PartialState(**where())
    told = torch.zeros(1, device=state.device)
    if not is_first_process():
        torch.distributed.broadcast(told, 0)
        if not told:
            raise SystemExit(2)
        yield folder
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(workplace)
            told += 1
        finally:
            torch.distributed.broadcast(told, 0)
        yield folder
