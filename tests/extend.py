"""Extended tokenizers made without `learn`: whoever made VOCAB, graft must take it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lexigraft.families.tokenmap import SENTENCEPIECE_FILES, TOKENIZER_FILES, parse_sentencepiece


def extend(base: Path, vocab: Path, added: int, *, literal: int = 0) -> Path:
    """Copy the tokenizer of `base` to `vocab` with `added` more tokens, `literal` of them added
    tokens and the others joined out of two old ones."""
    vocab.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, vocab / name)
    models = [vocab / name for name in SENTENCEPIECE_FILES if (vocab / name).exists()]
    if models:
        (vocab / "tokenizer.json").unlink(missing_ok=True)
        _extend_sentencepiece(models[0], added)
    else:
        _extend_json(vocab / "tokenizer.json", added, literal)
    return vocab


def _extend_json(path: Path, added: int, literal: int) -> None:
    data = json.loads(path.read_text())
    model = data["model"]
    vocabulary = model["vocab"]
    words = [token for token in vocabulary if token.isalpha() and token.isascii()]
    next_id = max([*vocabulary.values(), *(t["id"] for t in data["added_tokens"])]) + 1
    # The engine numbers added tokens by itself unless the model's vocabulary holds them.
    vocabulary.update({token["content"]: token["id"] for token in data["added_tokens"]})
    pairs = ((a, b) for a in words for b in words if a + b not in vocabulary)
    for token_id in range(next_id, next_id + added - literal):
        left, right = next(pairs)
        while left + right in vocabulary:
            left, right = next(pairs)
        vocabulary[left + right] = token_id
        model["merges"].append([left, right])
    for token_id in range(next_id + added - literal, next_id + added):
        token = {"id": token_id, "content": f"<term {token_id}>", "special": False}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        data["added_tokens"].append({**token, **flags})
        vocabulary[token["content"]] = token_id
    path.write_text(json.dumps(data, ensure_ascii=False))


def _extend_sentencepiece(path: Path, added: int) -> None:
    proto = parse_sentencepiece(path.read_bytes(), path)
    pieces = [piece.piece for piece in proto.pieces]
    words = [piece for piece in pieces if piece.isalpha() and piece.isascii()]
    fresh = (a + b for a in words for b in words if a + b not in pieces)
    score = min(piece.score for piece in proto.pieces)
    for number, text in zip(range(added), fresh, strict=False):
        proto.pieces.add(piece=text, score=score - 1 - number)
    path.write_bytes(proto.SerializeToString())
