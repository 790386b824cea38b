"""What the SentencePiece kinds share: models of its format, and text from inside a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.unknown_fields import UnknownFieldSet
from tokenizers import Tokenizer

from lexigraft.families import copy_tokenizer
from lexigraft.families.byte_level import (
    engine_of_file,
    open_engine,
    require_own_ids,
    write_tokenizer_json,
)
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.layouts import layout_of
from lexigraft.families.renumbering import renumber_settings, renumbered_json, renumbered_pieces
from lexigraft.families.tokenmap import TokenMap, parse_sentencepiece

SPACE = "\u2581"
# sentencepiece_model.proto, ModelProto.SentencePiece.Type
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_SELF_TEST_FIELD = 4  # ModelProto.self_test_data
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def spaced(text: str) -> str:
    """The text that a piece stands for."""
    return text.replace(SPACE, " ")


def processor_of(proto: Any) -> sentencepiece.SentencePieceProcessor:
    """The engine of a model."""
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def copy_of(proto: Any) -> Any:
    """A model that may be changed."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy


def without_prefix(proto: Any) -> Any:
    """The model for text from inside a text: its spaces stay, and none is put before it."""
    inner = copy_of(proto)
    inner.normalizer_spec.add_dummy_prefix = False
    inner.normalizer_spec.remove_extra_whitespaces = False
    return without_self_test(inner)


def without_self_test(proto: Any) -> Any:
    """Drop the stored samples of text and ids, which the engine verifies at loading.

    They hold the old segmentation. The Python classes of the format do not know the field, so
    it can only go with the other unknown fields; models without it keep those.
    """
    if any(unknown.field_number == _SELF_TEST_FIELD for unknown in UnknownFieldSet(proto)):
        proto.DiscardUnknownFields()
    return proto


def inside(data: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` data for text from inside a text: normalised and split as there.

    Only what an engine does at the ends of a text is left out: the `▁` before it, and spaces
    that are cut off. WhitespaceSplit takes the spaces away, and Metaspace gives each word its
    `▁` back: a stretch that begins within a word would get one too. So the spaces stay here.
    """
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    normalizers = [
        step
        for step in _steps(data.get("normalizer"), "normalizers")
        if step["type"] not in ("Prepend", "Strip")
    ]
    if any(step["type"] == "WhitespaceSplit" for step in steps):
        steps = [step for step in steps if step["type"] != "WhitespaceSplit"]
        normalizers.append({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "})
    return {
        **data,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": (
            {"type": "Sequence", "pretokenizers": [_without_mark(step) for step in steps]}
            if steps
            else None
        ),
        "post_processor": None,
    }


def splits_words(data: Mapping[str, Any]) -> bool:
    """True where the pre-tokenizer may split elsewhere than at spaces."""
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] not in ("Metaspace", "WhitespaceSplit") for step in steps)


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences within sequences laid out."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[key] for step in _steps(inner, key)]


def _without_mark(step: dict[str, Any]) -> dict[str, Any]:
    if step["type"] != "Metaspace":
        return step
    older = {"add_prefix_space": False} if "add_prefix_space" in step else {}
    return {**step, **older, "prepend_scheme": "never"}


class SentencePieceFiles(ABC):
    """What the families held as `.model`, `tokenizer.json` or both do alike."""

    vacant: tuple[int, ...] = ()

    def __init__(
        self, folder: Path, *, model_file: Path | None, data: dict[str, Any] | None
    ) -> None:
        self.folder = folder
        self.map = TokenMap.read(folder)
        self._data = data
        self._engine = engine_of_file(folder / "tokenizer.json") if data else None
        if self._engine is not None:
            require_own_ids(self._engine.token_to_id, self.map, folder)
        self._model_name = model_file.name if model_file else None
        self._proto: Any = None
        if model_file:
            self._proto = parse_sentencepiece(model_file.read_bytes(), model_file)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, by the engine that transformers uses where both files are there."""

    @abstractmethod
    def _extended_proto(self, merges: Sequence[Merge]) -> Any:
        """The `.model` with `merges` appended."""

    @abstractmethod
    def _extended_data(self, merges: Sequence[Merge]) -> dict[str, Any]:
        """The `tokenizer.json` data with `merges` appended."""

    def extend(self, merges: Sequence[Merge], output: Path) -> None:
        """Write this tokenizer with `merges` appended into `output`, in each of its formats."""
        copy_tokenizer(self.folder, output)
        if self._model_name is not None:
            serialized = self._extended_proto(merges).SerializeToString(deterministic=True)
            (output / self._model_name).write_bytes(serialized)
        if self._data is not None:
            write_tokenizer_json(output / "tokenizer.json", self._extended_data(merges))

    def renumber(self, places: Mapping[int, int], output: Path) -> None:
        """Write the tokens of `places` alone, under their new ids, in each format."""
        copy_tokenizer(self.folder, output)
        renumber_settings(output, places)
        if self._model_name is not None:
            path = self.folder / self._model_name
            proto = parse_sentencepiece(path.read_bytes(), path)
            layout = layout_of(self.folder)
            ids = self._ids_in_file(len(proto.pieces))
            renumbered_pieces(proto, ids, places, head=len(layout.head), skip=layout.skip)
            serialized = without_self_test(proto).SerializeToString(deterministic=True)
            (output / self._model_name).write_bytes(serialized)
        if self._data is not None:
            write_tokenizer_json(output / "tokenizer.json", renumbered_json(self._data, places))

    def _ids_in_file(self, pieces: int) -> Sequence[int]:
        """Place of each piece in the `.model` -> its id."""
        return range(pieces)

    @property
    def fixed(self) -> frozenset[int]:
        """Added, control and user-defined tokens, and bytes."""
        found = {i for i, text in self.map.texts.items() if text in BYTE_PIECES}
        if self._proto is not None:
            ids = self._ids_in_file(len(self._proto.pieces))
            found |= {
                token_id
                for token_id, piece in zip(ids, self._proto.pieces, strict=True)
                if piece.type not in (NORMAL, UNUSED)
            }
        return frozenset(found | self.map.added | self.map.special)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without the tokens that a template adds."""
        return self.encode_batch([text])[0]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; `▁` is a space, `<0xE6>` a byte."""
        text = self.map.texts[token_id]
        if text in BYTE_PIECES:
            return bytes([BYTE_PIECES[text]])
        return text.encode() if token_id in self.map.added else spaced(text).encode()

    @cached_property
    def prefix(self) -> str:
        """What the engine puts before a text: a space, or nothing."""
        ids = self.encode("a")
        return " " if ids and self.token_bytes(ids[0]).startswith(b" ") else ""

    @cached_property
    def _inner_engine(self) -> Tokenizer:
        """The engine of `tokenizer.json` for text from inside a text."""
        assert self._data is not None
        return open_engine(inside(self._data))
