"""What lies beside the weights and the tokenizer in a model folder, copied as it is."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

from lexigraft import families
from lexigraft.checkpoints.checkpoint import INDEX, Checkpoint
from lexigraft.console import note
from lexigraft.families.tokenmap import TOKENIZER_FILES
from lexigraft.files import (
    BASE_CARD,
    CARD,
    CARD_MARK,
    MANIFEST,
    NEW_TOKENS,
    read_json,
    read_object,
    read_settings,
    write_json,
)

_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml"),
    *("*.onnx", "*.onnx_data", "*.npz", "*.tflite", "*.index.json"),
)
_TOKENIZER = (*TOKENIZER_FILES, "tekken.json", "*.tiktoken", "tokenizer.*", "vocab.*", "*.model")
# Written anew by the step, or about the base alone.
_OWN = ("config.json", MANIFEST, NEW_TOKENS, "new_rows.safetensors")


def copy_side_files(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Copy every other file of a model folder to `target`; returns the names of what is left out.

    Left out are weights in further formats and whatever else keeps the old vocabulary; of a
    subfolder that holds any, the whole subfolder. Hidden files and
    folders and the manifest stay behind without mention. Symlinks to files are followed.
    The base's card is kept under another name: README.md would present the result as the base.
    """
    left = []
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name.startswith(".") or _matches(path, (*_TOKENIZER, *_OWN)):
            continue
        if path.name == CARD and path.is_file():
            if (
                not (path.parent / BASE_CARD).exists()
                and CARD_MARK.encode() not in path.read_bytes()
            ):
                shutil.copyfile(path, target / BASE_CARD)
                note(f"{CARD} is about the base: kept as {BASE_CARD} (lexigraft card writes one)")
            continue
        if path.is_dir():
            if path.is_symlink() or any(
                _matches(p, (*_WEIGHTS, *_TOKENIZER)) for p in path.rglob("*")
            ):
                left.append(path.name + "/")
            else:
                shutil.copytree(path, target / path.name)
        elif path.is_file():
            if not _matches(path, _WEIGHTS):
                shutil.copyfile(path, target / path.name)
            elif path.name not in (*checkpoint.shards, INDEX):
                left.append(path.name)
    return left


def bytes_beside(checkpoint: Checkpoint) -> int:
    """The most that `copy_side_files` may write."""
    files = (p for p in checkpoint.folder.rglob("*") if p.is_file() and not _matches(p, _WEIGHTS))
    return sum(path.stat().st_size for path in files if not _is_hidden(path, checkpoint.folder))


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def place_tokenizer(base: Path, vocab: Path, target: Path) -> None:
    """VOCAB's tokenizer files; settings and chat template of the base where VOCAB has none."""
    families.copy_tokenizer(vocab, target)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (target / name).exists() and (base / name).is_file():
            (target / name).write_bytes((base / name).read_bytes())
    _list_added_tokens(target)
    if (vocab / NEW_TOKENS).is_file():
        (target / NEW_TOKENS).write_bytes((vocab / NEW_TOKENS).read_bytes())
    if not _chat_template(target):
        for name, content in _chat_template(base).items():
            if name == "tokenizer_config.json":
                path = target / name
                settings = read_object(path) if path.exists() else {}
                write_json(path, {**settings, "chat_template": content})
            else:
                (target / name).write_bytes(content)


def _list_added_tokens(folder: Path) -> None:
    """Where the settings list added tokens, the list names all of tokenizer.json.

    Classes such as Qwen2Tokenizer of transformers 5 believe the list alone, and read the text of a
    token that it lacks as ordinary text.
    """
    tokenizer, path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not (tokenizer.is_file() and path.is_file()):
        return
    settings = read_object(path)
    listed = settings.get("added_tokens_decoder")
    if not isinstance(listed, dict) or not listed:
        return
    missing = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in read_json(tokenizer).get("added_tokens") or ()
        if str(token["id"]) not in listed
    }
    if missing:
        write_json(path, {**settings, "added_tokens_decoder": {**listed, **missing}})


def _chat_template(folder: Path) -> dict[str, Any]:
    """File name -> the chat template that it holds."""
    found: dict[str, Any] = {}
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            found[name] = (folder / name).read_bytes()
    settings = read_settings(folder / "tokenizer_config.json")
    if "chat_template" in settings:
        found["tokenizer_config.json"] = settings["chat_template"]
    return found
