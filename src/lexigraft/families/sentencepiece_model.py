"""What the SentencePiece kinds share: models of its format, and text from inside a text."""

from __future__ import annotations

from collections.abc import Mapping
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
