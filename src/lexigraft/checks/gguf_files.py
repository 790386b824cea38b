"""A GGUF file: do its tables, its token list and its special ids fit together?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lexigraft.checkpoints.gguf_header import GgufHeader
from lexigraft.checks.findings import Finding, finding
from lexigraft.families.tokenmap import TokenMap

TOKENS = "tokenizer.ggml.tokens"
TABLES = ("token_embd.weight", "output.weight")
# llama_token_type of llama.cpp's include/llama.h
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_CONVERT = "python convert_hf_to_gguf.py MODEL"


def token_map(header: GgufHeader) -> TokenMap:
    """What a GGUF file's ids mean, without those that only stand for a row (`[PAD7]`, unused)."""
    texts, kinds = header.texts(TOKENS), header.numbers("tokenizer.ggml.token_type")
    kinds = kinds if len(kinds) == len(texts) else [NORMAL] * len(texts)
    named = {i: text for i, text in enumerate(texts) if kinds[i] != UNUSED or text != f"[PAD{i}]"}
    return TokenMap(
        named,
        frozenset(i for i in named if kinds[i] == USER_DEFINED),
        frozenset(i for i in named if kinds[i] in (UNKNOWN, CONTROL)),
    )


def gguf_rows(header: GgufHeader) -> dict[str, int]:
    """Rows of the vocabulary tables that the file holds."""
    tables = ((name, header.tensors.get(name)) for name in TABLES)
    return {name: tensor.shape[0] for name, tensor in tables if tensor and tensor.shape}


def gguf_findings(header: GgufHeader) -> Iterator[Finding]:
    """Faults for which llama.cpp refuses a file, or reads other words than were meant."""
    texts = header.texts(TOKENS)
    if not texts:
        yield finding(
            "LG802",
            TOKENS,
            "is missing: the file holds no tokenizer",
            needed="a token for every row",
            fix=f"{_CONVERT}, without --no-vocab",
        )
        return
    yield from _rows(header, len(texts))
    yield from _lists(header, len(texts))
    yield from _ids(header, len(texts))
    yield from _twice(texts)


def _rows(header: GgufHeader, tokens: int) -> Iterator[Finding]:
    for name, rows in gguf_rows(header).items():
        if rows != tokens:
            yield finding(
                "LG802",
                name,
                f"has {rows:,} rows, the file's token list {tokens:,}",
                needed="one row for each entry of the list; the converter names padding [PAD7]",
                fix=f"lexigraft check MODEL --for gguf, mend it, and {_CONVERT}",
            )
            return


def _lists(header: GgufHeader, tokens: int) -> Iterator[Finding]:
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if key in header.metadata and len(header.numbers(key)) != tokens:
            yield finding(
                "LG803",
                key,
                f"has {len(header.numbers(key)):,} numbers for {tokens:,} tokens",
                needed="one for each token",
                fix=_CONVERT,
            )


def _ids(header: GgufHeader, tokens: int) -> Iterator[Finding]:
    for key, value in sorted(header.metadata.items()):
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            if not isinstance(value, int) or isinstance(value, bool) or 0 <= value < tokens:
                continue
            yield finding(
                "LG804",
                key,
                f"= {value:,}, but the token list ends at {tokens - 1:,}",
                needed="an id of the token list",
                fix=f"gguf-set-metadata {header.path.name} {key} ID",
            )


def _twice(texts: list[str]) -> Iterator[Finding]:
    double = [text for text, count in Counter(texts).items() if count > 1 and text]
    if double:
        first = texts.index(double[0])
        second = texts.index(double[0], first + 1)
        yield finding(
            "LG805",
            TOKENS,
            f"gives {double[0]!r} the ids {first} and {second}"
            + (f", and {len(double) - 1} others two" if len(double) > 1 else ""),
            needed="each text once",
            fix=f"mend the tokenizer of the model, and {_CONVERT}",
        )
