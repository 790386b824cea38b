"""GPT-2's `vocab.json` and `merges.txt` without a `tokenizer.json`.

The two files hold vocabulary and merges alone; the rest is what the tokenizer class of
transformers builds around them (models/gpt2, models/roberta, models/qwen2 of transformers 5). The
same is built here as `tokenizer.json` data, in memory: the folder keeps the files that it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.rank_files import QWEN_PATTERN
from lexigraft.families.tokenmap import CHARACTER_TO_BYTE
from lexigraft.files import read_object

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}

_ROBERTA = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
    "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>",
}  # fmt: skip
# Class -> its own special tokens, which the settings may replace.
_CLASSES: Mapping[str, Mapping[str, str | None]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    **dict.fromkeys(("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer"), _ROBERTA),
}
_CLASS_OF_MODEL_TYPE = {
    **dict.fromkeys(("codegen", "gptj", "gpt_neo", "opt", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("roberta", "bart", "longformer"), "RobertaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
}
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def read_gpt2_files(folder: Path) -> dict[str, Any]:
    """`tokenizer.json` data of a folder with vocab.json and merges.txt.

    Raises:
        RefusalError: no merges.txt, or a tokenizer class that does more than is known here.
        LexigraftError: a special token without an id.
    """
    if not (folder / "merges.txt").is_file():
        raise RefusalError(
            f"{folder} holds vocab.json without merges.txt",
            needed="merges.txt as well: without it nothing says how tokens are joined",
            fix="copy merges.txt of this model into the folder",
        )
    vocabulary = read_object(folder / "vocab.json")
    merges = read_merges(folder / "merges.txt")
    settings = _settings(folder)
    kind = _tokenizer_class(folder, settings)
    _require_byte_level(folder, vocabulary)
    roles = {**_CLASSES[kind], **{r: _content(settings[r]) for r in _ROLES if r in settings}}
    prefix_space = bool(settings.get("add_prefix_space"))
    return {
        "version": "1.0",
        "added_tokens": list(_added_tokens(folder, settings, roles, vocabulary)),
        "normalizer": {"type": "NFC"} if kind == "Qwen2Tokenizer" else None,
        "pre_tokenizer": _pre_tokenizer(kind, prefix_space=prefix_space),
        "post_processor": _template(kind, settings, roles, vocabulary, prefix_space=prefix_space),
        "decoder": dict(BYTE_LEVEL),
        "model": bpe_model(vocabulary, merges),
    }


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a merges.txt.

    Raises:
        LexigraftError: a line is no pair.
    """
    lines = path.read_text("utf-8").split("\n")
    if lines and lines[0].startswith("#version"):
        del lines[0]
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip()]
    bad = next((" ".join(pair) for pair in pairs if len(pair) != 2), None)
    if bad is not None:
        raise LexigraftError(
            f"{path}: {bad!r} is no merge",
            needed="two tokens with one space between them on every line",
            fix="copy merges.txt again from the model it belongs to",
        )
    return [(left, right) for left, right in pairs]


def bpe_model(
    vocabulary: Mapping[str, int],
    merges: list[tuple[str, str]],
    *,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The `model` of a tokenizer.json.

    Args:
        vocabulary: token -> id.
        merges: pairs in the order of their ranks.
        ignore_merges: a piece that is a token is emitted whatever the merges say.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": dict(vocabulary),
        "merges": [list(pair) for pair in merges],
    }


