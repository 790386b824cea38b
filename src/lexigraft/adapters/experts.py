"""LoRA on the experts of a mixture (`target_parameters`): one pair of factors for all of them.

In memory the experts of a layer are two parameters, in the file one matrix per expert and
projection. PEFT wraps the module once per parameter, the first registered innermost; its names
tell only how deep a wrapper lies. A is (E r, in), expert by expert; B is (out, r E), whose columns
run over the experts fastest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from lexigraft.adapters.config import AdapterConfig, refusal
from lexigraft.adapters.folder import Addition, Expert, LowRank
from lexigraft.checkpoints.header import Tensor
from lexigraft.errors import LexigraftError

# Parameter, in the order of registration -> its projections, as families call them on disk.
PARAMETERS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_WRAPPER = ".base_layer"


def is_of_experts(module: str, config: AdapterConfig) -> bool:
    """True when the LoRA stored under `module` is that of a parameter."""
    return bool(_targeted(_unwrapped(module), config))


def expert_additions(
    low_ranks: Mapping[str, LowRank],
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
) -> Iterator[tuple[str, Addition]]:
    """Each matrix of an expert that changes, and how.

    Args:
        low_ranks: stored module -> factors, for which `is_of_experts`.
        tensors: those of the base.
        config: which parameters were trained.

    Raises:
        RefusalError: the base stores its experts otherwise, or the factors can be read two ways.
        LexigraftError: the factors do not fit the base or the config.
    """
    found = []
    for stored, low_rank in low_ranks.items():
        module = _unwrapped(stored)
        parameters, depth = _targeted(module, config), stored.count(_WRAPPER)
        wrappers = sum(_unwrapped(other) == module for other in low_ranks)
        if wrappers != len(parameters):
            raise LexigraftError(
                f"{module} has {wrappers} LoRA, {config.path} names {', '.join(parameters)}",
                needed="one LoRA per parameter in target_parameters",
                fix="copy adapter_config.json and adapter_model.safetensors from the same run",
            )
        parameter = parameters[-1 - depth]
        found.append((f"{module}.{parameter}", low_rank, _on_disk(module, parameter, tensors)))
    square = all(a.shape[1] == b.shape[0] for a, b in ((x.a, x.b) for _, x, _ in found))
    if found and square:
        raise refusal(config.path, "LoRA on experts that are square, of which way is not known")
    for name, low_rank, projections in found:
        yield from _of_parameter(name, low_rank, projections, config)


def _of_parameter(
    name: str, low_rank: LowRank, projections: list[list[Tensor]], config: AdapterConfig
) -> Iterator[tuple[str, Addition]]:
    count = len(projections[0]) if projections else 0
    if not count:
        raise refusal(config.path, f"LoRA on {name}, which the base does not store per expert")
    rows = sum(matrices[0].rows for matrices in projections)
    shape = (rows, projections[0][0].shape[1])
    if low_rank.shape != shape or low_rank.a.rows % count:
        raise LexigraftError(
            f"LoRA of {name} has the factors {list(low_rank.a.shape)}, {list(low_rank.b.shape)}; "
            f"the base has {count} experts of shape {list(shape)}",
            needed="the base that this adapter was trained on",
            fix="name that base: base_model_name_or_path in adapter_config.json says which",
        )
    scaling = config.scaling(name, low_rank.a.rows // count)
    first = 0
    for matrices in projections:
        for index, matrix in enumerate(matrices):
            expert = Expert(index, count, first)
            yield matrix.name, Addition(replace(low_rank, expert=expert), scaling)
        first += matrices[0].rows


def _unwrapped(module: str) -> str:
    while module.endswith(_WRAPPER):
        module = module.removesuffix(_WRAPPER)
    return module


def _targeted(module: str, config: AdapterConfig) -> list[str]:
    return [
        parameter
        for parameter in PARAMETERS
        if any(f".{module}.{parameter}".endswith(f".{name}") for name in config.parameters)
    ]


def _on_disk(module: str, parameter: str, tensors: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """Per projection, its matrices in the order of the experts; empty where there are none."""
    for prefix in _spellings(module):
        for names in PARAMETERS[parameter]:
            projections = [_matrices(prefix, name, tensors) for name in names]
            if projections[0] and len({len(matrices) for matrices in projections}) == 1:
                return projections
    return []


def _matrices(prefix: str, projection: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    while (tensor := tensors.get(f"{prefix}.{len(found)}.{projection}.weight")) is not None:
        found.append(tensor)
    return found


def _spellings(module: str) -> Iterable[str]:
    for name in (module, re.sub(r"\.mlp\.experts$", ".block_sparse_moe.experts", module)):
        yield name
        yield name.removeprefix("model.")
        # Image-text models, in the order of names that checkpoints keep.
        yield name.replace("model.language_model.", "language_model.model.", 1)
