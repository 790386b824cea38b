"""Which family a tokenizer folder belongs to; what is not supported is refused by name."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.tokenmap import SENTENCEPIECE_FILES, is_tiktoken, parse_sentencepiece
from lexigraft.files import read_json, require_folder, sha256_file

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
_UNIGRAM, _BPE = 1, 2  # sentencepiece_model.proto, TrainerSpec.ModelType


def load_family(folder: Path) -> Family:
    """See `lexigraft.families.load`."""
    folder = require_folder(Path(folder), "tokenizer files")
    if (folder / "tekken.json").is_file():
        raise _refusal(folder / "tekken.json", "Mistral's tekken format")
    model_file = next((folder / n for n in SENTENCEPIECE_FILES if (folder / n).is_file()), None)
    json_file = folder / "tokenizer.json"
    if json_file.is_file():
        return _from_json(folder, json_file, model_file)
    if model_file is not None:
        if is_tiktoken(model_file.read_bytes()):
            raise _refusal(model_file, "a tiktoken rank file")
        return _from_model(folder, model_file, None)
    for name, kind in (("vocab.txt", "WordPiece (vocab.txt)"), ("vocab.json", "vocab.json alone")):
        if (folder / name).is_file():
            raise _refusal(folder / name, kind)
    ranks = next(iter(sorted(folder.glob("*.tiktoken"))), None)
    if ranks is not None:
        raise _refusal(ranks, "a tiktoken rank file")
    raise LexigraftError(
        f"no tokenizer in {folder}",
        needed="tokenizer.json or a SentencePiece tokenizer.model",
        fix="copy the tokenizer files of this model into the folder",
    )


def _from_json(folder: Path, json_file: Path, model_file: Path | None) -> Family:
    data = read_json(json_file)
    model = data.get("model") if isinstance(data, dict) else None
    kind = model.get("type") if isinstance(model, dict) else None
    if kind is None and isinstance(model, dict) and "merges" in model:
        kind = "BPE"  # files of tokenizers < 0.9 name no type
    if kind != "BPE":
        raise _refusal(json_file, f"a {kind or 'nameless'} model")
    assert isinstance(model, dict)
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise _refusal(json_file, "BPE with word-end or continuation marks (CLIP kind)")
    if model.get("dropout"):
        raise _refusal(json_file, "BPE with dropout, whose ids are random")
    open_safely(json_file)
    if model.get("byte_fallback"):
        return _from_model(folder, model_file, data)
    if _has_byte_level(data):
        if model_file is not None and not is_tiktoken(model_file.read_bytes()):
            raise RefusalError(
                f"{folder} holds a byte-level tokenizer.json and a SentencePiece {model_file.name}",
                needed="files of one tokenizer",
                fix=f"remove the one that does not belong to this model, for example {model_file}",
            )
        if model_file is not None:
            raise _refusal(model_file, "a tiktoken rank file")
        from lexigraft.families.byte_level import ByteLevelBPE

        return ByteLevelBPE(folder, data)
    raise _refusal(json_file, "BPE without byte-level and without byte fallback")


def _from_model(folder: Path, model_file: Path | None, data: dict[str, Any] | None) -> Family:
    if model_file is not None:
        proto = parse_sentencepiece(model_file.read_bytes(), model_file)
        if proto.trainer_spec.model_type != _BPE:
            unigram = proto.trainer_spec.model_type == _UNIGRAM
            raise _refusal(model_file, f"a SentencePiece {'Unigram' if unigram else 'word'} model")
        if not proto.trainer_spec.byte_fallback:
            raise _refusal(model_file, "SentencePiece BPE without byte fallback")
        open_safely(model_file)
    from lexigraft.families.sentencepiece_bpe import SentencePieceBPE

    return SentencePieceBPE(folder, model_file=model_file, data=data)


def _refusal(path: Path, kind: str) -> RefusalError:
    return RefusalError(
        f"{path} is {kind}",
        needed="byte-level BPE (tokenizer.json) or SentencePiece BPE with byte fallback "
        "(tokenizer.model, tokenizer.json or both)",
        fix="extend a base of one of these families; this one is not supported yet",
    )


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


def open_safely(path: Path) -> None:
    """Open a tokenizer file in a child process first.

    The engines are native code: a hostile file can end the process that reads it, which no
    exception handler here could catch.

    Raises:
        LexigraftError: the child failed, was killed or hung.
    """
    _open_once(str(path.resolve()), sha256_file(path))


@lru_cache(maxsize=64)
def _open_once(path: str, _content: str) -> None:
    command = [sys.executable, "-c", _OPEN_IN_CHILD, path]
    try:
        child = subprocess.run(command, capture_output=True, timeout=_CHILD_SECONDS, check=False)
        fault = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        broken = child.returncode != 0
    except subprocess.TimeoutExpired:
        broken, fault = True, [f"no answer in {_CHILD_SECONDS} s"]
    if broken:
        raise LexigraftError(
            f"{path} cannot be opened ({fault[0] if fault else 'the reader crashed'})",
            needed="a tokenizer file that its own engine reads",
            fix="copy this file again from the model it belongs to",
        )
