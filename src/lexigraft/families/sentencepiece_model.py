"""What the SentencePiece kinds share: models of its format, and text from inside a text."""

from __future__ import annotations

from typing import Any

import sentencepiece
from google.protobuf.unknown_fields import UnknownFieldSet

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
