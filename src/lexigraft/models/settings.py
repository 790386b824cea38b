"""What decides the weights of a training: settings, what they may be, and their defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.console import note
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import read_object
from lexigraft.models.load import QUANTISED, context_limit, device, require_packages
from lexigraft.models.packing import KEEPS_APART
from lexigraft.models.processes import process_count
from lexigraft.recipe import TrainStage

# Peaks of body and new rows by mode, below and from LARGE parameters on: docs/training.md
RATES = {
    "rows": ((3e-3, 3e-3), (6e-4, 6e-4)),
    "lora": ((1e-3, 3e-3), (2e-4, 6e-4)),
    "full": ((5e-5, 5e-4), (5e-5, 5e-4)),
}
LARGE = 10**9
FULL_WEIGHT_DECAY = 0.1
DISTILL_PASSES = 4  # the teacher reads once, and later passes are a fifth of the work


@dataclass(frozen=True)
class Settings:
    """Everything that decides the trained weights, next to model and texts.

    `max_steps`, `max_bytes`, `max_tokens` of None are no limit; without any, one pass is made, or
    that part of it which `share` says.
    """

    mode: str = "lora"
    max_steps: int | None = None
    max_bytes: int | None = None
    max_tokens: int | None = None
    block_size: int = 512
    batch_size: int = 1
    learning_rate: float = 1e-3
    new_row_learning_rate: float = 3e-3
    lora_rank: int = 16
    lora_alpha: float = 32.0
    replay: float = 0.1
    seed: int = 0
    old_rows: str = "frozen"
    old_row_scale: float = 0.1
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.05
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    processes: int = 1
    objective: str = "lm"
    passes: int = 1
    apart: bool = False
    replay_schedule: str = "even"
    patience: int | None = None
    general_limit: float | None = None
    share: Sequence[float] | None = None

    @property
    def step_blocks(self) -> int:
        """Blocks of one step: over all batches and processes."""
        return self.batch_size * self.gradient_accumulation * self.processes


def settings_of(source: Path, **given: Any) -> Settings:
    """What decides the weights; what is None, or not given, takes the default of mode and size.

    Args:
        source: the model's folder.
        given: fields of `Settings`.

    Raises:
        LexigraftError: a value out of range, two that do not go together, or no model there.
        RefusalError: a `dtype` in which the mode cannot train.
    """
    require_in_range(**given)
    _require_model(source)
    mode = given.setdefault("mode", "lora")
    objective = given.setdefault("objective", "lm")
    _require_sense(mode, objective, given.get("old_rows", "frozen"), given.get("dtype", "auto"))
    body, row = _rates(source, mode)
    defaults = {
        "learning_rate": body,
        "new_row_learning_rate": row,
        "weight_decay": FULL_WEIGHT_DECAY if mode == "full" else 0.0,
        "processes": process_count(),
        "passes": DISTILL_PASSES if objective == "distill" else 1,
        "block_size": min(256, context_limit(source) // 4) if objective == "distill" else 512,
        "apart": not keeps_apart(source),
    }
    given["share"] = _part(given)
    wanted = Settings(**{**defaults, **{k: v for k, v in given.items() if v is not None}})
    if wanted.apart:
        note(
            f"this kind of model lets the documents of a block see each other: each begins a new "
            f"block of {wanted.block_size} tokens (--block-size: smaller ones waste less)"
        )
    return wanted


def require_in_range(**given: Any) -> None:
    """Stop where a value is none that a recipe may hold; None is any.

    Raises:
        LexigraftError: the first such value, with what it may be.
    """
    known = TrainStage.model_fields.keys() - {"share"}
    told = {name: value for name, value in given.items() if name in known and value is not None}
    try:
        TrainStage(**told)
    except ValidationError as fault:
        first = fault.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise LexigraftError(
            f"{option} {first['input']}",
            needed=first["msg"].removeprefix("Input should be "),
            fix=f"give {option} such a value, or leave it out",
        ) from None


def keeps_apart(folder: Path) -> bool:
    """Whether the model in `folder`, and one inside it, are known to keep documents apart."""
    config = read_object(folder / "config.json")
    parts = [config, config["text_config"]] if "text_config" in config else [config]
    return KEEPS_APART.issuperset(part.get("model_type") for part in parts)


def _require_model(source: Path) -> None:
    if (source / "config.json").is_file():
        return
    is_adapter = (source / "adapter_config.json").is_file()
    raise LexigraftError(
        f"{source} holds {'an adapter' if is_adapter else 'no model'} (no config.json)",
        needed="a model, such as `lexigraft graft` writes",
        fix=f"lexigraft {f'merge MODEL {source}' if is_adapter else f'graft BASE {source}'} -o OUT",
    )


def _part(given: dict[str, Any]) -> list[float] | None:
    """The share of the text that is asked for; a list, as JSON gives it back to a resumed run."""
    if given.get("share") is None:
        return None
    begin, end = given["share"]
    limits = [name for name in ("max_steps", "max_bytes", "max_tokens") if given.get(name)]
    if limits or not 0 <= begin < end:
        raise LexigraftError(
            f"a share from {begin} to {end}" + (f" beside {limits[0]}" if limits else ""),
            needed="a part of the text that begins before it ends, and no other limit",
            fix="leave one of the two out" if limits else "give it as (0.2, 1)",
        )
    return [begin, end]


def _require_sense(mode: str, objective: str, old_rows: str, dtype: str) -> None:
    if objective == "distill" and mode == "full":
        raise LexigraftError(
            "--objective distill with --mode full",
            needed="--mode rows or lora: a body that moves is no teacher",
            fix="distil first with --mode rows or lora, merge, and train with --objective lm",
        )
    if old_rows != "frozen" and mode != "full":
        raise LexigraftError(
            f"--old-rows {old_rows} with --mode {mode}",
            needed="--mode full: an adapter holds new rows alone",
            fix="add --mode full, or leave --old-rows out",
        )
    if dtype in QUANTISED and mode != "lora":
        raise RefusalError(
            f"--dtype {dtype} with --mode {mode}",
            needed="--mode lora: weights of few bits cannot be trained, and Trainer refuses them "
            "without LoRA",
            fix="use --mode lora, or --dtype bfloat16",
        )
    require_packages(dtype)  # before any text is read
    if dtype == "float16" and (mode == "full" or device() == "cpu"):
        raise RefusalError(
            f"--dtype float16 with --mode {mode} on {device()}",
            needed="frozen float16 weights on a GPU: gradients of 16-bit floats need loss scaling, "
            "which needs float32 weights and a GPU",
            fix="use --dtype bfloat16 or --dtype float32",
        )


def _rates(source: Path, mode: str) -> tuple[float, float]:
    tensors = Checkpoint.open(source).tensors.values()
    large = sum(math.prod(tensor.shape) for tensor in tensors) >= LARGE
    return RATES[mode][large]
