"""Write src/lexigraft/checkpoints/architectures.json from the installed transformers.

    python scripts/make_architectures.py            # rewrites the table
    python scripts/make_architectures.py llama phi  # prints these entries, writes nothing

Each class that predicts tokens is built twice on the meta device (no memory, no weights), with its
default vocabulary and with a larger one. The tensors whose shape differs are the vocabulary
tensors; their roles follow from `get_input_embeddings` and `get_output_embeddings`. So nothing
rests on names or on a shape that happens to equal the vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch  # noqa: E402 - after the environment is set
import transformers  # noqa: E402
from transformers.core_model_loading import revert_weight_conversion  # noqa: E402
from transformers.models.auto import configuration_auto, modeling_auto  # noqa: E402

from lexigraft.console import note  # noqa: E402

TARGET = Path(__file__).parents[1] / "src/lexigraft/checkpoints/architectures.json"
# Where a type has several classes, the first one's defaults hold and the names are joined.
KINDS = ("SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM")
# Larger than every default vocabulary, and equal to no other dimension of any model.
LARGER = 400_009
# Tables beside the input embedding that are indexed by token id and grow like it.
MORE_EMBEDDINGS = ("embed_tokens_per_layer.weight",)
_OFFSETS = "its image and audio tokens follow the text tokens, so that no id is free"
_HASHED = "it hashes runs of tokens by the number of its rows, so that more rows change old texts"
_TWO_MODELS = "it joins two models, each with a vocabulary and a config of its own"
REFUSED = {
    "gemma3n": _OFFSETS,
    "gemma3n_text": _OFFSETS,
    "whisper": "its timestamps are the last ids: whatever follows them is read as a time",
    "encoder-decoder": _TWO_MODELS,
    "speech-encoder-decoder": _TWO_MODELS,
    "musicgen": _TWO_MODELS,
    "musicgen_melody": _TWO_MODELS,
    "qwen4_exp": _HASHED,
    "qwen4_exp_text": _HASHED,
    "transfo-xl": "its adaptive softmax gives ids their places by frequency",
}


def classes() -> Iterator[tuple[str, str]]:
    """(model_type, class name) of every class that predicts tokens, once."""
    seen = set()
    for kind in KINDS:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                if (model_type, name) not in seen:
                    seen.add((model_type, name))
                    yield model_type, name


def build(model_type: str, name: str, vocab_size: int | None) -> Any:
    """The class on the meta device; with `vocab_size` in its text config if given."""
    config = configuration_auto.CONFIG_MAPPING[model_type]()
    kind = getattr(transformers, name)
    if not isinstance(config, kind.config_class):
        config = kind.config_class()
    if vocab_size is not None:
        config.get_text_config().vocab_size = vocab_size
        if hasattr(config.get_text_config(), "vocab_size_per_layer_input"):
            config.get_text_config().vocab_size_per_layer_input = vocab_size
    with torch.device("meta"):
        return kind(config)


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter and saved buffer, tied ones under each of their names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    named |= {name: t for name, t in model.state_dict().items() if name not in named}
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


def weight_names(model: Any, module: Any) -> list[str]:
    """Names of the weight of `module`, without those of other modules that share it."""
    if module is None:
        return []
    return [f"{n}.weight" for n, m in model.named_modules(remove_duplicate=False) if m is module]


def config_path(config: Any) -> list[str]:
    """Where the text config's vocabulary size stands in config.json."""
    text = config.get_text_config()
    key = getattr(text, "attribute_map", {}).get("vocab_size", "vocab_size")
    return [*_path_to(config, text), key]


def _path_to(config: Any, wanted: Any) -> list[str]:
    if config is wanted:
        return []
    for key, value in vars(config).items():
        if value is wanted:
            return [key]
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            rest = _path_to(value, wanted)
            if rest:
                return [key, *rest]
    return []


def entry(model_type: str, name: str) -> dict[str, Any]:
    """What the table says of one class; `refused` instead of names where rows cannot be added."""
    if model_type in REFUSED:
        return {"class": name, "refused": REFUSED[model_type]}
    model = build(model_type, name, None)
    before, after = shapes(model), shapes(build(model_type, name, LARGER))
    changed = {key: shape for key, shape in before.items() if after.get(key) != shape}
    source, head = model.get_input_embeddings(), model.get_output_embeddings()
    heads = weight_names(model, head)
    embeds = [
        key
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is source.weight and key not in heads
    ]
    extras = [key for key in changed if key not in (*embeds, *heads)]
    embeds += [key for key in extras if key.endswith(MORE_EMBEDDINGS)]
    rows = source.weight.shape[0]
    biases = [key for key in extras if before[key] in ((rows,), (1, rows))]
    default = model.config.get_text_config().vocab_size
    found = {
        "class": name,
        "embeds": embeds,
        "heads": heads,
        "biases": biases,
        "vocab_size": config_path(model.config),
        "default": default,
        "tied": bool(head is not None and head.weight is source.weight),
    }
    if reason := _irregular(changed, found):
        return {"class": name, "refused": reason}
    for role in ("embeds", "heads", "biases"):
        found[role] = names_on_disk(model, found[role])
    return found


def names_on_disk(model: Any, names: list[str]) -> list[str]:
    """The names under which `save_pretrained` writes tensors, then those they have in memory.

    The two differ where transformers renamed modules after checkpoints had been published.
    """
    state = model.state_dict()
    try:
        saved = revert_weight_conversion(model, dict(state))
    except Exception:  # a conversion that needs values; it renames none of these tensors
        return names
    own = [state[name] for name in names if name in state]
    disk = [key for key, tensor in saved.items() if any(tensor is other for other in own)]
    return [*disk, *(name for name in names if name not in disk)]


def _irregular(changed: dict[str, tuple[int, ...]], found: dict[str, Any]) -> str:
    known = [*found["embeds"], *found["heads"], *found["biases"]]
    if others := sorted(changed.keys() - set(known)):
        return f"{others[0]} is indexed by token id in a way of its own"
    if still := sorted(set(known) - changed.keys()):
        return f"{still[0]} does not follow vocab_size"
    for key in known:
        if found["default"] not in changed[key][:2]:
            return f"{key} has other rows than vocab_size"
    return ""


def _joined(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    if old is None or "refused" in old:
        return new
    if "refused" in new:
        return old
    for role in ("embeds", "heads", "biases"):
        old[role] += [name for name in new[role] if name not in old[role]]
    return old


def make(only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The table, or those of its entries."""
    transformers.utils.logging.set_verbosity_error()
    table: dict[str, dict[str, Any]] = {}
    for model_type, name in classes():
        if only and model_type not in only:
            continue
        try:
            found = entry(model_type, name)
        except Exception as fault:  # a class whose own defaults cannot be built
            note(f"left out: {model_type} {name}: {type(fault).__name__}")
            continue
        table[model_type] = _joined(table.get(model_type), found)
    for model_type, reason in REFUSED.items():
        if not only or model_type in only:
            table.setdefault(model_type, {"class": "", "refused": reason})
    return {key: table[key] for key in sorted(table)}


def main() -> None:
    """Write the table, or print the entries named on the command line."""
    table = make(sys.argv[1:])
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if sys.argv[1:]:
        sys.stdout.write(text)
    else:
        TARGET.write_text(text)
        note(f"{TARGET}: {len(table)} entries")


if __name__ == "__main__":
    main()
