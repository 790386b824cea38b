"""Byte-level BPE in a `tokenizer.json`: GPT-2, Llama 3, Qwen, SmolLM2 kinds.

The merge list is explicit: a pair is joined only if it is listed. New merges go to its end,
their tokens get ids from the highest id + 1 (added tokens counted). `vocab.json` and
`merges.txt`, where the base has them, are extended alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lexigraft.errors import LexigraftError
from lexigraft.families import copy_tokenizer
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.merges import merge_pairs
from lexigraft.families.renumbering import (
    Needs,
    kept_merges,
    needs_by_list,
    renumber_settings,
    renumbered_ids,
    renumbered_json,
    write_vocabulary,
)
from lexigraft.families.spelling import may_join
from lexigraft.families.tokenmap import (
    BYTE_TO_CHARACTER,
    CHARACTER_TO_BYTE,
    TokenMap,
    byte_text,
)
from lexigraft.families.units import Ints, UnitCounter, Units, batches
from lexigraft.families.words import WordSplitter
from lexigraft.files import read_object, sha256_json

if TYPE_CHECKING:  # graft needs no engine here: a child process has opened it
    from tokenizers import Tokenizer

    from lexigraft.families.detect import Told
    from lexigraft.families.replay import Replayed
    from lexigraft.families.segment import Segmenter


class ByteLevelBPE:
    """See `lexigraft.families.Family`."""

    name = "byte-level BPE"
    implicit = False
    guaranteed = True
    unknown_id: int | None = None
    prefix = ""
    vacant: tuple[int, ...] = ()

    def __init__(self, folder: Path, data: dict[str, Any], told: Told | None = None) -> None:
        """`told` is what a child process has said of the file: no engine is opened for it here."""
        self.folder = folder
        self.map = _with_added(TokenMap.read(folder), data)
        self._data = data
        self._known = told.spelled if told else {}
        if told is None:
            require_own_ids(self._engine.token_to_id, self.map, folder)
        else:
            own, added = data["model"]["vocab"], told.added
            require_own_ids(lambda text: added.get(text, own.get(text)), self.map, folder)

    @cached_property
    def _engine(self) -> Tokenizer:
        written = self.folder / "tokenizer.json"  # without it, `data` was made of other files
        return engine_of_file(written) if written.is_file() else open_engine(self._data)

    @cached_property
    def content_hash(self) -> str:
        """Hash of what decides ids: vocabulary, merges, normalizer, pre-tokenizer, added tokens."""
        return content_hash(self.name, self._data)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos."""
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        batch = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`."""
        return str(self._engine.decode(list(ids), skip_special_tokens=skip_special))

    def start_ids(self) -> list[int]:
        """What the post-processor puts before a text."""
        return template_start(self._engine)

    def pieces(self, token: str, *, added: bool = False) -> list[int]:
        """Ids that spell `token` by the merges alone."""
        spelled = byte_text(token.encode()) if added else token
        if spelled in self._known:
            return list(self._known[spelled])
        return list(self._plain.encode(spelled, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        text = self.map.texts[token_id]
        return text.encode() if token_id in self.map.added else token_bytes(text)

    @cached_property
    def _plain(self) -> Tokenizer:
        if self._data["model"].get("ignore_merges"):
            return open_engine(plain_model(self._data))
        from tokenizers import Tokenizer

        return Tokenizer(self._engine.model)  # shared, and nothing around it

    def count_units(self, chunks: Mapping[str, int]) -> Units:
        """The stretches of `chunks` in which new tokens may arise, as base tokens.

        The words are the engine's own; they are segmented by `Segmenter`, each distinct one once.
        """
        excluded = self.map.added | self.map.special
        counter = UnitCounter(self.map.texts, self.token_bytes, excluded=excluded)
        words = WordSplitter(self._engine).count(self._literal(chunks, counter).items())
        for batch, weights in batches(self._spelled(words, counter)):
            tokens, lengths = self._segmenter.run(batch)
            known = [place for place, word in enumerate(batch) if word in self._read_whole]
            if known:
                ids = [self._read_whole[batch[place]] for place in known]
                tokens, lengths = _replaced(tokens, lengths, known, ids)
            counter.add_words(tokens, lengths, weights)
        return counter.units()

    @cached_property
    def _read_whole(self) -> Mapping[bytes, int]:
        """Words that are one token whatever the merges say."""
        model = self._data["model"]
        if not model.get("ignore_merges"):
            return {}
        return {token_bytes(text): token_id for text, token_id in model["vocab"].items()}

    def _literal(self, chunks: Mapping[str, int], counter: UnitCounter) -> Mapping[str, int]:
        """`chunks` without those that hold an added token, which the engine itself encodes."""
        texts = "\n".join(chunks)
        added = [self.map.texts[i] for i in sorted(self.map.added)]
        added = [text for text in added if text and text in texts]
        if not added:
            return chunks
        found = re.compile("|".join(map(re.escape, added))).search
        marked = {text: n for text, n in chunks.items() if found(text)}
        for batch, weights in batches(marked):
            encoded = self._engine.encode_batch(batch, add_special_tokens=False)
            counter.add([e.ids for e in encoded], weights, [e.word_ids for e in encoded])
        return {text: n for text, n in chunks.items() if text not in marked}

    def _spelled(self, words: Mapping[bytes, int], counter: UnitCounter) -> Mapping[bytes, int]:
        """`words` without those that hold a byte without a token, which the engine leaves out."""
        vocabulary = self._data["model"]["vocab"]
        missing = [bytes([b]) for c, b in CHARACTER_TO_BYTE.items() if c not in vocabulary]
        if not missing:
            return words
        found = re.compile(b"[" + b"".join(map(re.escape, missing)) + b"]").search
        odd = {word: n for word, n in words.items() if found(word)}
        for batch, weights in batches(odd):
            texts = [byte_text(word) for word in batch]
            encoded = self._plain.encode_batch(texts, add_special_tokens=False)
            counter.add([encoding.ids for encoding in encoded], weights)
        return {word: n for word, n in words.items() if word not in odd} if odd else words

    @cached_property
    def _segmenter(self) -> Segmenter:
        from lexigraft.families.segment import Segmenter

        vocabulary = self._data["model"]["vocab"]
        letters = [vocabulary.get(BYTE_TO_CHARACTER[byte], -1) for byte in range(256)]
        return Segmenter(self._data["model"]["merges"], vocabulary, letters)

    def written(self, text: str) -> list[str]:
        """`text` as tokens of this family are spelled in the files."""
        return [byte_text(text.encode())]

    def replay(self, units: Units, merges: Sequence[Merge]) -> Replayed:
        """What this tokenizer extended by `merges` makes of `units`."""
        from lexigraft.families.replay import replay

        return replay(units, merges, implicit=self.implicit)

    def join(self, left: str, right: str) -> str | None:
        """The token of two parts, unless it is no word or the base has that text already."""
        if not may_join(_plain_bytes(left), _plain_bytes(right)):
            return None
        token = left + right
        return None if token in self.map.ids else token

    def admits(self, merges: Sequence[Merge]) -> list[Merge]:
        """All of them: with an explicit merge list no other pair can become joinable."""
        return list(merges)

    def extend(self, merges: Sequence[Merge], output: Path) -> None:
        """Write this tokenizer with `merges` appended into `output`, in each of its formats."""
        copy_tokenizer(self.folder, output)
        data = self._extended_data(merges)
        if (output / "tokenizer.json").is_file():
            write_tokenizer_json(output / "tokenizer.json", data)
        vocabulary = output / "vocab.json"
        if vocabulary.is_file():
            ids = read_object(vocabulary)
            for token, token_id in data["model"]["vocab"].items():
                ids.setdefault(token, token_id)
            write_vocabulary(vocabulary, ids)
        listed = output / "merges.txt"
        if listed.is_file():
            text = listed.read_text("utf-8")
            lines = "".join(f"{left} {right}\n" for left, right in self._pairs(merges))
            listed.write_text(text + ("" if text.endswith("\n") else "\n") + lines, "utf-8")

    @property
    def fixed(self) -> frozenset[int]:
        """Added tokens and the 256 bytes."""
        vocabulary = self._data["model"]["vocab"]
        letters = (vocabulary[c] for c in CHARACTER_TO_BYTE if c in vocabulary)
        return self.map.added | self.map.special | frozenset(letters)

    def needs(self) -> Needs:
        """By the merges alone."""
        model = self._data["model"]
        read = self._plain.encode_batch(list(model["vocab"]), add_special_tokens=False)
        found = needs_by_list(model["vocab"], (e.ids for e in read), model["merges"])
        return {i: parts for i, parts in found.items() if i not in self.map.added}

    def renumber(self, places: Mapping[int, int], output: Path) -> None:
        """Write the tokens of `places` alone, under their new ids, in each format."""
        copy_tokenizer(self.folder, output)
        renumber_settings(output, places)
        if (output / "tokenizer.json").is_file():
            write_tokenizer_json(output / "tokenizer.json", renumbered_json(self._data, places))
        vocabulary = output / "vocab.json"
        if vocabulary.is_file():
            write_vocabulary(vocabulary, renumbered_ids(read_object(vocabulary), places))
        listed = output / "merges.txt"
        if listed.is_file():
            kept = {text for text, i in self._data["model"]["vocab"].items() if i in places}
            head, *lines = listed.read_text("utf-8").splitlines()
            if not head.startswith("#version"):
                head, lines = "", [head, *lines]
            lines = kept_merges([line for line in lines if line.strip()], kept)
            listed.write_text("".join(f"{line}\n" for line in [head, *lines] if line), "utf-8")

    def limits(self) -> list[str]:
        """Nothing that a user must know."""
        return []

    def engines(self) -> dict[str, Any]:
        """Every engine that reads one of the files: name -> encode of a list of texts."""
        return {"tokenizers": self.encode_batch}

    def _extended_data(self, merges: Sequence[Merge]) -> dict[str, Any]:
        tokens = [merge.token for merge in merges]
        return extend_json(self._data, tokens, self._pairs(merges), self.map.tokens)

    def _pairs(self, merges: Sequence[Merge]) -> list[tuple[str, str]]:
        """The lines of the merge list, in the order of their ranks."""
        return [(merge.left, merge.right) for merge in merges if merge.right is not None]


def _with_added(token_map: TokenMap, data: Mapping[str, Any]) -> TokenMap:
    """`token_map` where the added tokens of `data` count as such (GPT-2's are in vocab.json)."""
    tokens = data.get("added_tokens") or []
    added = {token["id"] for token in tokens}
    special = {token["id"] for token in tokens if token.get("special")}
    return TokenMap(token_map.texts, token_map.added | added, token_map.special | special)


def _replaced(
    tokens: Ints, lengths: Ints, places: Sequence[int], ids: Sequence[int]
) -> tuple[Ints, Ints]:
    """Words at `places` become one id each: tokens that are read whole, whatever the merges."""
    firsts = np.cumsum(lengths) - lengths
    changed = tokens.copy()
    changed[firsts[places]] = ids
    kept = np.ones(len(tokens), dtype=bool)
    single = np.zeros(len(lengths), dtype=bool)
    single[places] = True
    kept &= ~np.repeat(single, lengths)
    kept[firsts[places]] = True
    return changed[kept], np.where(single, 1, lengths)


def engine_of_file(path: Path) -> Tokenizer:
    """The engine of a `tokenizer.json`, without truncation and padding: those belong to a use."""
    from tokenizers import Tokenizer

    engine = _opened(lambda: Tokenizer.from_file(str(path)))
    engine.no_truncation()
    engine.no_padding()
    return engine


def open_engine(data: Mapping[str, Any]) -> Tokenizer:
    """The engine of `tokenizer.json` data."""
    from tokenizers import Tokenizer

    return _opened(lambda: Tokenizer.from_str(json.dumps(data, ensure_ascii=False)))


def _opened(opener: Callable[[], Tokenizer]) -> Tokenizer:
    try:
        return opener()
    except BaseException as fault:  # a panic of the native code is no Exception
        if isinstance(fault, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise LexigraftError(
            f"the tokenizers library refuses this tokenizer.json ({fault})",
            needed="a tokenizer.json that it reads",
            fix="pip install -U tokenizers, or copy the file again",
        ) from None


def require_own_ids(id_of: Callable[[str], int | None], token_map: TokenMap, folder: Path) -> None:
    """Stop where the engine gives an added token another id than its file says: `id_of` tells.

    The engine appends added tokens one by one and ignores their ids, so a hole before one of
    them moves it without a word.
    """
    for token_id in sorted(token_map.added):
        text = token_map.texts[token_id]
        given = id_of(text)
        if given is not None and given != token_id:
            raise LexigraftError(
                f"{folder}: the files give {text!r} id {token_id}, "
                f"the tokenizers library reads id {given}",
                needed="added tokens that keep their ids when the tokenizer is loaded",
                fix=f'enter "{text}": {token_id} in model.vocab of tokenizer.json',
            )


def plain_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """The BPE model alone: no normalizer, no pre-tokenizer, no added tokens, merges only."""
    bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = {**data["model"], "ignore_merges": False}
    return {"version": data.get("version", "1.0"), "added_tokens": [], **bare, "model": model}


def extend_json(
    data: Mapping[str, Any],
    tokens: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    first_id: int,
) -> dict[str, Any]:
    """`tokenizer.json` data with tokens from `first_id` on and merges at the end.

    Added tokens whose ids lie behind the model's vocabulary are entered in it under their own
    ids: a loader gives an added token that the model does not know the next free id, which the
    new tokens have just moved.
    """
    if not tokens:  # nothing to move: the same tokenizer
        return dict(data)
    model = data["model"]
    vocabulary = dict(model["vocab"])
    for token in data.get("added_tokens") or []:
        vocabulary.setdefault(token["content"], token["id"])
    vocabulary.update({token: first_id + place for place, token in enumerate(tokens)})
    merges = list(model["merges"])
    if merges and isinstance(merges[0], str):
        merges.extend(f"{left} {right}" for left, right in pairs)
    else:
        merges.extend([left, right] for left, right in pairs)
    return {**data, "model": {**model, "vocab": vocabulary, "merges": merges}}


def write_tokenizer_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `tokenizer.json` as the tokenizers library lays it out.

    The long lists of the model are laid out here, since Python's own indenting encoder takes a
    second for them.
    """
    model = data["model"]
    long = {key: model[key] for key in ("vocab", "merges") if model.get(key)}
    holders = {key: f"@{key}@" for key in long}
    text = json.dumps({**data, "model": {**model, **holders}}, ensure_ascii=False, indent=2)
    for key, value in long.items():
        text = text.replace(f'"@{key}@"', _laid_out(value), 1)
    path.write_text(text, "utf-8")


def _laid_out(value: Any) -> str:
    """A vocabulary or a list of merges, indented as deep as they stand in the file."""
    between = ",\n      "
    if isinstance(value, dict):
        rows = json.dumps(value, ensure_ascii=False, separators=(between, ": "))[1:-1]
        return "{\n      " + rows + "\n    }"
    flat = [part for row in value for part in (row if isinstance(row, list) else [row])]
    quoted = json.dumps(flat, ensure_ascii=False, separators=("\n", ": "))[1:-1].split("\n")
    if not isinstance(value[0], list):
        return "[\n      " + between.join(quoted) + "\n    ]"
    parts = iter(quoted)
    rows = between.join(
        "[\n        " + ",\n        ".join(islice(parts, len(row))) + "\n      ]" for row in value
    )
    return "[\n      " + rows + "\n    ]"


def content_hash(family: str, data: Mapping[str, Any]) -> str:
    """Canonical hash of a tokenizer.json: the same after it was loaded and saved again."""
    model = data["model"]
    merges = merge_pairs(model["merges"])
    parts = ("normalizer", "pre_tokenizer", "decoder")
    added = sorted((token["id"], token["content"]) for token in data.get("added_tokens") or [])
    return sha256_json(
        {
            "family": family,
            "vocab": model["vocab"],
            "merges": merges,
            "ignore_merges": bool(model.get("ignore_merges")),
            "added": added,
            **{part: data.get(part) for part in parts},
        }
    )


def template_start(engine: Tokenizer) -> list[int]:
    """Ids that the post-processor puts before the first text."""
    marked = engine.encode("a")
    plain = engine.encode("a", add_special_tokens=False).ids
    for start in range(len(marked.ids) - len(plain) + 1):
        if marked.ids[start : start + len(plain)] == plain:
            return list(marked.ids[:start])
    return []


def token_bytes(text: str) -> bytes:
    """The bytes of a byte-mapped token; text outside the byte map stands for itself."""
    try:
        return _plain_bytes(text)
    except KeyError:
        return text.encode()


def _plain_bytes(text: str) -> bytes:
    return bytes(map(CHARACTER_TO_BYTE.__getitem__, text))
