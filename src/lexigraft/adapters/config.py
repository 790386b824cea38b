"""`adapter_config.json`: what kind of adapter this is, and the kinds that are refused by name.

A kind is supported only where its merge is known to be exact. An option that this module has
never heard of may change the weights, so it is refused as well unless it is switched off.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import read_json

CONFIG = "adapter_config.json"

# Options that change how an adapter was found or trained, never what its tensors mean.
_HARMLESS = {
    "auto_mapping",
    "bias",  # the file holds the biases that were trained
    "base_model_name_or_path",
    "corda_config",  # read only with init_lora_weights=corda, which is refused
    "enable_lora",  # PEFT 0.2, always null
    "eva_config",  # EVA starts A elsewhere and leaves the base as it is
    "exclude_modules",
    "feedforward_modules",  # the shape of an (IA)3 vector tells
    "inference_mode",
    "init_ia3_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",  # read only with init_lora_weights=loftq, which is refused
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",  # PEFT 0.2
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",  # read only with use_qalora, which is refused
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "lora_bias",
    "r",
    "rank_pattern",
    "target_parameters",
    "token_indices",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which acts on some positions only",
    "arrow_config": "an Arrow router over several adapters",
    "kasa_config": "KaSA",
    "layer_replication": "an adapter that replicates layers",
    "megatron_config": "a Megatron adapter",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
# These change the base's weights before training; the adapter alone does not say how.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_INITS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What merging needs of `adapter_config.json`.

    Attributes:
        path: the file it came from.
        rank: `r`, None for an adapter without LoRA.
        alpha: `lora_alpha`.
        rank_pattern: regex of module names -> another r.
        alpha_pattern: regex of module names -> another alpha.
        rs_lora: scaling is alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
        transposed: base weights are stored (in, out), as GPT-2's Conv1D does.
        modules_to_save: names of modules that were trained in full.
        token_ids: module name ("" for the input embedding) -> ids whose rows were trained, in the
            order of the stored rows.
        parameters: `target_parameters`: names of bare parameters that LoRA was trained on.
        dora: `use_dora`: every LoRA has a magnitude.
        shared_when_tied: `ensure_weight_tying`: one change for embedding and head.
        classifies: `task_type` SEQ_CLS: a head over labels stands in the place of the vocabulary's.
    """

    path: Path
    rank: int | None
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rs_lora: bool
    transposed: bool
    modules_to_save: tuple[str, ...]
    token_ids: dict[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    dora: bool
    shared_when_tied: bool
    classifies: bool

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """The config of the adapter in `folder`.

        Raises:
            RefusalError: a kind of adapter that is not supported.
            LexigraftError: the file is missing or damaged.
        """
        path = folder / CONFIG
        data = read_json(path)
        if not isinstance(data, dict):
            raise _damaged(path, "it is not a JSON object")
        _refuse_kinds(path, data)
        _refuse_options(path, data)
        _refuse_inits(path, data)
        try:
            return _read(path, data)
        except (TypeError, ValueError, AttributeError, OverflowError) as fault:
            raise _damaged(path, str(fault)) from None

    def names_saved_module(self, module: str) -> bool:
        """True when `module` was trained in full (`modules_to_save`)."""
        return any(_is_named(module, name) for name in self.modules_to_save)

    def ids_of(self, module: str) -> tuple[int, ...] | None:
        """Ids of the trained rows of `module`, or None where the config names none for it."""
        for name, ids in self.token_ids.items():
            if name and _is_named(module, name):
                return ids
        return self.token_ids.get("")

    def scaling(self, module: str, rank: int) -> float:
        """What B A is multiplied with in `module`, whose stored A has `rank` rows.

        Raises:
            LexigraftError: the config gives another rank, or two different alphas.
        """
        expected = self._only(self.rank_pattern, module, "rank_pattern", self.rank)
        if expected != rank:
            raise LexigraftError(
                f"{module} has LoRA of rank {rank}, {self.path} says {expected}",
                needed="a config that belongs to these weights",
                fix="copy adapter_config.json and adapter_model.safetensors from the same run",
            )
        alpha = self._only(self.alpha_pattern, module, "alpha_pattern", self.alpha)
        return float(alpha / math.sqrt(rank) if self.rs_lora else alpha / rank)

    def _only(self, pattern: dict[str, Any], module: str, what: str, default: Any) -> Any:
        hits = {k: v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)}
        if len(set(hits.values())) > 1:
            # PEFT takes the first match, but writes its config with sorted keys: the order that
            # was trained with is lost.
            raise RefusalError(
                f"{what} of {self.path} gives {module} {len(hits)} values: {hits}",
                needed="one value per module, for the order of the patterns was not saved",
                fix=f"keep in {what} the one pattern of {module} that was trained with",
            )
        return next(iter(hits.values()), default)


