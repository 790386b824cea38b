"""Which strings may become new tokens: letters of one script, no digit, whole characters.

A token is judged by its text alone, so that the same rule holds for every family.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

MAX_CHARACTERS = 32
# Written together in one word, as SentencePiece's script splitter also treats them.
_EAST_ASIAN = frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"})


@lru_cache(maxsize=65536)
def script_of(character: str) -> str | None:
    """The script of a letter or mark by its Unicode name; '' for marks, None for all else."""
    category = unicodedata.category(character)
    if category[0] == "M":
        return ""
    if category[0] != "L":
        return None
    first = unicodedata.name(character, "UNNAMED").split(" ", 1)[0]
    return "CJK" if first in _EAST_ASIAN else first


@lru_cache(maxsize=2**20)
def is_word(text: str) -> bool:
    """True for letters and marks of one script, with at most one leading space.

    >>> is_word(" angina"), is_word("冠状"), is_word("CT检"), is_word("B12"), is_word("e.g")
    (True, True, False, False, False)
    """
    body = text[1:] if text.startswith(" ") else text
    if not body or len(body) > MAX_CHARACTERS or "\ufffd" in body:
        return False
    scripts = {script_of(character) for character in body}
    return None not in scripts and len(scripts - {""}) == 1 and not is_mojibake(body)


# What U+FFFD, saved as UTF-8, becomes when it is read as GBK: in pairs, and cut in the middle.
_GBK_REPLACEMENTS = ("锟斤", "斤拷", "拷锟")


def is_mojibake(text: str) -> bool:
    """True for text that was UTF-8 and has been read in another encoding.

    Windows-1252 letters that make whole UTF-8 characters when they are written back are no word of
    any language (`Ãª` was `ê`, `Ã¼ber` was `über`).

    >>> is_mojibake("Ãªtre"), is_mojibake("锟斤拷"), is_mojibake("être"), is_mojibake("SÃO")
    (True, True, False, False)
    """
    if any(part in text for part in _GBK_REPLACEMENTS):
        return True
    if text.isascii():
        return False
    return any(_reads_as_utf8(text, encoding) for encoding in ("cp1252", "latin-1"))


def _reads_as_utf8(text: str, encoding: str) -> bool:
    try:
        return text.encode(encoding).decode("utf-8") != text
    except UnicodeError:
        return False


def character_width(lead: int) -> int:
    """Bytes of the UTF-8 character that starts with byte `lead`; 0 if none starts with it."""
    if lead < 0x80:
        return 1
    for width, low, high in ((2, 0xC2, 0xDF), (3, 0xE0, 0xEF), (4, 0xF0, 0xF4)):
        if low <= lead <= high:
            return width
    return 0


def is_character_start(data: bytes) -> bool:
    """True for the first bytes, not all, of one UTF-8 character; a space may stand before it."""
    body = data[1:] if data.startswith(b" ") else data
    return bool(body) and len(body) < character_width(body[0]) and _all_continue(body[1:])


@lru_cache(maxsize=2**12)
def is_symbol(character: str) -> bool:
    """True for one punctuation mark or symbol outside ASCII, such as `，` or `℃`.

    As a token of its own it saves a base that spells it in bytes many tokens; joined to others
    it would belong to no word. Digits of any kind, spaces and controls are none.

    >>> is_symbol("，"), is_symbol("℃"), is_symbol(","), is_symbol("①"), is_symbol("痛")
    (True, True, False, False, False)
    """
    return (
        len(character) == 1
        and character != "\ufffd"
        and not character.isascii()
        and unicodedata.category(character)[0] in "PS"
    )


def may_join(left: bytes, right: bytes) -> bool:
    """True if the two parts make a word or a symbol, or more of one unfinished character.

    Characters are completed before they are joined: what is unfinished joins its own
    continuation bytes only.
    """
    data = left + right
    try:
        text = data.decode("utf-8")
        return is_word(text) or is_symbol(text)
    except UnicodeDecodeError:
        return is_character_start(data)


_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


def _all_continue(data: bytes) -> bool:
    return not data.strip(_CONTINUATION_BYTES)
