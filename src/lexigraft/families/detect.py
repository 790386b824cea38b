"""Which family a tokenizer folder belongs to; what is not supported is refused by name."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import refusals
from lexigraft.families.layouts import ids_are_unreadable, tokenizer_class
from lexigraft.families.rank_files import rank_file
from lexigraft.families.tokenmap import SENTENCEPIECE_FILES, parse_sentencepiece, tokenizer_data
from lexigraft.files import python_child, require_folder, sha256_file

if TYPE_CHECKING:
    from lexigraft.families import Family

_OPEN_IN_CHILD = """
import sys
if sys.argv[1].endswith(".json"):
    from tokenizers import Tokenizer
    Tokenizer.from_file(sys.argv[1]).encode("probe 冠状")
else:
    import sentencepiece
    sentencepiece.SentencePieceProcessor(model_file=sys.argv[1]).encode("probe 冠状")
"""
_CHILD_SECONDS = 120
_OWN: ContextVar[bool] = ContextVar("own files", default=False)
_UNIGRAM, _BPE = 1, 2  # sentencepiece_model.proto, TrainerSpec.ModelType
_SENTENCEPIECE_KINDS = {_UNIGRAM: "Unigram", 3: "word", 4: "character"}


def load_family(folder: Path) -> Family:
    """See `lexigraft.families.load`."""
    folder = require_folder(Path(folder), "tokenizer files")
    if (folder / "tekken.json").is_file():
        raise refusals.tekken(folder / "tekken.json")
    model_file = next((folder / n for n in SENTENCEPIECE_FILES if (folder / n).is_file()), None)
    ranks = rank_file(folder)
    json_file = folder / "tokenizer.json"
    if json_file.is_file():
        return _from_json(folder, json_file, model_file, ranks)
    if model_file is not None:
        if model_file == ranks:
            return _tiktoken(folder, ranks, None)
        return _from_model(folder, model_file, None)
    if ranks is not None:
        return _tiktoken(folder, ranks, None)
    if (folder / "vocab.txt").is_file():
        return _wordpiece(folder, None)
    if (folder / "vocab.json").is_file():
        return _gpt2_files(folder)
    remote = refusals.remote_class(folder)
    if remote is not None:
        raise remote
    raise LexigraftError(
        f"no tokenizer in {folder}",
        needed="tokenizer.json or a SentencePiece tokenizer.model",
        fix="copy the tokenizer files of this model into the folder",
    )


def _from_json(
    folder: Path, json_file: Path, model_file: Path | None, ranks: Path | None
) -> Family:
    data = tokenizer_data(json_file)
    model = data.get("model") if isinstance(data, dict) else None
    kind = model.get("type") if isinstance(model, dict) else None
    if kind is None and isinstance(model, dict) and "merges" in model:
        kind = "BPE"  # files of tokenizers < 0.9 name no type
    if kind is None and isinstance(model, dict) and "max_input_chars_per_word" in model:
        kind = "WordPiece"
    if kind == "WordPiece":
        open_safely(json_file)
        return _wordpiece(folder, data)
    if kind == "Unigram":
        open_safely(json_file)
        return _unigram(folder, model_file, data)
    if kind != "BPE":
        raise refusals.unknown_model(json_file, kind)
    assert isinstance(model, dict)
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise refusals.marked_bpe(json_file, model)
    if model.get("dropout"):
        raise refusals.random_bpe(json_file, model["dropout"])
    open_safely(json_file)
    if model.get("byte_fallback"):
        return _from_model(folder, model_file, data)
    if _has_byte_level(data):
        if model_file not in (None, ranks):
            raise RefusalError(
                f"{folder} holds a byte-level tokenizer.json and a SentencePiece {model_file.name}",
                needed="files of one tokenizer",
                fix=f"remove the one that does not belong to this model, for example {model_file}",
            )
        if ranks is not None:
            return _tiktoken(folder, ranks, data)
        from lexigraft.families.agreement import require_agreement
        from lexigraft.families.byte_level import ByteLevelBPE

        require_agreement(folder, data)
        return ByteLevelBPE(folder, data)
    raise refusals.character_bpe(json_file)


def _from_model(folder: Path, model_file: Path | None, data: dict[str, Any] | None) -> Family:
    if model_file is not None:
        proto = parse_sentencepiece(model_file.read_bytes(), model_file)
        if proto.trainer_spec.model_type == _UNIGRAM and data is None:
            return _unigram(folder, model_file, None)
        if data is not None and proto.trainer_spec.model_type != _BPE:
            raise RefusalError(
                f"{folder} holds a BPE tokenizer.json and a {model_file.name} of another kind",
                needed="files of one tokenizer",
                fix=f"remove the one that does not belong to this model, for example {model_file}",
            )
        if proto.trainer_spec.model_type != _BPE:
            kind = _SENTENCEPIECE_KINDS.get(proto.trainer_spec.model_type, "unnamed")
            raise refusals.sentencepiece_kind(model_file, kind)
        if not proto.trainer_spec.byte_fallback:
            raise refusals.sentencepiece_without_bytes(model_file)
        open_safely(model_file)
    from lexigraft.families.sentencepiece_bpe import SentencePieceBPE

    return SentencePieceBPE(folder, model_file=model_file, data=data)


def _unigram(folder: Path, model_file: Path | None, data: dict[str, Any] | None) -> Family:
    if model_file is not None:
        proto = parse_sentencepiece(model_file.read_bytes(), model_file)
        if proto.trainer_spec.model_type != _UNIGRAM:
            raise RefusalError(
                f"{folder} holds a Unigram tokenizer.json and a {model_file.name} of another kind",
                needed="files of one tokenizer",
                fix=f"remove the one that does not belong to this model, for example {model_file}",
            )
        open_safely(model_file)
    name = tokenizer_class(folder)
    if data is None and ids_are_unreadable(folder):
        raise RefusalError(
            f"{folder}: {name} puts tokens of its own behind the pieces of a .model, "
            "after new ones too, so that their ids would move",
            needed="a tokenizer.json, which says which id is what",
            fix=f'python -c \'from transformers import AutoTokenizer as A; d="{folder}"; '
            "A.from_pretrained(d).save_pretrained(d)'",
        )
    from lexigraft.families.unigram import Unigram

    return Unigram(folder, model_file=model_file, data=data)


def _gpt2_files(folder: Path) -> Family:
    from lexigraft.families.byte_level import ByteLevelBPE
    from lexigraft.families.gpt2_files import read_gpt2_files

    return ByteLevelBPE(folder, read_gpt2_files(folder))


def _tiktoken(folder: Path, ranks: Path, data: dict[str, Any] | None) -> Family:
    from lexigraft.families.agreement import require_agreement
    from lexigraft.families.tiktoken_ranks import TiktokenBPE

    require_agreement(folder, data)
    return TiktokenBPE(folder, ranks, data)


def _wordpiece(folder: Path, data: dict[str, Any] | None) -> Family:
    from lexigraft.families.wordpiece import WordPiece

    return WordPiece(folder, data)


def _has_byte_level(data: dict[str, Any]) -> bool:
    """True if the pre-tokenizer maps bytes to characters (GPT-2's byte level)."""
    stack = [data.get("pre_tokenizer")]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):
            continue
        if part.get("type") == "ByteLevel":
            return True
        stack.extend(part.get("pretokenizers") or [])
    return False


