"""Models by name: a folder is used as it is, a hub id is downloaded once into the hub cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lexigraft.console import is_watched
from lexigraft.errors import LexigraftError
from lexigraft.files import NEW_TOKENS, is_there, require_folder

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_ID = re.compile(rf"(hf:)?{REPOSITORY.pattern}(@[\w.-]+)?")
_CACHED = "models--"  # of folders in the hub cache, which hold snapshots/COMMIT/
HUB = "hf:"  # before a name of the hub, of a model or of a data set
# What a folder holds beside its weights; terms and card of a model go with what is made of it.
SMALL_FILES = (
    *("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"),
    *(NEW_TOKENS, "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)


def local_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The folder that `name` means: a path, or a hub id, of which weights are fetched if needed.

    A hub id is `owner/model` or `owner/model@revision`; with `hf:` before it, it is one even where
    a folder of that name is here.

    Raises:
        LexigraftError: neither a folder nor a hub id that can be reached.
    """
    if not is_hub_id(name):
        return require_folder(Path(name).expanduser(), "a model or tokenizer")
    return snapshot(str(name), [*SMALL_FILES, *(["*.safetensors"] if weights else [])])


def is_hub_id(name: str | Path) -> bool:
    """True for what can only be the name of a model on the hub: no such path is here."""
    return not is_there(Path(name).expanduser()) and bool(_HUB_ID.fullmatch(str(name)))


def recorded_name(folder: Path) -> str:
    """What a manifest calls a model: its folder's name, or `owner/model@commit` of the hub's.

    >>> recorded_name(Path("cache/models--owner--model/snapshots/0123abc"))
    'owner/model@0123abc'
    """
    place = folder.resolve()
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith(_CACHED):
        return f"{repository.removeprefix(_CACHED).replace('--', '/')}@{place.name}"
    return place.name


def snapshot(name: str, patterns: Sequence[str]) -> Path:
    """The folder of one commit in the hub cache, with the files that fit `patterns`.

    Raises:
        LexigraftError: the hub has no such model, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    no_bars_unseen()
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(patterns)
        )
    except (OSError, ValueError) as fault:
        raise unreached(name, fault) from None
    return Path(folder)


def no_bars_unseen() -> None:
    """No progress bars of huggingface_hub where nobody looks at them."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not is_watched():
        disable_progress_bars()


def unreached(name: str, fault: Exception) -> LexigraftError:
    """What to say where neither the disk nor the hub has a model of that name."""
    return LexigraftError(
        f"{name} is no folder here, and the hub gave no model of that name "
        f"({type(fault).__name__})",
        needed="a model folder, or a hub id that this machine can reach",
        fix=f"ls {name}, or: hf download {name.removeprefix(HUB).partition('@')[0]}",
    )