def _is_named(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _damaged(path: Path, how: str) -> LexigraftError:
    return LexigraftError(
        f"{path} is damaged: {how}",
        needed="an adapter_config.json as PEFT writes it",
        fix="copy it again from the training run",
    )


def refusal(path: Path, kind: str) -> RefusalError:
    """The refusal of one kind of adapter."""
    return RefusalError(
        f"{path} describes {kind}",
        needed="LoRA on linear layers and embeddings, modules_to_save, saved embeddings or trained "
        "token rows",
        fix="merge it with PEFT on the grafted model: PeftModel(...).merge_and_unload()",
    )


def _refuse_kinds(path: Path, data: dict[str, Any]) -> None:
    kind = data.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS", "IA3"):
        raise refusal(path, f"an adapter of type {kind}")


def _refuse_options(path: Path, data: dict[str, Any]) -> None:
    for name, value in sorted(data.items()):
        if name in _HARMLESS or name in _READ or not value or value == "none":
            continue
        raise refusal(path, _REFUSED.get(name, f"the option {name}={value!r}, unknown here"))


def _refuse_inits(path: Path, data: dict[str, Any]) -> None:
    start = data.get("init_lora_weights", True)
    if isinstance(start, bool) or start is None or start in _INITS_THAT_KEEP_THE_BASE:
        return
    kind = f"LoRA that starts with init_lora_weights={start!r}"
    if str(start).startswith(_INITS_THAT_CHANGE_THE_BASE):
        kind += ", which changes the base's weights"
    raise RefusalError(
        f"{path} describes {kind}",
        needed="an adapter that adds to the weights of the base as they are on disk",
        fix="save it converted: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    )


def _read(path: Path, data: dict[str, Any]) -> AdapterConfig:
    is_lora = data["peft_type"] == "LORA"
    return AdapterConfig(
        path=path,
        rank=_number("r", data.get("r"), int) if is_lora else None,
        alpha=_number("lora_alpha", data.get("lora_alpha"), float) if is_lora else 0.0,
        rank_pattern=_pattern(data, "rank_pattern", int),
        alpha_pattern=_pattern(data, "alpha_pattern", float),
        rs_lora=bool(data.get("use_rslora")),
        transposed=bool(data.get("fan_in_fan_out")),
        modules_to_save=_names(data.get("modules_to_save") or ()),
        token_ids=_token_ids(data),
        parameters=_names(data.get("target_parameters") or ()),
        dora=bool(data.get("use_dora")),
        shared_when_tied=bool(data.get("ensure_weight_tying")),
        classifies=data.get("task_type") == "SEQ_CLS",
    )


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or kind(value) != value:
        raise ValueError(f"{name} is {value!r}")
    return kind(value)


def _pattern(data: dict[str, Any], name: str, kind: type[int] | type[float]) -> dict[str, Any]:
    values = {key: _number(name, value, kind) for key, value in (data.get(name) or {}).items()}
    try:
        for pattern in values:
            re.compile(rf"(.*\.)?({pattern})$")
    except re.error as fault:
        raise ValueError(f"{name} holds no regular expression: {fault.pattern!r}") from None
    return values


def _token_ids(data: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if data["peft_type"] == "TRAINABLE_TOKENS":
        # Its target_modules are only embeddings and what is tied to them: one list for all.
        given: Any = data.get("token_indices") or []
    else:
        given = data.get("trainable_token_indices") or []
    by_module = given if isinstance(given, dict) else {"": given} if given else {}
    ids = {str(name): tuple(map(int, rows)) for name, rows in by_module.items()}
    for name, rows in ids.items():
        if len(set(rows)) != len(rows) or min(rows, default=0) < 0:
            raise ValueError(f"the trained token ids of {name or 'the embedding'} are no set")
    return ids
