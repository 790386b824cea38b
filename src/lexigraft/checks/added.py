"""Added and special tokens: will loaders give them the ids and the meaning that the files say?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Finding, finding
from lexigraft.errors import LexigraftError
from lexigraft.families.tokenmap import token_text, tokenizer_data
from lexigraft.files import read_json

FAST, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
# transformers 5 builds these from vocabulary and merges, and adds what added_tokens_decoder lists
# (seen with 5.24): an added token that the list lacks is read as plain text.
_BUILT_ANEW = ("Qwen2Tokenizer", "GPT2Tokenizer")
_MARKER = re.compile(r"<[|｜][\w▁.-]{1,60}[|｜]>")


def added_findings(facts: Facts) -> Iterator[Finding]:
    """Faults of added and special tokens, of what a folder's settings and templates name."""
    if facts.tokens is None:
        return
    if FAST in facts.maps:
        data = tokenizer_data(facts.folder / FAST)
        yield from _other_ids(facts, data)
        yield from _unlisted(facts, data)
        yield from _mislabelled(facts, data)
    yield from _special_words(facts)
    yield from _unknown_roles(facts)
    yield from _template(facts)


def _other_ids(facts: Facts, data: Any) -> Iterator[Finding]:
    """Loaders number added tokens anew, from the end of the vocabulary, without a hole."""
    vocabulary = data["model"]["vocab"]
    known = (
        vocabulary if isinstance(vocabulary, dict) else {p[0]: i for i, p in enumerate(vocabulary)}
    )
    following = len(known)
    for token in sorted(data.get("added_tokens") or [], key=lambda token: int(token["id"])):
        text, stated = token["content"], token["id"]
        given = known.get(text, following)
        following = max(following, given + 1)
        if given != stated:
            yield finding(
                "LG110",
                FAST,
                f"gives {text!r} the id {stated}, loaders will give it {given}: "
                + (
                    "it is a token of the vocabulary under that id"
                    if text in known
                    else f"the vocabulary has {len(known):,} tokens, and added tokens follow it"
                ),
                needed="added tokens that follow the vocabulary one after another",
                fix=f"copy {FAST} again from the model, or fill the hole with named tokens",
                text=repr(text),
                id=stated,
                given=given,
            )
            return


def _unlisted(facts: Facts, data: Any) -> Iterator[Finding]:
    settings = facts.config.get(SETTINGS, {})
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    listed = facts.maps.get(SETTINGS)
    if kind not in _BUILT_ANEW or listed is None:
        return
    vocabulary = data["model"]["vocab"]
    lost = [
        token
        for token in data.get("added_tokens") or []
        if token["id"] not in listed.texts and token["content"] not in vocabulary
    ]
    if lost:
        yield finding(
            "LG107",
            SETTINGS,
            f"added_tokens_decoder lacks {len(lost)} added tokens of {FAST}, the first is "
            f"{lost[0]['content']!r} (id {lost[0]['id']}): transformers' {kind} reads them as "
            "plain text",
            needed="every added token in both files",
            fix=f"set tokenizer_class to PreTrainedTokenizerFast in {facts.folder / SETTINGS}, or "
            "save the tokenizer with save_pretrained",
            count=len(lost),
            file=FAST,
            text=repr(lost[0]["content"]),
            id=lost[0]["id"],
            kind=kind,
        )


def _mislabelled(facts: Facts, data: Any) -> Iterator[Finding]:
    kind = str(facts.config.get(SETTINGS, {}).get("tokenizer_class"))
    if kind in ("LlamaTokenizer", "LlamaTokenizerFast") and _holds_type(data, "ByteLevel"):
        yield finding(
            "LG109",
            SETTINGS,
            f"says tokenizer_class = {kind}, but {FAST} is a byte-level tokenizer",
            needed="PreTrainedTokenizerFast",
            fix=f"set tokenizer_class to PreTrainedTokenizerFast in {facts.folder / SETTINGS}",
            kind=kind,
            file=FAST,
        )


def _holds_type(data: Any, wanted: str) -> bool:
    """True if the pre-tokenizer or the decoder is, or has a part, of that type."""
    for key in ("pre_tokenizer", "decoder"):
        outer = data.get(key)
        inner = (
            outer.get("pretokenizers") or outer.get("decoders") if isinstance(outer, dict) else []
        )
        parts = [outer, *(inner if isinstance(inner, list) else [])]
        if any(isinstance(part, dict) and part.get("type") == wanted for part in parts):
            return True
    return False


def _special_words(facts: Facts) -> Iterator[Finding]:
    """Special tokens that are spelled like words: decoding leaves them out."""
    tokens = facts.tokens
    if tokens is None:
        return
    roles = {text for _, text in _named(facts.config.get(SETTINGS, {}))}
    words = [
        tokens.texts[i]
        for i in sorted(tokens.special & tokens.added)
        if len(tokens.texts[i].strip()) > 1
        and tokens.texts[i].strip().isalpha()
        and tokens.texts[i] not in roles
    ]
    if words:
        yield finding(
            "LG108",
            FAST if FAST in facts.maps else SETTINGS,
            f"{len(words):,} special tokens are words, the first is {words[0]!r}: "
            "skip_special_tokens=True leaves them out of every text that is decoded",
            needed='"special": false for words',
            fix="lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
            count=len(words),
            text=repr(words[0]),
        )


def _named(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, text) of the special tokens that tokenizer_config.json names by their role."""
    for key in ROLES:
        text = token_text(settings.get(key))
        if text:
            yield key, text


def _unknown_roles(facts: Facts) -> Iterator[Finding]:
    ids = facts.tokens.ids if facts.tokens else {}
    for key, text in _named(facts.config.get(SETTINGS, {})):
        if text not in ids:
            tokens = len(ids)
            yield finding(
                "LG112",
                SETTINGS,
                f"names {text!r} as {key}, which no tokenizer file has: loaders add it as a token "
                f"behind the {tokens:,} others",
                needed=f"a token of the vocabulary as {key}",
                fix=f"set {key} in {facts.folder / SETTINGS} to one, or lexigraft learn BASE "
                "--corpus TEXT --special LIST -o VOCAB",
                text=repr(text),
                key=key,
                tokens=tokens,
            )
            return


def _template(facts: Facts) -> Iterator[Finding]:
    for where, text in templates(facts):
        markers = sorted(set(_MARKER.findall(text)))
        ids = facts.tokens.ids if facts.tokens else {}
        lost = [marker for marker in markers if marker not in ids]
        if lost:
            some = len(lost) < len(markers)
            yield finding(
                "LG111" if some else "LG113",
                where,
                f"writes {lost[0]}, which is no token of the tokenizer"
                + (f", as {len(lost) - 1} others" if len(lost) > 1 else "")
                + ": it is read in pieces",
                needed="markers that are tokens" if some else "",
                fix="copy the template and the tokenizer from one model" if some else "",
                text=lost[0],
                count=len(lost),
            )
            return


def templates(facts: Facts) -> Iterator[tuple[str, str]]:
    """Each chat template of a folder, with the file that holds it."""
    own = facts.config.get(SETTINGS, {}).get("chat_template")
    for part in own if isinstance(own, list) else [own]:
        text = part.get("template") if isinstance(part, dict) else part
        if isinstance(text, str):
            yield SETTINGS, text
    for name in TEMPLATES:
        path = facts.folder / name
        if not path.is_file():
            continue
        if name.endswith(".jinja"):
            yield name, path.read_text("utf-8", errors="replace")
            continue
        try:
            content = read_json(path)
        except LexigraftError:
            continue
        text = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(text, str):
            yield name, text
