"""The token map: what each id means, read from the files alone, without any tokenizer engine.

Every other module addresses rows by the ids of this map. It reads `tokenizer.json`,
SentencePiece `tokenizer.model`, tiktoken ranks, `vocab.json`, `vocab.txt`, `added_tokens.json`
and the `added_tokens_decoder` of `tokenizer_config.json`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError
from lexigraft.families.layouts import layout_of
from lexigraft.families.rank_files import is_tiktoken, known_ranks, rank_file
from lexigraft.files import read_json, sha256_bytes

# Every file name under which a tokenizer, or what belongs to it, is stored in a model folder.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class TokenMap:
    """The ordered map id -> token of everything a tokenizer can emit, added tokens included.

    Attributes:
        texts: id -> token, spelled as in the files (`Ġthe`, `▁the`, `<|im_end|>`).
        added: ids of added tokens (matched literally, outside the model).
        special: those added tokens, or control pieces, that decoding skips.
    """

    texts: Mapping[int, str]
    added: frozenset[int] = field(default_factory=frozenset)
    special: frozenset[int] = field(default_factory=frozenset)

    @cached_property
    def tokens(self) -> int:
        """Max id + 1: the number of rows that this tokenizer needs. Never `vocab_size`."""
        return max(self.texts, default=-1) + 1

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of the sorted pairs (id, token)."""
        return prefix_hash(self, self.tokens)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id; where two ids share a text, the lower one."""
        return {text: token_id for token_id, text in sorted(self.texts.items(), reverse=True)}

    @classmethod
    def read(cls, folder: Path) -> TokenMap:
        """The token map of the tokenizer in `folder`.

        Where several files hold the vocabulary, `tokenizer.json` is what loaders read first.

        Raises:
            LexigraftError: there is no tokenizer, or a file cannot be read.
        """
        whole = joined(read_token_maps(folder))
        if whole is not None:
            return whole
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else ""
        raise LexigraftError(
            f"no tokenizer in {folder}" + (f" (it holds {found})" if found else ""),
            needed="tokenizer.json, tokenizer.model or vocab.json",
            fix="copy the tokenizer files of this model into the folder",
        )


def joined(maps: Mapping[str, TokenMap]) -> TokenMap | None:
    """The token map that the files of one tokenizer make together; None if none has a vocabulary.

    `tokenizer.json` comes first, as it does for loaders.
    """
    ranks = (name for name in maps if name.endswith(".tiktoken"))
    for name in ("tokenizer.json", *SENTENCEPIECE_FILES, *ranks, "vocab.json", "vocab.txt"):
        if name in maps:
            return _with_added(maps[name], maps)
    return None


def prefix_hash(token_map: TokenMap, tokens: int) -> str:
    """Hash of the part of a token map below id `tokens`: equal to the base's if none moved.

    It is `files.sha256_json` of the sorted [[id, token], ...], laid out here at twice the speed.
    """
    pairs = [f"[{i},{quoted(t)}]" for i, t in sorted(token_map.texts.items()) if i < tokens]
    return sha256_bytes(f"[{','.join(pairs)}]".encode("utf-8", "surrogatepass"))


def first_difference(old: TokenMap, new: TokenMap) -> int | None:
    """The lowest id of `old` that means another text, or nothing, in `new`; None if all agree."""
    if old.texts.items() <= new.texts.items():  # the usual case, and ten times as fast
        return None
    return next((i for i, t in sorted(old.texts.items()) if new.texts.get(i) != t), None)


def without(token_map: TokenMap, ids: Collection[int]) -> TokenMap:
    """A token map in which `ids` mean nothing."""
    texts = {i: text for i, text in token_map.texts.items() if i not in ids}
    return TokenMap(texts, token_map.added.difference(ids), token_map.special.difference(ids))


def aligned(one: TokenMap, other: TokenMap) -> dict[int, int]:
    """Id in `one` -> id of the same token in `other`, for the tokens that both have.

    Where several ids share a text, the same id is taken if it is among them.
    """
    return {
        token_id: token_id if other.texts.get(token_id) == text else other.ids[text]
        for token_id, text in one.texts.items()
        if text in other.ids
    }


def read_token_maps(folder: Path) -> dict[str, TokenMap]:
    """Each file's own token map, by file name: what `check` compares.

    Raises:
        LexigraftError: a file is damaged.
    """
    readers = {
        "tokenizer.json": _read_tokenizer_json,
        **dict.fromkeys(SENTENCEPIECE_FILES, _read_model_file),
        **{path.name: _read_model_file for path in folder.glob("*.tiktoken")},
        "vocab.json": _read_vocab_json,
        "vocab.txt": _read_vocab_txt,
        "added_tokens.json": _read_added_tokens,
        "tokenizer_config.json": _read_tokenizer_config,
    }
    maps = {}
    for name, reader in readers.items():
        path = folder / name
        if path.is_file():
            try:
                token_map = reader(path)
            except (LookupError, TypeError, ValueError, AttributeError) as fault:
                raise LexigraftError(
                    f"{path} is not laid out as a tokenizer file ({type(fault).__name__}: {fault})",
                    needed="a tokenizer file as transformers writes it",
                    fix="copy this file again from the model it belongs to",
                ) from None
            if token_map.texts:
                maps[name] = token_map
    ranks = rank_file(folder)
    if ranks is not None and ranks.name in maps:
        maps[ranks.name] = _as_named(maps[ranks.name], maps)
    return maps


def _with_added(main: TokenMap, maps: Mapping[str, TokenMap]) -> TokenMap:
    texts = dict(main.texts)
    added, special = set(main.added), set(main.special)
    for name in ("added_tokens.json", "tokenizer_config.json"):
        extra = maps.get(name)
        if extra is None:
            continue
        for token_id, text in extra.texts.items():
            texts.setdefault(token_id, text)
            if texts[token_id] == text:
                added.add(token_id)
                if token_id in extra.special:
                    special.add(token_id)
    return TokenMap(texts, frozenset(added), frozenset(special))


def _by_id(texts: Collection[Any], ids: Collection[Any]) -> dict[int, str]:
    """Id -> text; of an id that stands there twice the last text."""
    if {*map(type, texts)} - {str} or {*map(type, ids)} - {int}:
        for text, token_id in zip(texts, ids, strict=True):
            if type(token_id) is not int or not isinstance(text, str):
                raise TypeError(f"{text!r}: {token_id!r} is not a token with an id")
    found = dict(zip(ids, texts, strict=True))
    for token_id in (min(found), max(found)) if found else ():
        if token_id < 0 or token_id >= 2**31:
            raise ValueError(f"id {token_id} of {found[token_id]!r}")
    return found


def token_text(value: Any) -> str | None:
    """The text of a token as settings write it: a string, or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def readable(data: bytes) -> str:
    """A token's bytes as text; those that are no whole characters in hexadecimal.

    >>> readable("心".encode()), readable(b"\xe5\xbf")
    ('心', '<E5BF>')
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return f"<{data.hex().upper()}>"


def tokenizer_data(path: Path) -> Any:
    """The parsed `tokenizer.json` at `path`: read once, shared, not to be changed.

    Raises:
        LexigraftError: it is no JSON.
    """
    state = path.stat()
    return _tokenizer_data(str(path.resolve()), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2)  # a base and its extension
def _tokenizer_data(path: str, _changed: int, _size: int) -> Any:
    return read_json(Path(path))


def _read_tokenizer_json(path: Path) -> TokenMap:
    state = path.stat()
    return _tokenizer_map(str(path.resolve()), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2)
def _tokenizer_map(path: str, changed: int, size: int) -> TokenMap:
    data = _tokenizer_data(path, changed, size)
    vocabulary: Any = data["model"]["vocab"]
    if isinstance(vocabulary, dict):
        texts = _by_id(vocabulary.keys(), vocabulary.values())
    else:  # Unigram: a list of [piece, score]
        texts = _by_id([entry[0] for entry in vocabulary], range(len(vocabulary)))
    added = data.get("added_tokens") or []
    texts.update(_by_id([one["content"] for one in added], [one["id"] for one in added]))
    return TokenMap(
        texts,
        frozenset(token["id"] for token in added),
        frozenset(token["id"] for token in added if token.get("special")),
    )


def _read_model_file(path: Path) -> TokenMap:
    data = path.read_bytes()
    if is_tiktoken(data):
        return _read_ranks(data)
    proto = parse_sentencepiece(data, path)
    unknown, control = 2, 3  # sentencepiece_model.proto, ModelProto.SentencePiece.Type
    layout = layout_of(path.parent)
    special = [i for i, piece in enumerate(proto.pieces) if piece.type in (unknown, control)]
    return TokenMap(
        layout.texts([piece.piece for piece in proto.pieces]),
        special=layout.special(len(proto.pieces), special),
    )


def parse_sentencepiece(data: bytes, path: Path) -> Any:
    """The `ModelProto` of a SentencePiece model file.

    Raises:
        LexigraftError: the bytes are none.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise LexigraftError(
            f"{path} is not a SentencePiece model",
            needed="a SentencePiece .model file",
            fix="download this file again (a Git LFS pointer is a common cause)",
        )
    return proto


