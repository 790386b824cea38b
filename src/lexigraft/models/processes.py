"""Several processes that train one model together, as `accelerate launch` starts them.

Every process reads the texts and loads the model; blocks are dealt out among them, and only the
first one prints and writes (torch's DistributedDataParallel, through Accelerate).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from lexigraft.console import is_first_process
from lexigraft.errors import RefusalError
from lexigraft.models.load import device

# What `accelerate launch` puts into the environment, and what it then means.
_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP through Accelerate",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_other_ways() -> None:
    """Stop where a launcher asks for a way of sharing the work that was never seen to work.

    Raises:
        RefusalError: it does.
    """
    for name, way in _OTHER_WAYS.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise RefusalError(
                f"{way} ({name} is set)",
                needed="a copy of the model in each process: DistributedDataParallel",
                fix="accelerate launch --multi_gpu (or --cpu) --num_processes N -m lexigraft train",
            )


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

    state = PartialState(cpu=device() == "cpu")
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
