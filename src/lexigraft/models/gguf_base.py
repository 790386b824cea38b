"""A GGUF file as an ordinary Hugging Face folder: weights de-quantised, config, tokenizer.

transformers reads the file; what it leaves out is put right here: the marks of its quantiser, and
what `tokenizer.ggml.pre` says where it does not know that name.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigraft.checkpoints.gguf_header import gguf_files, read_gguf_header
from lexigraft.console import working
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import read_json, require_free_space, write_json

INSTALL = "pip install 'lexigraft[gguf]'"
# Pre-tokenizers that transformers does not restore. SmolLM: each digit is a token of its own.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
        ],
    }
}
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Dequantised:
    """What was in a GGUF file.

    Attributes:
        kind: the type that most of its weights have, for example `Q4_1`.
        dtype: the type in which they were written.
    """

    kind: str
    dtype: str

    @property
    def words(self) -> str:
        """What happened, for a notice."""
        if self.kind in _PLAIN:
            return f"converted from {self.kind} to {self.dtype}"
        return f"de-quantised from {self.kind} to {self.dtype}: real weights, slightly degraded"


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` means: itself, or the only one of a folder without safetensors.

    Raises:
        LexigraftError: the folder holds several.
        RefusalError: it is one part of a model that was split.
    """
    found = gguf_files(path)
    if not found:
        return None
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", found[0].name):
        raise RefusalError(
            f"{found[0]} is one part of a model",
            needed="the model in one GGUF file",
            fix=f"llama-gguf-split --merge {found[0]} MODEL.gguf",
        )
    if len(found) > 1:
        raise LexigraftError(
            f"{path} holds {len(found)} GGUF files: {', '.join(p.name for p in found[:4])}",
            needed="one of them: the least quantised one loses least",
            fix=f"name the file instead of the folder, for example {found[-1]}",
        )
    return found[0]


@working("de-quantising the GGUF file")
def write_folder(source: Path, folder: Path, *, models: int = 1) -> Dequantised:
    """Write the model and the tokenizer of a GGUF file into the existing `folder`.

    The whole model is in memory in float32 meanwhile. Weights of a quantised file are written in
    bfloat16, others in the type that they have.

    Args:
        source: the file.
        folder: where to.
        models: for how many models of this size the disk must have room before anything is done:
            2 where another will be made of this one.

    Raises:
        LexigraftError: torch or the GGUF reader is not installed, or the disk lacks room.
        RefusalError: an architecture, or a damaged file, that transformers does not read.
    """
    from lexigraft.models.load import quiet_transformers  # graft of any other base needs none

    missing = [name for name in ("torch", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise LexigraftError(
            f"{source.name} is a GGUF file, and {' and '.join(missing)} is not installed",
            needed="torch and gguf, with which transformers de-quantises it",
            fix=INSTALL,
        )
    try:
        done, pre = _looked_into(source, folder, models)
        with quiet_transformers():
            _write_model(source, folder, done.dtype)
            _write_tokenizer(source, folder, pre)
    except LexigraftError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError, ImportError) as fault:
        words = " ".join(str(fault).split())[:300]
        raise RefusalError(
            f"transformers cannot read {source} ({type(fault).__name__}: {words})",
            needed="a GGUF file of an architecture that transformers reads",
            fix="use the safetensors form of this model",
        ) from fault
    return done


def _looked_into(source: Path, folder: Path, models: int) -> tuple[Dequantised, str]:
    """The type of the weights and the name of the pre-tokenizer."""
    from gguf import GGMLQuantizationType

    header = read_gguf_header(source)
    numbers = {name: math.prod(tensor.shape) for name, tensor in header.tensors.items()}
    kinds: Counter[int] = Counter()
    for name, tensor in header.tensors.items():
        if len(tensor.shape) > 1:
            kinds[tensor.kind] += numbers[name]
    if not kinds:
        raise ValueError("it holds no weights")
    kind = GGMLQuantizationType(kinds.most_common(1)[0][0]).name
    dtype = _PLAIN.get(kind, "bfloat16")
    size = sum(numbers.values()) * (4 if dtype == "float32" else 2)
    require_free_space(folder, models * size)
    return Dequantised(kind, dtype), str(header.metadata.get("tokenizer.ggml.pre", ""))


def _write_model(source: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    # Dequantised in float32, so that each weight is rounded only once.
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model of its own: the loaded one carries its quantiser's marks into what it saves.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    del loaded
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    saved = read_json(folder / "config.json")
    saved.pop("_model_name_or_path", None)  # the name of the GGUF's model, no path
    write_json(folder / "config.json", saved)


def _write_tokenizer(source: Path, folder: Path, pre: str) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    if pre in PRE_TOKENIZERS:
        tokenizer["pre_tokenizer"] = PRE_TOKENIZERS[pre]
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        _drop_padding(vocabulary)
    path.write_text(json.dumps(tokenizer, indent=1, ensure_ascii=False) + "\n", "utf-8")
    config = read_json(folder / "tokenizer_config.json")
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    # The class that every version of transformers knows and that changes nothing on load.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    length = read_json(folder / "config.json").get("max_position_embeddings")
    if length is not None:
        config["model_max_length"] = length
    config["clean_up_tokenization_spaces"] = False
    write_json(folder / "tokenizer_config.json", config)


def _drop_padding(vocabulary: dict[str, int]) -> None:
    """Remove what stands for rows without a token: llama.cpp's converter names them `[PAD<id>]`."""
    for text, token_id in sorted(vocabulary.items(), key=lambda item: -item[1]):
        if text != f"[PAD{token_id}]":
            return
        del vocabulary[text]
