"""LoRA on the experts of a mixture (`target_parameters`): one pair of factors for all of them.

In memory the experts of a layer are two parameters, in the file one matrix per expert and
projection. PEFT wraps the module once per parameter, the first registered innermost; its names
tell only how deep a wrapper lies. A is (E r, in), expert by expert; B is (out, r E), whose columns
run over the experts fastest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lexigraft.adapters.config import AdapterConfig, refusal
from lexigraft.adapters.folder import Addition, Expert, LowRank
from lexigraft.adapters.keys import PREFIX
from lexigraft.adapters.misfits import Misfits
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.plan import Compute, CopyRows, PlannedTensor
from lexigraft.checkpoints.rows import BLOCK_BYTES, read_rows
from lexigraft.errors import LexigraftError

if TYPE_CHECKING:
    import numpy.typing as npt

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
    misfits: Misfits,
) -> Iterator[tuple[str, Addition]]:
    """Each matrix of an expert that changes, and how.

    Args:
        low_ranks: stored module -> factors, for which `is_of_experts`.
        tensors: those of the base.
        config: which parameters were trained.
        misfits: is told of factors that do not fit the base.

    Raises:
        RefusalError: the base stores its experts otherwise, or the factors can be read two ways.
        LexigraftError: the factors do not fit the config.
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
        yield from _of_parameter(name, low_rank, projections, config, misfits)


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, list[tuple[Tensor, ...]]]:
    """Experts that are stored one by one, as the parameters that they are in memory.

    Args:
        tensors: those of a model.

    Returns:
        name of a parameter, in the spelling of the file -> per expert the matrices that lie one
        below the other in it.
    """
    modules = [re.match(r"(.+\.experts)\.0\.", name) for name in tensors]
    return {
        f"{module}.{parameter}": list(zip(*found, strict=True))
        for module in dict.fromkeys(match[1] for match in modules if match)
        for parameter in PARAMETERS
        if (found := _projections(module, parameter, tensors))
    }


def stacked_factors(
    name: str, experts: Sequence[LowRank | None], shape: tuple[int, int], rank: int
) -> tuple[PlannedTensor, PlannedTensor]:
    """LoRA of a parameter as PEFT stores it beside that of the others: A (E r, in), B (out, r E).

    Args:
        name: of the parameter in memory.
        experts: the float32 factors of each, of at most `rank`; None for one that does not change.
        shape: of one expert: out, in.
        rank: r of all of them.
    """
    module, _, parameter = name.rpartition(".")
    (outer, inner), order = shape, list(PARAMETERS)
    stored = PREFIX + module + _WRAPPER * (len(order) - 1 - order.index(parameter))
    parts: list[CopyRows | Compute] = []
    for pair in experts:
        own = 0 if pair is None else pair.rank
        parts += [] if pair is None else [CopyRows.whole(pair.a)]
        parts += [] if own == rank else [_zeros(rank - own, inner)]

    def b() -> Iterator[npt.NDArray[Any]]:
        import numpy as np  # a check of headers needs none

        step = max(1, BLOCK_BYTES // (4 * rank * len(experts)))
        for start in range(0, outer, step):
            stop = min(start + step, outer)
            rows = np.zeros((stop - start, rank, len(experts)), np.float32)
            for index, pair in enumerate(experts):
                if pair is not None:
                    rows[:, : pair.rank, index] = read_rows(pair.b, start, stop)
            yield rows.reshape(len(rows), -1)

    width = rank * len(experts)
    return (
        PlannedTensor(f"{stored}.lora_A.weight", "F32", (width, inner), tuple(parts)),
        PlannedTensor(
            f"{stored}.lora_B.weight", "F32", (outer, width), (Compute(4 * outer * width, b),)
        ),
    )


def _zeros(rows: int, width: int) -> Compute:
    def zeros() -> Iterator[npt.NDArray[Any]]:
        import numpy as np

        yield np.zeros((rows, width), np.float32)

    return Compute(4 * rows * width, zeros)


def _of_parameter(
    name: str,
    low_rank: LowRank,
    projections: list[list[Tensor]],
    config: AdapterConfig,
    misfits: Misfits,
) -> Iterator[tuple[str, Addition]]:
    count = len(projections[0]) if projections else 0
    if not count:
        raise refusal(config.path, f"LoRA on {name}, which the base does not store per expert")
    rows = sum(matrices[0].rows for matrices in projections)
    shape = (rows, projections[0][0].shape[1])
    if low_rank.shape != shape or low_rank.a.rows % count:
        misfits.add(
            f"LoRA of {name}",
            f"has the factors {list(low_rank.a.shape)} and {list(low_rank.b.shape)}, "
            f"the base {count} experts of shape {list(shape)}",
        )
        return
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
    found = (_projections(prefix, parameter, tensors) for prefix in _spellings(module))
    return next(filter(None, found), [])


def _projections(prefix: str, parameter: str, tensors: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """The same of experts whose names begin with `prefix`."""
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
