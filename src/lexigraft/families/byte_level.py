"""Byte-level BPE in a `tokenizer.json`: GPT-2, Llama 3, Qwen, SmolLM2 kinds.

The merge list is explicit: a pair is joined only if it is listed. New merges go to its end,
their tokens get ids from the highest id + 1 (added tokens counted). `vocab.json` and
`merges.txt`, where the base has them, are extended alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lexigraft.errors import LexigraftError
from lexigraft.families import copy_tokenizer
from lexigraft.families.continued_bpe import Merge, Unit
from lexigraft.families.spelling import is_joinable, letter_mask, may_join
from lexigraft.families.tokenmap import (
    CHARACTER_TO_BYTE,
    TokenMap,
    byte_text,
)
from lexigraft.files import read_json, sha256_json


class ByteLevelBPE:
    """See `lexigraft.families.Family`."""

    name = "byte-level BPE"
    implicit = False

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder = folder
        self.map = TokenMap.read(folder)
        self._data = data
        self._engine = engine_of_file(folder / "tokenizer.json")
        require_own_ids(self._engine, self.map, folder)

    @cached_property
    def content_hash(self) -> str:
        """Hash of what decides ids: vocabulary, merges, normalizer, pre-tokenizer, added tokens."""
        return content_hash(self.name, self._data)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos."""
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return [e.ids for e in self._engine.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`."""
        return str(self._engine.decode(list(ids), skip_special_tokens=skip_special))

    def start_ids(self) -> list[int]:
        """What the post-processor puts before a text."""
        return template_start(self._engine)

    def pieces(self, token: str, *, added: bool = False) -> list[int]:
        """Ids that spell `token` by the merges alone."""
        spelled = byte_text(token.encode()) if added else token
        return list(self._plain.encode(spelled, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        return self._bytes[token_id]

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {
            token_id: text.encode() if token_id in self.map.added else token_bytes(text)
            for token_id, text in self.map.texts.items()
        }

    @cached_property
    def _plain(self) -> Tokenizer:
        return open_engine(plain_model(self._data))

    def units(self, texts: Sequence[str]) -> Iterator[Unit]:
        """The stretches of `texts` in which new tokens may arise, as base tokens.

        A stretch ends where the pre-tokenizer splits, and at every token that cannot be part of
        a word. Stretches of one token have nothing to join and are left out.
        """
        for encoding in self._engine.encode_batch(list(texts), add_special_tokens=False):
            yield from self._split(encoding.ids, encoding.word_ids)

    def _split(self, ids: Iterable[int], words: Iterable[int | None]) -> Iterator[Unit]:
        unit: list[int] = []
        last_word: int | None = None
        for token_id, word in zip(ids, words, strict=True):
            if word != last_word or token_id not in self._joinable:
                yield from self._words(unit)
                unit, last_word = [], word
            if token_id in self._joinable:
                unit.append(token_id)
        yield from self._words(unit)

    def _words(self, ids: Sequence[int]) -> Iterator[Unit]:
        """`ids` without the tokens that hold a part of anything but a letter."""
        if len(ids) < 2:
            return
        spans = [self._bytes[token_id] for token_id in ids]
        letters = letter_mask(b"".join(spans))
        unit: list[str] = []
        place = 0
        for token_id, span in zip(ids, spans, strict=True):
            if all(letters[place : place + len(span)]):
                unit.append(self.map.texts[token_id])
            else:
                if len(unit) > 1:
                    yield tuple(unit)
                unit = []
            place += len(span)
        if len(unit) > 1:
            yield tuple(unit)

    @cached_property
    def _joinable(self) -> frozenset[int]:
        return frozenset(
            token_id
            for token_id, data in self._bytes.items()
            if token_id not in self.map.added and is_joinable(data)
        )

    def adoptable(self, units: Iterable[Unit]) -> Mapping[str, int]:
        """Nothing: every byte has a token here, and characters are completed by merges."""
        return {}

    def join(self, left: str, right: str) -> str | None:
        """The token of two parts, unless it is no word or the base has that text already."""
        if not may_join(_plain_bytes(left), _plain_bytes(right)):
            return None
        token = left + right
        return None if token in self.map.ids else token

    def admits(self, merges: Sequence[Merge]) -> list[Merge]:
        """All of them: with an explicit merge list no other pair can become joinable."""
        return list(merges)

    def emitted(self, merges: Sequence[Merge], stretches: Sequence[str]) -> list[list[str]]:
        """Tokens of each stretch (as `units` spells it) under the base extended by `merges`."""
        engine = open_engine(plain_model(self._extended_data(merges)))
        return [e.tokens for e in engine.encode_batch(list(stretches), add_special_tokens=False)]

    def extend(self, merges: Sequence[Merge], output: Path) -> None:
        """Write this tokenizer with `merges` appended into `output`, in each of its formats."""
        copy_tokenizer(self.folder, output)
        write_tokenizer_json(output / "tokenizer.json", self._extended_data(merges))
        first = self.map.tokens
        vocabulary = output / "vocab.json"
        if vocabulary.is_file():
            ids = read_json(vocabulary)
            ids.update({merge.token: first + place for place, merge in enumerate(merges)})
            vocabulary.write_text(json.dumps(ids, ensure_ascii=False), "utf-8")
        listed = output / "merges.txt"
        if listed.is_file():
            text = listed.read_text("utf-8")
            lines = "".join(f"{merge.left} {merge.right}\n" for merge in merges)
            listed.write_text(text + ("" if text.endswith("\n") else "\n") + lines, "utf-8")

    def engines(self) -> dict[str, Any]:
        """Every engine that reads one of the files: name -> encode of a list of texts."""
        return {"tokenizers": self.encode_batch}

    def _extended_data(self, merges: Sequence[Merge]) -> dict[str, Any]:
        pairs = [(merge.left, merge.right) for merge in merges if merge.right is not None]
        return extend_json(self._data, [merge.token for merge in merges], pairs, self.map.tokens)


def engine_of_file(path: Path) -> Tokenizer:
    """The engine of a `tokenizer.json`, without truncation and padding: those belong to a use."""
    engine = _opened(lambda: Tokenizer.from_file(str(path)))
    engine.no_truncation()
    engine.no_padding()
    return engine


def open_engine(data: Mapping[str, Any]) -> Tokenizer:
    """The engine of `tokenizer.json` data."""
    return _opened(lambda: Tokenizer.from_str(json.dumps(data, ensure_ascii=False)))


def _opened(opener: Callable[[], Tokenizer]) -> Tokenizer:
    try:
        return opener()
    except BaseException as fault:  # a panic of the native code is no Exception
        if isinstance(fault, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise LexigraftError(
            f"the tokenizers library refuses this tokenizer.json ({fault})",
            needed="a tokenizer.json that it reads",
            fix="pip install -U tokenizers, or copy the file again",
        ) from None


def require_own_ids(engine: Tokenizer, token_map: TokenMap, folder: Path) -> None:
    """Stop where the engine gives an added token another id than its file says.

    The engine appends added tokens one by one and ignores their ids, so a hole before one of
    them moves it without a word.
    """
    for token_id in sorted(token_map.added):
        text = token_map.texts[token_id]
        given = engine.token_to_id(text)
        if given is not None and given != token_id:
            raise LexigraftError(
                f"{folder}: the files give {text!r} id {token_id}, "
                f"the tokenizers library reads id {given}",
                needed="added tokens that keep their ids when the tokenizer is loaded",
                fix=f'enter "{text}": {token_id} in model.vocab of tokenizer.json',
            )


def plain_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """The BPE model alone: no normalizer, no pre-tokenizer, no added tokens, merges only."""
    bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = {**data["model"], "ignore_merges": False}
    return {"version": data.get("version", "1.0"), "added_tokens": [], **bare, "model": model}


def extend_json(
    data: Mapping[str, Any],
    tokens: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    first_id: int,
) -> dict[str, Any]:
    """`tokenizer.json` data with tokens from `first_id` on and merges at the end.

    Added tokens whose ids lie behind the model's vocabulary are entered in it under their own
    ids: a loader gives an added token that the model does not know the next free id, which the
    new tokens have just moved.
    """
    model = data["model"]
    vocabulary = dict(model["vocab"])
    for token in data.get("added_tokens") or []:
        vocabulary.setdefault(token["content"], token["id"])
    vocabulary.update({token: first_id + place for place, token in enumerate(tokens)})
    merges = list(model["merges"])
    if merges and isinstance(merges[0], str):
        merges.extend(f"{left} {right}" for left, right in pairs)
    else:
        merges.extend([left, right] for left, right in pairs)
    return {**data, "model": {**model, "vocab": vocabulary, "merges": merges}}


def write_tokenizer_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `tokenizer.json` as the tokenizers library lays it out."""
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2), "utf-8")


def content_hash(family: str, data: Mapping[str, Any]) -> str:
    """Canonical hash of a tokenizer.json: the same after it was loaded and saved again."""
    model = data["model"]
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    parts = ("normalizer", "pre_tokenizer", "decoder")
    added = sorted((token["id"], token["content"]) for token in data.get("added_tokens") or [])
    return sha256_json(
        {
            "family": family,
            "vocab": model["vocab"],
            "merges": merges,
            "ignore_merges": bool(model.get("ignore_merges")),
            "added": added,
            **{part: data.get(part) for part in parts},
        }
    )


def template_start(engine: Tokenizer) -> list[int]:
    """Ids that the post-processor puts before the first text."""
    marked = engine.encode("a")
    plain = engine.encode("a", add_special_tokens=False).ids
    for start in range(len(marked.ids) - len(plain) + 1):
        if marked.ids[start : start + len(plain)] == plain:
            return list(marked.ids[:start])
    return []


def token_bytes(text: str) -> bytes:
    """The bytes of a byte-mapped token; text outside the byte map stands for itself."""
    try:
        return _plain_bytes(text)
    except KeyError:
        return text.encode()


def _plain_bytes(text: str) -> bytes:
    return bytes(map(CHARACTER_TO_BYTE.__getitem__, text))
