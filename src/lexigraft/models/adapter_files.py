"""What is trained, in PEFT's own layout on disk, which plain PEFT loads on the grafted model.

Layout of peft 0.21 (`peft/tuners/trainable_tokens`, `peft/utils/other.py`): despite its name
`trainable_tokens_delta` holds the rows' values; tied matrices are written once, as the
embedding's.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lexigraft.console import is_first_process
from lexigraft.errors import LexigraftError
from lexigraft.manifest import NewIds
from lexigraft.models.load import text_part
from lexigraft.models.new_rows import NewRows, grow
from lexigraft.models.shards import put, shape_of, whole

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def lora_config(rank: int, alpha: float) -> Any:
    """LoRA on every linear layer except the head, without dropout."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def make_trainable(
    model: Any,
    ids: NewIds,
    lora: Any = None,
    *,
    part: nn.Module | None = None,
    seed: int = 0,
) -> tuple[Any, NewRows | None]:
    """A frozen model with new rows, and LoRA if a config is given, as its only parameters.

    Args:
        ids: the new ids; none for a model that was not grown.
        lora: what `lora_config` returns, or None to train rows alone.
        part: of the model, whose linear layers get LoRA; by default all that reads text.
        seed: of LoRA's random start.
    """
    trained = model
    if lora is not None:
        from peft import get_peft_model

        part = text_part(model) if part is None else part
        if part is not model:
            lora.target_modules = _linear_layers(model, part)
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # of names that PEFT uses and transformers renames
            warnings.simplefilter("ignore", FutureWarning)
            trained = get_peft_model(model, lora)
    # After LoRA, which would otherwise take the wrapped head for one more linear layer.
    return trained, grow(model, ids) if len(ids) else None


def _linear_layers(model: Any, part: nn.Module) -> list[str]:
    """The paths in `model` of every linear layer in a part of it, except the head."""
    from transformers.pytorch_utils import Conv1D

    inside, head = set(part.modules()), model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module in inside and module is not head
    ]


def trainable_tensors(model: Any, rows: NewRows | None) -> dict[str, nn.Parameter]:
    """Every trainable parameter under the key that PEFT gives it on disk.

    Args:
        model: a PEFT model (LoRA), or a plain model of which only new rows are trained.
        rows: its new rows, if it has any.
    """
    is_lora = hasattr(model, "peft_config")
    ending = ".token_adapter.trainable_tokens_delta" if is_lora else ".trainable_tokens_delta"
    keys = {
        id(parameter): _PREFIX + path + ending
        for path, parameter in (rows.parameters.items() if rows else ())
    }
    return {
        keys.get(id(parameter), name.replace(".default.", ".")): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def write_adapter(folder: Path, model: Any, rows: NewRows | None, trained_on: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`.

    Several processes: as `write_trained`.

    Args:
        trained_on: the model folder, which PEFT keeps as `base_model_name_or_path`.
    """
    write_trained(folder, model, rows)
    if not is_first_process():
        return
    config = _config(model, rows)
    config.base_model_name_or_path = trained_on
    config.inference_mode = True
    config.save_pretrained(folder)


def write_trained(folder: Path, model: Any, rows: NewRows | None) -> None:
    """Write every trained tensor, bit for bit, as `adapter_model.safetensors` into `folder`.

    Of several processes the first one writes. What is sharded is gathered: all must call it.
    """
    from safetensors.torch import save_file

    tensors = {}
    for key, parameter in trainable_tensors(model, rows).items():
        values = whole(parameter)
        if is_first_process():
            tensors[key] = values.cpu().contiguous()
    if not is_first_process():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors |= {key: tensors[of].clone() for key, of in _copies(model, rows).items()}
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _copies(model: Any, rows: NewRows | None) -> dict[str, str]:
    """Key -> the key whose values it repeats.

    A TRAINABLE_TOKENS adapter names the rows of a tied head too (LoRA's token indices do not);
    without them PEFT warns of a missing key.
    """
    if rows is None or rows.tied_head is None or hasattr(model, "peft_config"):
        return {}
    (embedding,) = rows.parameters
    ending = ".trainable_tokens_delta"
    return {_PREFIX + rows.tied_head + ending: _PREFIX + embedding + ending}


def _config(model: Any, rows: NewRows | None) -> Any:
    from peft import LoraConfig, TrainableTokensConfig

    if not hasattr(model, "peft_config"):
        assert rows is not None
        return TrainableTokensConfig(
            token_indices=list(rows.ids),
            target_modules=list(rows.parameters),
            task_type="CAUSAL_LM",
        )
    used = model.peft_config["default"]
    indices = {path: list(rows.ids) for path in rows.parameters} if rows else None
    return LoraConfig(
        r=used.r,
        lora_alpha=used.lora_alpha,
        lora_dropout=used.lora_dropout,
        target_modules=sorted(used.target_modules),
        fan_in_fan_out=used.fan_in_fan_out,
        task_type=used.task_type,
        trainable_token_indices=indices,
    )


def read_trained(folder: Path, model: Any, rows: NewRows | None) -> None:
    """Put what `write_trained` wrote back into the model that is being trained.

    Raises:
        LexigraftError: the file holds other tensors than those that are trained.
    """
    wanted = trainable_tensors(model, rows)
    stored = _load(folder, {*wanted, *_copies(model, rows)})
    for key, parameter in wanted.items():
        if stored[key].shape != shape_of(parameter):
            raise LexigraftError(
                f"{folder / WEIGHTS_FILE}: {key} is {list(stored[key].shape)}",
                needed=f"{list(shape_of(parameter))}, as in the model that is trained",
                fix="start again without --resume (the model or its vocabulary has changed)",
            )
        put(parameter, stored[key])


def require_saved(folder: Path, model: Any, rows: NewRows | None) -> None:
    """Reload what was written and compare it, bit for bit, with what is being trained.

    Several processes: as `write_trained`.

    Raises:
        LexigraftError: a trained tensor is missing in the file or differs there.
    """
    wanted = trainable_tensors(model, rows)
    stored = _load(folder, {*wanted, *_copies(model, rows)}) if is_first_process() else {}
    for key, parameter in wanted.items():
        values = whole(parameter)
        if stored and not torch.equal(stored[key], values.cpu()):
            raise LexigraftError(
                f"{folder / WEIGHTS_FILE}: {key} is not what was trained",
                needed="every trained tensor, saved bit for bit",
                fix="check the disk, then train again",
            )


def _load(folder: Path, wanted: set[str]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    stored: dict[str, Tensor] = load_file(folder / WEIGHTS_FILE)
    if set(stored) != wanted:
        odd = sorted(set(stored) ^ wanted)[0]
        raise LexigraftError(
            f"{folder / WEIGHTS_FILE}: {odd} is {'missing' if odd in wanted else 'unexpected'}",
            needed=f"exactly the {len(wanted)} tensors that are trained",
            fix="start again without --resume",
        )
    return stored