def _read_ranks(data: bytes) -> TokenMap:
    """The ranks, and the special tokens that the reader of a published rank file adds."""
    ranks, known = known_ranks(data)
    texts = {rank: byte_text(token) for token, rank in ranks.items()}
    specials = {token_id: text for text, token_id in known.specials.items()} if known else {}
    return TokenMap({**texts, **specials}, frozenset(specials), frozenset(specials))


def _as_named(ranks: TokenMap, maps: Mapping[str, TokenMap]) -> TokenMap:
    """`ranks` with its special tokens as the settings beside it name them (Llama 3.0, 3.1)."""
    settings = [maps[n] for n in ("tokenizer_config.json", "added_tokens.json") if n in maps]
    named = {i: text for other in settings for i, text in other.texts.items() if i in ranks.added}
    return TokenMap({**ranks.texts, **named}, ranks.added, ranks.special)


def _byte_characters() -> dict[int, str]:
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in kept]
    table = {byte: chr(byte) for byte in kept}
    table.update({byte: chr(256 + place) for place, byte in enumerate(others)})
    return table


# GPT-2's reversible map of bytes to printable characters (openai/gpt-2, src/encoder.py).
BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def byte_text(data: bytes) -> str:
    """Bytes as byte-level tokenizers spell them in their files."""
    return "".join(map(BYTE_TO_CHARACTER.__getitem__, data))


def _read_vocab_json(path: Path) -> TokenMap:
    vocabulary = read_json(path)
    return TokenMap(_by_id(vocabulary.keys(), vocabulary.values()))


def _read_vocab_txt(path: Path) -> TokenMap:
    lines = path.read_text("utf-8").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return TokenMap(_by_id([line.rstrip("\r") for line in lines], range(len(lines))))


def _read_added_tokens(path: Path) -> TokenMap:
    added = read_json(path)
    texts = _by_id(added.keys(), added.values())
    return TokenMap(texts, frozenset(texts))


def _read_tokenizer_config(path: Path) -> TokenMap:
    decoder = read_json(path).get("added_tokens_decoder") or {}
    texts = _by_id([entry["content"] for entry in decoder.values()], [*map(int, decoder)])
    special = (int(key) for key, entry in decoder.items() if entry.get("special"))
    return TokenMap(texts, frozenset(texts), frozenset(special))
