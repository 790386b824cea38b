"""tiktoken rank files: Llama 3's `tokenizer.model`, Qwen's `qwen.tiktoken`, cl100k, o200k.

tiktoken keeps no merge list: inside a piece of text it joins the adjacent pair whose
concatenation has the lowest rank, and a piece that is a token is emitted at once
(openai/tiktoken, src/lib.rs). Ranks are the ids. Four things follow.

- New tokens get ranks above every old one, and above the special tokens; gaps are allowed.
- A new token must not be what a base token that is never formed waits for.
- A `tokenizer.json` beside the ranks, whose merge list is explicit, needs every split of a new
  token into two tokens, in the order of the ranks.
- A token is written only if the ranks themselves form it out of its own bytes: then it comes out
  inside a piece as well as where it is a whole one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer

from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.byte_level import (
    ByteLevelBPE,
    content_hash,
    open_engine,
    plain_model,
    write_tokenizer_json,
)
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.gpt2_files import (
    BYTE_LEVEL,
    added_token,
    bpe_model,
    split_then_bytes,
)
from lexigraft.families.implicit import (
    beginnings_and_ends,
    formed_alike,
    last_pair,
    ordered_splits,
)
from lexigraft.families.rank_files import (
    GPT2_PATTERN,
    Published,
    known_ranks,
    rank_lines,
)
from lexigraft.families.renumbering import Needs, joined_needs, needs_by_rank, renumbered_json
from lexigraft.families.tokenmap import CHARACTER_TO_BYTE, TokenMap, byte_text
from lexigraft.files import read_settings, sha256_json, write_json


class TiktokenBPE(ByteLevelBPE):
    """See `lexigraft.families.Family`."""

    name = "tiktoken BPE"
    implicit = True
    guaranteed = True
    unknown_id = None

    def __init__(self, folder: Path, rank_file: Path, data: dict[str, Any] | None) -> None:
        self._rank_file = rank_file
        try:
            self._ranks, self._published = known_ranks(rank_file.read_bytes())
        except ValueError as fault:
            raise LexigraftError(
                f"{rank_file} is no rank file ({fault})",
                needed="lines of `base64 rank`",
                fix="download this file again",
            ) from None
        _require_bytes(self._ranks, rank_file)
        self._has_json = data is not None
        self._pattern, self._composed = self._reading(data)
        super().__init__(folder, data if data is not None else self._converted(folder))
        self._encoding = tiktoken.Encoding(
            rank_file.stem,
            pat_str=self._pattern,
            mergeable_ranks=self._ranks,
            special_tokens={self.map.texts[token_id]: token_id for token_id in self._special_ids},
        )

    def _reading(self, data: dict[str, Any] | None) -> tuple[str, bool]:
        """The split pattern, and whether texts are composed (NFC) before they are split."""
        if self._published is not None:
            return self._published.pattern, self._published.composed
        pattern = split_pattern(data.get("pre_tokenizer")) if data else None
        normalizer = (data or {}).get("normalizer")
        if pattern is None or normalizer not in (None, {"type": "NFC"}):
            raise LexigraftError(
                f"{self._rank_file} holds the ranks of no published tokenizer that is known here"
                + (", and tokenizer.json beside it splits texts in steps" if data else ""),
                needed="the split pattern and the special tokens, which a rank file does not hold",
                fix="copy the tokenizer.json of this model beside it, or, if that is there, move "
                f"{self._rank_file.name} away and extend tokenizer.json alone",
            )
        return pattern, normalizer is not None

    def _converted(self, folder: Path) -> dict[str, Any]:
        assert self._published is not None
        token_map = TokenMap.read(folder)
        specials = {token_map.texts[i]: i for i in sorted(token_map.added)}
        return converted(self._ranks, self._published, specials)

    @property
    def _special_ids(self) -> list[int]:
        return sorted(set(self.map.added) - set(self._ranks.values()))

    @cached_property
    def content_hash(self) -> str:
        """Hash of what decides ids: ranks, pattern, special tokens, tokenizer.json if there."""
        specials = [[i, self.map.texts[i]] for i in self._special_ids]
        ranks = rank_lines(self._ranks).decode("ascii")
        parts = [self.name, self._pattern, self._composed, ranks, specials]
        if self._has_json:
            parts.append(content_hash(self.name, self._data))
        return sha256_json(parts)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, by the engine that transformers uses where tokenizer.json is there."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return super().encode_batch(texts) if self._has_json else self._tiktoken_encode(texts)

    def _tiktoken_encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._composed:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        try:
            return list(self._encoding.encode_batch(list(texts), allowed_special="all"))
        except ValueError:
            # Its regex engine gives up on some 100,000 spaces in a row (openai/tiktoken#195).
            return [self._tiktoken_encode_one(text) for text in texts]

    def _tiktoken_encode_one(self, text: str) -> list[int]:
        try:
            return list(self._encoding.encode(text, allowed_special="all"))
        except ValueError:
            return super().encode_batch([text])[0]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`."""
        if self._has_json:
            return super().decode(ids, skip_special=skip_special)
        return self._encoding.decode([i for i in ids if not (skip_special and i in self._specials)])

    @cached_property
    def _specials(self) -> frozenset[int]:
        return frozenset(self._special_ids) & self.map.special

    def start_ids(self) -> list[int]:
        """What the template, or the published reader of the ranks, puts before a text."""
        if self._has_json or self._published is None:
            return super().start_ids()
        return [self._published.specials[token] for token in self._published.start]

    def join(self, left: str, right: str) -> str | None:
        """The token of two parts, unless it is no word, known, or awaited by a dead base token."""
        token = super().join(left, right)
        return None if token in self._awaited else token

    @cached_property
    def _awaited(self) -> frozenset[str]:
        """Every beginning and end of a base token that the ranks themselves never form."""
        texts = [byte_text(token) for token in self._ranks]
        formed = self._formed.encode_batch(texts, add_special_tokens=False)
        dead = [text for text, e in zip(texts, formed, strict=True) if e.tokens != [text]]
        return beginnings_and_ends(dead)

    @cached_property
    def _formed(self) -> Tokenizer:
        """The ranks as a merge list, without the short cut for whole pieces."""
        if not self._has_json:
            return self._plain
        vocabulary = {byte_text(token): rank for token, rank in self._ranks.items()}
        return open_engine(plain_model({"model": bpe_model(vocabulary, all_splits(vocabulary))}))

    def admits(self, merges: Sequence[Merge]) -> list[Merge]:
        """`merges` that ranks and a merge list form alike, each with the parts it is made of."""
        return formed_alike(merges, self.map.ids, self._derived)

    def _derived(self, merges: Sequence[Merge]) -> Iterable[Merge]:
        places = {merge.token: place for place, merge in enumerate(merges)}
        starts = self._formed.encode_batch(
            [merge.token for merge in merges], add_special_tokens=False
        )
        for merge, start in zip(merges, starts, strict=True):
            parts = last_pair(start.tokens, places, merge.token)
            if parts is not None:
                yield merge._replace(left=parts[0], right=parts[1])

    def needs(self) -> Needs:
        """By the ranks, and by the merges of tokenizer.json where they are others."""
        found = super().needs()
        if not self._has_json:  # its merges were made of the ranks
            return found
        ids = {byte_text(token): rank for token, rank in self._ranks.items()}
        read = self._formed.encode_batch(list(ids), add_special_tokens=False)
        return joined_needs(found, needs_by_rank(ids, (e.ids for e in read), ids))

    def renumber(self, places: Mapping[int, int], output: Path) -> None:
        """Write the tokens of `places` alone; a lone rank file gets a tokenizer.json beside it.

        Its own readers know the special tokens by fixed ids, or the whole file by its hash.
        """
        ranks = {token: places[rank] for token, rank in self._ranks.items() if rank in places}
        in_order = [ranks[token] for token in sorted(ranks, key=self._ranks.__getitem__)]
        if in_order != sorted(in_order):
            raise RefusalError(
                f"{self._rank_file}: the ranks would change their order",
                needed="ids in the order of the ranks: the lower id is joined first",
                fix="number the tokens that stay one by one (prune), or use the tokenizer.json of "
                f"this model without {self._rank_file.name}",
            )
        super().renumber(places, output)
        (output / self._rank_file.name).write_bytes(rank_lines(ranks))
        if self._has_json:
            return
        write_tokenizer_json(output / "tokenizer.json", renumbered_json(self._data, places))
        path = output / "tokenizer_config.json"
        settings = read_settings(path)
        settings.pop("auto_map", None)
        write_json(path, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})

    def extend(self, merges: Sequence[Merge], output: Path) -> None:
        """Write this tokenizer with `merges` appended into `output`, in each of its formats."""
        super().extend(merges, output)
        target = output / self._rank_file.name
        first = self.map.tokens
        added = {spelled_bytes(merge.token): first + i for i, merge in enumerate(merges)}
        lines = self._rank_file.read_bytes()
        end = b"" if lines.endswith(b"\n") else b"\n"
        target.write_bytes(lines + end + rank_lines(added))

    def _pairs(self, merges: Sequence[Merge]) -> list[tuple[str, str]]:
        tokens = [merge.token for merge in merges]
        first = self.map.tokens
        ids = {**self.map.ids, **{token: first + place for place, token in enumerate(tokens)}}
        return [pair for token in tokens for pair in ordered_splits(token, ids)]

    def engines(self) -> dict[str, Any]:
        """Every engine that reads one of the files: name -> encode of a list of texts."""
        readers: dict[str, Any] = {"tiktoken": self._tiktoken_encode}
        read_json = super().encode_batch
        if self._has_json:
            return {"tokenizers": read_json, **readers}
        return {**readers, "tokenizers (converted)": read_json}

    def limits(self) -> list[str]:
        """Readers that cannot load an extended rank file, and what they would do with it."""
        last = self._published.last_rank if self._published else -1
        behind = [i for i in self._special_ids if i > last]
        if not behind:
            return []
        return [
            f"{self._rank_file.name}: ranks are ids, and new ones come after the special token "
            f"{behind[-1]}. Not supported are readers that number the special tokens by counting "
            "its lines, for they would move them (Meta's llama-models Tokenizer, transformers' "
            "TikTokenConverter); readers that know them by id do (tiktoken, Qwen's tokenizer)."
        ]