@contextmanager
def own_files() -> Iterator[None]:
    """Inside, the files that are loaded are lexigraft's own output: no child process is needed."""
    token = _OWN.set(True)
    try:
        yield
    finally:
        _OWN.reset(token)


def open_safely(path: Path) -> None:
    """Open a tokenizer file in a child process first.

    The engines are native code: a hostile file can end the process that reads it, which no
    exception handler here could catch.

    Files that lexigraft itself has just written are opened at once (`own_files`).

    Raises:
        LexigraftError: the child failed, was killed or hung.
    """
    if _OWN.get():
        return
    fault = _opening(_at(path), sha256_file(path)).result()
    if fault is not None:
        raise LexigraftError(
            f"{path} cannot be opened ({fault})",
            needed="a tokenizer file that its own engine reads",
            fix="copy this file again from the model it belongs to",
        )


def open_ahead(folders: Iterable[Path]) -> None:
    """Start the child processes that `load` of each folder will ask for, and do not wait."""
    for folder in folders:
        names = ("tokenizer.json", *SENTENCEPIECE_FILES)
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is not None:
            with suppress(OSError):  # `load` will say it
                _opening(_at(path), sha256_file(path))


def _at(path: Path) -> str:
    """Where a file lies, under its own name: in a hub cache the file behind it is called a hash."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow the link


@lru_cache(maxsize=64)
def _opening(path: str, _content: str) -> Future[str | None]:
    """What is wrong with the file, as soon as its child process has said; None if nothing is."""
    thread = ThreadPoolExecutor(1)
    opening = thread.submit(_open_in_child, path)
    thread.shutdown(wait=False)
    return opening


def _open_in_child(path: str) -> str | None:
    command = python_child(_OPEN_IN_CHILD, path)
    try:
        child = subprocess.run(command, capture_output=True, timeout=_CHILD_SECONDS, check=False)
        fault = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        broken = child.returncode != 0
    except subprocess.TimeoutExpired:
        broken, fault = True, [f"no answer in {_CHILD_SECONDS} s"]
    if not broken:
        return None
    return fault[0] if fault else "the reader crashed"
