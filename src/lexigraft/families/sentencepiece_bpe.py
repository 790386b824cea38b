"""SentencePiece BPE with byte fallback: Llama 2 and Mistral kinds.

Held as `tokenizer.model`, `tokenizer.json` or both; all that the base has are extended and equal.

SentencePiece keeps no merge list: it joins any adjacent pair whose concatenation is a piece, the
piece of the best score first. Three things follow.

- New pieces score below every old one, whitespace runs (-1e9 in Llama 2) included, each one
  float32 step below the last: then every text is segmented as before and only then coarsened.
- `tokenizer.json`, whose merge list is explicit, needs every split of a new piece into two
  pieces, in the order of the scores.
- A new piece must not be what a base piece that was never formed waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.unknown_fields import UnknownFieldSet
from tokenizers import Tokenizer

from lexigraft.families import copy_tokenizer
from lexigraft.families.byte_level import (
    content_hash,
    engine_of_file,
    extend_json,
    open_engine,
    plain_model,
    require_own_ids,
    template_start,
    write_tokenizer_json,
)
from lexigraft.families.continued_bpe import Merge, Unit
from lexigraft.families.spelling import is_joinable, is_word, script_of
from lexigraft.families.tokenmap import TokenMap, parse_sentencepiece
from lexigraft.files import read_json, sha256_bytes, sha256_json

SPACE = "\u2581"
# sentencepiece_model.proto, ModelProto.SentencePiece.Type
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
_SELF_TEST_FIELD = 4  # ModelProto.self_test_data
_BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}


class SentencePieceBPE:
    """See `lexigraft.families.Family`."""

    name = "SentencePiece BPE"
    implicit = True

    def __init__(
        self, folder: Path, *, model_file: Path | None, data: dict[str, Any] | None
    ) -> None:
        self.folder = folder
        self.map = TokenMap.read(folder)
        self._data = data
        self._engine = engine_of_file(folder / "tokenizer.json") if data else None
        if self._engine is not None:
            require_own_ids(self._engine, self.map, folder)
        self._model_name = model_file.name if model_file else None
        self._proto: Any = None
        self._processor: sentencepiece.SentencePieceProcessor | None = None
        if model_file:
            self._proto = parse_sentencepiece(model_file.read_bytes(), model_file)
            self._processor = _processor(self._proto)

    @cached_property
    def content_hash(self) -> str:
        """Hash of what decides ids, over each format that the folder holds."""
        parts = {}
        if self._data:
            parts["tokenizer.json"] = content_hash(self.name, self._data)
        if self._proto is not None:
            pieces = [[p.piece, p.score, p.type] for p in self._proto.pieces]
            normalizer = sha256_bytes(self._proto.normalizer_spec.SerializeToString())
            parts["tokenizer.model"] = sha256_json([pieces, normalizer])
        return sha256_json(parts)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, by the engine that transformers uses where both files are there."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        if self._engine is not None:
            batch = self._engine.encode_batch(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in batch]
        return self._sentencepiece_encode(texts)

    def _sentencepiece_encode(self, texts: Sequence[str]) -> list[list[int]]:
        assert self._processor is not None
        encoded: list[list[int]] = self._processor.encode(list(texts))
        return encoded

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`."""
        if self._engine is not None:
            return str(self._engine.decode(list(ids), skip_special_tokens=skip_special))
        assert self._processor is not None
        kept = [i for i in ids if not (skip_special and i in self.map.special)]
        return str(self._processor.decode(kept))

    def start_ids(self) -> list[int]:
        """bos where the template or the config asks for it."""
        if self._engine is not None:
            return template_start(self._engine)
        path = self.folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        bos = self._proto.trainer_spec.bos_id
        return [bos] if config.get("add_bos_token", True) and bos >= 0 else []

    def pieces(self, token: str, *, added: bool = False) -> list[int]:
        """Ids that spell `token`, without prefix, normalizer and added tokens."""
        spelled = token.replace(" ", SPACE) if added else token
        if self._plain_processor is not None:
            encoded: list[int] = self._plain_processor.encode(spelled)
            return encoded
        return list(self._plain_engine.encode(spelled, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; `▁` is a space, `<0xE6>` a byte."""
        text = self.map.texts[token_id]
        if text in _BYTE_PIECES:
            return bytes([_BYTE_PIECES[text]])
        return text.encode() if token_id in self.map.added else _spaced(text).encode()

    @cached_property
    def _plain_processor(self) -> sentencepiece.SentencePieceProcessor | None:
        return _processor(_without_prefix(self._proto)) if self._proto is not None else None

    @cached_property
    def _plain_engine(self) -> Tokenizer:
        assert self._data is not None
        return open_engine(plain_model(self._data))

    def units(self, texts: Sequence[str]) -> Iterator[Unit]:
        """The stretches of `texts` in which new tokens may arise, as base tokens.

        A stretch ends before `▁` and at every token that cannot be part of a word. A letter that
        the base spells in bytes stands as itself.
        """
        for ids in self.encode_batch(texts):
            unit: list[str] = []
            for symbol in self._symbols(ids):
                if symbol is None or symbol.startswith(SPACE):
                    if _is_unit(unit):
                        yield tuple(unit)
                    unit = []
                if symbol is not None:
                    unit.append(symbol)
            if _is_unit(unit):
                yield tuple(unit)

    def _symbols(self, ids: Iterable[int]) -> Iterator[str | None]:
        """Token texts, letters out of byte tokens, None for what ends a stretch."""
        spelled = bytearray()
        for token_id in ids:
            text = self.map.texts[token_id]
            if text in _BYTE_PIECES:
                spelled.append(_BYTE_PIECES[text])
                continue
            if spelled:
                yield from _letters(bytes(spelled))
                spelled.clear()
            yield text if token_id in self._joinable else None
        if spelled:
            yield from _letters(bytes(spelled))

    @cached_property
    def _joinable(self) -> frozenset[int]:
        return frozenset(
            token_id
            for token_id, text in self.map.texts.items()
            if token_id not in self.map.added
            and token_id not in self.map.special
            and text not in _BYTE_PIECES
            and is_joinable(_spaced(text).encode())
        )

    def adoptable(self, units: Iterable[Unit]) -> Mapping[str, int]:
        """Letters without a piece -> the bytes that spell each now."""
        return {
            symbol: len(symbol.encode())
            for unit in units
            for symbol in unit
            if symbol not in self.map.ids
        }

    def join(self, left: str, right: str) -> str | None:
        """The piece of two parts, unless it is no word, known, or awaited by a dead base piece."""
        token = left + right
        if not is_word(_spaced(token)) or token in self.map.ids or token in self._awaited:
            return None
        return token

    @cached_property
    def _awaited(self) -> frozenset[str]:
        """Every beginning and end of a base piece that the base itself never forms.

        Were such a string a piece, the dead base piece could be formed by it: a base token
        would appear in texts where it never did.
        """
        living = [
            (token_id, text)
            for token_id, text in self.map.texts.items()
            if token_id in self._joinable
        ]
        dead = [text for token_id, text in living if self.pieces(text) != [token_id]]
        return frozenset(
            part
            for text in dead
            for cut in range(1, len(text))
            for part in (text[:cut], text[cut:])
        )

    def admits(self, merges: Sequence[Merge]) -> list[Merge]:
        """`merges` without those that the two engines could join in a different order.

        Where a piece has two splits X+Y and Y+Z, SentencePiece joins the left pair of X Y Z
        first and a merge list the pair listed first.
        """
        kept = list(merges)
        while True:
            known = self.map.ids.keys() | {merge.token for merge in kept}
            good = [merge for merge in kept if not _is_ambiguous(merge.token, known)]
            if len(good) == len(kept):
                return kept
            kept = good

    def emitted(self, merges: Sequence[Merge], stretches: Sequence[str]) -> list[list[str]]:
        """Tokens of each stretch (as `units` spells it) under the base extended by `merges`."""
        if self._proto is not None:
            processor = _processor(_without_prefix(self._extended_proto(merges)))
            tokens: list[list[str]] = processor.encode(list(stretches), out_type=str)
            return tokens
        engine = open_engine(plain_model(self._extended_data(merges)))
        return [e.tokens for e in engine.encode_batch(list(stretches), add_special_tokens=False)]

    def extend(self, merges: Sequence[Merge], output: Path) -> None:
        """Write this tokenizer with `merges` appended into `output`, in each of its formats."""
        copy_tokenizer(self.folder, output)
        if self._model_name is not None:
            serialized = self._extended_proto(merges).SerializeToString(deterministic=True)
            (output / self._model_name).write_bytes(serialized)
        if self._data is not None:
            write_tokenizer_json(output / "tokenizer.json", self._extended_data(merges))

    def engines(self) -> dict[str, Any]:
        """Every engine that reads one of the files: name -> encode of a list of texts."""
        readers: dict[str, Any] = {}
        if self._engine is not None:
            readers["tokenizers"] = self.encode_batch
        if self._processor is not None:
            readers["sentencepiece"] = self._sentencepiece_encode
        return readers

    def _extended_proto(self, merges: Sequence[Merge]) -> Any:
        proto = _copy(self._proto)
        # Ids behind the model belong to added tokens: pieces of the same text keep them there.
        for token_id in range(len(proto.pieces), self.map.tokens):
            text = self.map.texts.get(token_id)
            piece = proto.pieces.add()
            piece.piece = text if text is not None else f"<unused_{token_id}>"
            piece.score, piece.type = 0.0, _UNUSED if text is None else _USER_DEFINED
        score = np.float32(min(p.score for p in self._proto.pieces))
        for merge in merges:
            score = np.nextafter(score, np.float32(-np.inf), dtype=np.float32)
            piece = proto.pieces.add()
            piece.piece, piece.score, piece.type = merge.token, float(score), _NORMAL
        proto.trainer_spec.vocab_size = len(proto.pieces)
        return _without_self_test(proto)

    def _extended_data(self, merges: Sequence[Merge]) -> dict[str, Any]:
        assert self._data is not None
        tokens = [merge.token for merge in merges]
        first = self.map.tokens
        ids = {**self.map.ids, **{token: first + place for place, token in enumerate(tokens)}}
        pairs = [
            pair
            for token in tokens
            for pair in sorted(splits(token, ids.keys()), key=lambda p: (ids[p[0]], ids[p[1]]))
        ]
        return extend_json(self._data, tokens, pairs, first)


def splits(token: str, known: Iterable[str]) -> list[tuple[str, str]]:
    """Every way to cut `token` into two known pieces."""
    cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in known and right in known]


def _is_ambiguous(token: str, known: Iterable[str]) -> bool:
    pairs = splits(token, known)
    lefts = dict(pairs)
    return any(right in lefts and (right, lefts[right]) != (left, right) for left, right in pairs)


def _letters(data: bytes) -> Iterator[str | None]:
    for character in data.decode("utf-8", "replace"):
        yield character if script_of(character) is not None else None


def _is_unit(unit: Sequence[str]) -> bool:
    """A stretch with something to join, or a letter to adopt."""
    return len(unit) > 1 or (len(unit) == 1 and len(unit[0]) == 1 and unit[0] != SPACE)


def _spaced(text: str) -> str:
    return text.replace(SPACE, " ")


def _processor(proto: Any) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def _copy(proto: Any) -> Any:
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy


def _without_prefix(proto: Any) -> Any:
    """The model as it joins symbols: text in, no dummy prefix, nothing normalised away."""
    plain = _copy(proto)
    plain.normalizer_spec.add_dummy_prefix = False
    plain.normalizer_spec.remove_extra_whitespaces = False
    return _without_self_test(plain)


def _without_self_test(proto: Any) -> Any:
    """Drop the stored samples of text and ids, which the engine verifies at loading.

    They hold the old segmentation. The Python classes of the format do not know the field, so
    it can only go with the other unknown fields; models without it keep those.
    """
    if any(unknown.field_number == _SELF_TEST_FIELD for unknown in UnknownFieldSet(proto)):
        proto.DiscardUnknownFields()
    return proto