def _require_bytes(ranks: Mapping[bytes, int], path: Path) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise LexigraftError(
            f"{path} has no rank for {len(missing)} of the 256 bytes, first {missing[0]:#04x}",
            needed="a rank for every byte: without it the engine cannot spell every text",
            fix="download this file again",
        )


def converted(
    ranks: Mapping[bytes, int], known: Published, specials: Mapping[str, int]
) -> dict[str, Any]:
    """`tokenizer.json` data that encodes as tiktoken does.

    Every split of a token into two tokens is a merge, in the order of the ranks (the method of
    transformers' TikTokenConverter); special tokens stand in the vocabulary under their own ids,
    because the engine numbers others by itself.
    """
    vocabulary = {byte_text(token): rank for token, rank in ranks.items()}
    return {
        "version": "1.0",
        "added_tokens": [
            added_token(text, token_id, special=True) for text, token_id in specials.items()
        ],
        "normalizer": {"type": "NFC"} if known.composed else None,
        "pre_tokenizer": split_then_bytes(known.pattern),
        "post_processor": None,
        "decoder": dict(BYTE_LEVEL),
        "model": bpe_model({**vocabulary, **specials}, all_splits(vocabulary), ignore_merges=True),
    }


def all_splits(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order of the ranks."""
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return [pair for token in tokens for pair in ordered_splits(token, vocabulary)]


def split_pattern(pre_tokenizer: Any) -> str | None:
    """The regular expression of a pre-tokenizer that splits by one and maps bytes; else None."""
    steps = [pre_tokenizer] if isinstance(pre_tokenizer, dict) else []
    if steps and steps[0].get("type") == "Sequence":
        steps = steps[0].get("pretokenizers") or []
    kinds = [step.get("type") for step in steps]
    if steps and (steps[-1].get("add_prefix_space") or kinds[-1] != "ByteLevel"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        pattern = steps[0].get("pattern", {}).get("Regex")
        return str(pattern) if plain and pattern else None
    return None


def spelled_bytes(token: str) -> bytes:
    """The bytes that a byte-mapped token stands for."""
    return bytes(map(CHARACTER_TO_BYTE.__getitem__, token))
