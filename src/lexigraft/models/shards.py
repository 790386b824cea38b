"""Parameters of which every process holds a part: PyTorch's DTensors, and those of ZeRO-3."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values; a sharded one is gathered, by all processes together."""
    if hasattr(parameter, "ds_shape"):
        with _gathered(parameter):
            return parameter.detach().clone()
    values: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return values.detach()


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of all of it."""
    found: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return found


def _gathered(parameter: Tensor, *, changed: bool = False) -> AbstractContextManager[None]:
    """What ZeRO-3 has cut is whole while it lasts; afterwards the first process's values stay."""
    from deepspeed.runtime.zero import GatheredParameters

    found: AbstractContextManager[None] = GatheredParameters(
        [parameter], modifier_rank=0 if changed else None
    )
    return found


def local(values: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded."""
    part: Tensor = values.to_local() if hasattr(values, "to_local") else values
    return part


@torch.no_grad()  # type: ignore[untyped-decorator]
def put(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter the values of a whole tensor, which every process has, of its shape."""
    if hasattr(parameter, "ds_shape"):
        with _gathered(parameter, changed=True):
            parameter.copy_(values)
        return
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        place = parameter.device_mesh
        values = values.to(parameter.device)
        values = distribute_tensor(values, place, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


def are_finite(parameters: list[Tensor]) -> bool:
    """Whether all of them are finite numbers, in every process; all must ask together."""
    return all(
        bool(whole(p).isfinite().all() if hasattr(p, "ds_shape") else whole(p.isfinite().all()))
        for p in parameters
    )


def optimizer_parts(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer as plain tensors: of what is sharded, this process's part."""
    found = optimizer.state_dict()
    state = {
        place: {name: local(value) for name, value in of.items()}
        for place, of in found["state"].items()
    }
    return {**found, "state": state}


def put_optimizer_parts(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    """Give an optimizer over the same parameters what `optimizer_parts` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        place: {name: _part_like(value, parameters[place]) for name, value in of.items()}
        for place, of in found["state"].items()
    }
    optimizer.load_state_dict({**found, "state": state})


def _part_like(part: Tensor, parameter: Tensor) -> Tensor:
    """`part`, sharded as `parameter` is; counts of steps and moments of columns never are."""
    if part.ndim != parameter.ndim or not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
