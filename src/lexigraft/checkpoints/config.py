"""config.json: what it says of the vocabulary, and edits that leave every other key alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lexigraft.checkpoints.architectures import VocabularyTensors, table
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.nested import get, paths_to, put
from lexigraft.errors import LexigraftError, RefusalError


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise when the weights are quantised: their rows cannot be averaged or added to.

    Raises:
        RefusalError: config.json describes a quantisation, at its top or in a part for the text.
    """
    for path in paths_to(checkpoint.config, ("quantization_config", "compression_config")):
        settings = get(checkpoint.config, path)
        if settings:
            kind = settings.get("quant_method", "") if isinstance(settings, dict) else ""
            raise RefusalError(
                f"{checkpoint.folder} is quantised" + (f" ({kind})" if kind else ""),
                needed="weights in bfloat16, float16 or float32",
                fix="use the unquantised model, and quantise the result",
            )


def refuse_ungathered(checkpoint: Checkpoint) -> None:
    """Raise when the weights were saved under ZeRO-3 without being gathered first.

    Raises:
        LexigraftError: a tensor is empty, or config.json says that the vocabulary is.
    """
    empty = [tensor for tensor in checkpoint.tensors.values() if 0 in tensor.shape]
    if empty:
        found = (
            f"{empty[0].name} of {checkpoint.folder} has shape {list(empty[0].shape)} "
            f"({len(empty)} tensors are empty)"
        )
    else:
        paths = paths_to(checkpoint.config, ("vocab_size",))
        if all(get(checkpoint.config, path) != 0 for path in paths):
            return
        found = f"{checkpoint.folder / 'config.json'} says vocab_size = 0"
    raise LexigraftError(
        f"{found}: it was saved without gathering the shards of ZeRO-3",
        needed="whole tensors, and a config that was written beside them",
        fix="python zero_to_fp32.py in the training folder, or save with "
        "stage3_gather_16bit_weights_on_model_save",
    )


def config_rows(checkpoint: Checkpoint, vocabulary: VocabularyTensors) -> int | None:
    """The number of rows that config.json states, or its class's default; None if unknown."""
    value = get(checkpoint.config, vocabulary.config_paths[0])
    if value is None:
        entry = table().get(str(checkpoint.config.get("model_type")), {})
        value = entry.get("default")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def edit_config(
    config: Mapping[str, Any],
    vocabulary: VocabularyTensors,
    *,
    rows: int,
    tokens: int = 0,
    tied: bool | None = None,
) -> dict[str, Any]:
    """A copy of config.json's content with the new number of rows, all other keys untouched.

    Args:
        config: the old content.
        vocabulary: of the old checkpoint; says where the number stands, nested places included.
        rows: the new number.
        tokens: how many of them have a token; a number of rows up to which logits are kept
            (`unpadded_vocab_size`, Inkling) is raised to it.
        tied: write `tie_word_embeddings` at the top and wherever else it is stored; None leaves
            it as it is.
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for path in vocabulary.config_paths:
        put(result, path, rows)
    for path in paths_to(result, ("unpadded_vocab_size",)):
        if isinstance(get(result, path), int):
            put(result, path, max(tokens, get(result, path)))
    if tied is not None:
        result["tie_word_embeddings"] = tied
        for path in paths_to(result, ("tie_word_embeddings",)):
            put(result, path, tied)
    return result
