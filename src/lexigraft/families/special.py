"""New special tokens behind everything else, in each file that a tokenizer has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lexigraft.errors import RefusalError
from lexigraft.families.rank_files import rank_file
from lexigraft.families.tokenmap import SENTENCEPIECE_FILES, parse_sentencepiece
from lexigraft.files import read_object

_USER_DEFINED = 4  # sentencepiece_model.proto, ModelProto.SentencePiece.Type
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def add_special(
    folder: Path, tokens: Sequence[str], first_id: int, *, special: bool = True
) -> None:
    """Write `tokens` into the tokenizer files of `folder`, with ids from `first_id` on.

    They are matched literally and, if `special`, skipped in decoding; a SentencePiece `.model`
    holds them as user-defined pieces, so that its own engine reads them alike.

    Raises:
        RefusalError: a rank file without a tokenizer.json, which has no place for them, or a
            space inside one where SentencePiece reads it.
    """
    if not tokens:
        return
    ids = {token: first_id + place for place, token in enumerate(tokens)}
    ranks = rank_file(folder)
    if ranks is not None and not (folder / "tokenizer.json").is_file():
        raise RefusalError(
            f"{ranks.name} has no place for special tokens",
            needed="a tokenizer.json: readers of rank files keep special tokens in their code",
            fix="leave --special out, or add a tokenizer.json of the base",
        )
    models = [folder / n for n in SENTENCEPIECE_FILES if (folder / n).is_file()]
    models = [path for path in models if path != ranks]
    spaced = next((token for token in tokens if " " in token), None)
    if models and spaced is not None:
        raise RefusalError(
            f"the special token {spaced!r} holds a space",
            needed=f"special tokens without: {models[0].name} cannot hold it as it is written",
            fix=f"write it as {spaced.replace(' ', '_')!r}",
        )
    for path in models:
        _append_pieces(path, tokens)
    if (folder / "tokenizer.json").is_file():
        _edit(folder / "tokenizer.json", lambda data: _with_added(data, ids, special))
    if (folder / "vocab.txt").is_file():
        with (folder / "vocab.txt").open("a", encoding="utf-8") as stream:
            stream.writelines(f"{token}\n" for token in tokens)
    listed = folder / "added_tokens.json"
    if listed.is_file() or not (folder / "tokenizer.json").is_file():
        old = read_object(listed) if listed.is_file() else {}
        listed.write_text(json.dumps({**old, **ids}, ensure_ascii=False, indent=2), "utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            _edit(folder / name, lambda data, name=name: _with_names(data, ids, name, special))


def _append_pieces(path: Path, tokens: Sequence[str]) -> None:
    proto = parse_sentencepiece(path.read_bytes(), path)
    for token in tokens:
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = token, 0.0, _USER_DEFINED
    proto.trainer_spec.vocab_size = len(proto.pieces)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _with_added(data: dict[str, Any], ids: Mapping[str, int], special: bool) -> dict[str, Any]:
    entries = [
        {"id": token_id, "content": token, **_FLAGS, "special": special}
        for token, token_id in ids.items()
    ]
    model = data["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: the place in the list is the id
        vocabulary = [*vocabulary, *([token, 0.0] for token in ids)]
    else:
        # All added tokens: a loader gives one that the model does not know the next free id.
        older = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        vocabulary = {
            **vocabulary,
            **{t: i for t, i in older.items() if t not in vocabulary},
            **ids,
        }
    added = [*(data.get("added_tokens") or []), *entries]
    return {**data, "added_tokens": added, "model": {**model, "vocab": vocabulary}}


def _with_names(
    data: dict[str, Any], ids: Mapping[str, int], name: str, special: bool
) -> dict[str, Any]:
    changed = dict(data)
    if special:
        names = [*(data.get("additional_special_tokens") or []), *ids]
        changed["additional_special_tokens"] = names
    if name == "tokenizer_config.json":
        entries = {
            str(token_id): {"content": token, **_FLAGS, "special": special}
            for token, token_id in ids.items()
        }
        changed["added_tokens_decoder"] = {**(data.get("added_tokens_decoder") or {}), **entries}
    return changed


def _edit(path: Path, change: Any) -> None:
    changed = change(read_object(path))
    path.write_text(json.dumps(changed, ensure_ascii=False, indent=2), "utf-8")