def split_then_bytes(pattern: str, *, add_prefix_space: bool = False) -> dict[str, Any]:
    """A pre-tokenizer that splits by `pattern` and maps bytes to characters."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    to_bytes = {**BYTE_LEVEL, "add_prefix_space": add_prefix_space, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [{**split, "invert": False}, to_bytes]}


def added_token(content: str, token_id: int, *, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens` as transformers makes it of a bare string."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {
        "id": token_id, "content": content, **flags, "normalized": not special, "special": special,
    }  # fmt: skip


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_object(folder / name))
    return settings


def _tokenizer_class(folder: Path, settings: Mapping[str, Any]) -> str:
    named = settings.get("tokenizer_class")
    config = folder / "config.json"
    if named is None and config.is_file():
        model_type = read_object(config).get("model_type")
        named = _CLASS_OF_MODEL_TYPE.get(str(model_type), "GPT2Tokenizer")
    kind = str(named or "GPT2Tokenizer").removesuffix("Fast")
    if kind not in _CLASSES:
        raise RefusalError(
            f"{folder} holds vocab.json and merges.txt of a {kind}, without a tokenizer.json",
            needed=f"a tokenizer.json, or one of the classes {', '.join(_CLASSES)}: what another "
            "class does to a text before the merges is not in these files",
            fix="load and save it with transformers: save_pretrained writes a tokenizer.json",
        )
    return kind


def _require_byte_level(folder: Path, vocabulary: Mapping[str, Any]) -> None:
    missing = [character for character in CHARACTER_TO_BYTE if character not in vocabulary]
    marked = any(token.endswith("</w>") for token in vocabulary)
    if missing or marked:
        what = "word-end marks (CLIP kind)" if marked else f"{len(missing)} of 256 bytes missing"
        raise RefusalError(
            f"{folder / 'vocab.json'} is BPE with {what}",
            needed="byte-level BPE: GPT-2's characters for all 256 bytes, no marks",
            fix="extend a base of another family; this one is not supported",
        )


def _content(token: Any) -> str | None:
    if isinstance(token, Mapping):
        return str(token["content"])
    return None if token is None else str(token)


def _added_tokens(
    folder: Path,
    settings: Mapping[str, Any],
    roles: Mapping[str, str | None],
    vocabulary: Mapping[str, int],
) -> Iterator[dict[str, Any]]:
    """Added tokens by id, with the flags that the settings give them."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, Mapping) else extra
    named = [*roles.values(), *map(_content, extra)]
    special = dict.fromkeys(text for text in named if text is not None)
    entries: dict[int, dict[str, Any]] = {}
    path = folder / "added_tokens.json"
    for text, token_id in (read_object(path) if path.is_file() else {}).items():
        entries[token_id] = added_token(text, token_id, special=text in special)
    for key, token in (settings.get("added_tokens_decoder") or {}).items():
        flags = added_token(token["content"], int(key), special=bool(token.get("special")))
        entries[int(key)] = {**flags, **token}
    known = {entry["content"] for entry in entries.values()}
    for text in special:
        if text in known:
            continue
        if text not in vocabulary:
            raise LexigraftError(
                f"{folder}: special token {text!r} has no id in vocab.json or added_tokens.json",
                needed="an id for every special token: a loader gives this one the next free id, "
                "which new tokens would take",
                fix=f'enter "{text}" with its id in added_tokens.json, or load the folder with '
                "transformers and save it again",
            )
        entries[vocabulary[text]] = added_token(text, vocabulary[text], special=True)
    for token_id in sorted(entries):
        yield entries[token_id]


def _pre_tokenizer(kind: str, *, prefix_space: bool) -> dict[str, Any]:
    if kind == "Qwen2Tokenizer":
        return split_then_bytes(QWEN_PATTERN, add_prefix_space=prefix_space)
    return {**BYTE_LEVEL, "add_prefix_space": prefix_space}


def _template(
    kind: str,
    settings: Mapping[str, Any],
    roles: Mapping[str, str | None],
    vocabulary: Mapping[str, int],
    *,
    prefix_space: bool,
) -> dict[str, Any] | None:
    """What is put around a text."""

    def placed(role: str) -> list[Any]:
        return [roles[role], vocabulary[str(roles[role])]]

    if _CLASSES[kind] is _ROBERTA:
        return {
            "type": "RobertaProcessing", "sep": placed("sep_token"), "cls": placed("cls_token"),
            "trim_offsets": True, "add_prefix_space": prefix_space,
        }  # fmt: skip
    if not settings.get("add_bos_token") or roles.get("bos_token") is None:
        return None
    text, token_id = placed("bos_token")
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, one],
        "pair": [bos, one, {"SpecialToken": {"id": text, "type_id": 1}}, two],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }
