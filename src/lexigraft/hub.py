"""Models by name: a folder is used as it is, a hub id is downloaded once into the hub cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lexigraft.errors import LexigraftError
from lexigraft.files import is_there, require_folder

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
# What a folder holds beside its weights.
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def local_folder(name: str | Path) -> Path:
    """The folder that `name` means: a path, or a hub id `owner/model` or `owner/model@revision`.

    Raises:
        LexigraftError: neither a folder nor a hub id that can be reached.
    """
    if not is_hub_id(name):
        return require_folder(Path(name).expanduser(), "a model or tokenizer")
    return snapshot(str(name), [*SMALL_FILES, "*.safetensors"])


def is_hub_id(name: str | Path) -> bool:
    """True for what can only be the name of a model on the hub: no such path is here."""
    return not is_there(Path(name).expanduser()) and bool(_HUB_ID.fullmatch(str(name)))


def snapshot(name: str, patterns: Sequence[str]) -> Path:
    """The folder of one commit in the hub cache, with the files that fit `patterns`.

    Raises:
        LexigraftError: the hub has no such model, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(patterns)
        )
    except (OSError, ValueError) as fault:
        raise unreached(name, fault) from None
    return Path(folder)


def unreached(name: str, fault: Exception) -> LexigraftError:
    """What to say where neither the disk nor the hub has a model of that name."""
    return LexigraftError(
        f"{name} is no folder here, and the hub gave no model of that name "
        f"({type(fault).__name__})",
        needed="a model folder, or a hub id that this machine can reach",
        fix=f"ls {name}, or: hf download {name.partition('@')[0]}",
    )
