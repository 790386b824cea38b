"""Models by name: a folder is used as it is, a hub id is downloaded once into the hub cache."""

from __future__ import annotations

import re
from pathlib import Path

from lexigraft.errors import LexigraftError
from lexigraft.files import is_there, require_folder

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def local_folder(name: str | Path) -> Path:
    """The folder that `name` means: a path, or a hub id `owner/model` or `owner/model@revision`.

    Raises:
        LexigraftError: neither a folder nor a hub id that can be reached.
    """
    path = Path(name).expanduser()
    if is_there(path) or not _HUB_ID.fullmatch(str(name)):
        return require_folder(path, "a model or tokenizer")
    from huggingface_hub import snapshot_download

    repository, _, revision = str(name).partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=_WANTED)
    except (OSError, ValueError) as fault:
        raise LexigraftError(
            f"{name} is no folder here, and the hub gave no model of that name "
            f"({type(fault).__name__})",
            needed="a model folder, or a hub id that this machine can reach",
            fix=f"ls {path}, or: huggingface-cli download {repository}",
        ) from None
    return Path(folder)
