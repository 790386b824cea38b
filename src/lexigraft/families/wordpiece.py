"""WordPiece: BERT kinds, held as `vocab.txt`, `tokenizer.json` or both.

A word is cut greedily: at each place the longest token that matches is taken, inside a word
among those that begin with `##`; a word that meets a place where nothing matches becomes one
[UNK]. There are no merges and no scores. Three things follow.

- A new token needs none of its parts: there are no bridges, and any of them may be dropped alone.
- A token is taken wherever it matches, even where the base would have read across its end:
  with `cardio` (card ##io) added, `cardion`, which the base reads card ##ion, becomes
  cardio ##n. No order of ids can prevent that. `breakers` finds such tokens on given words.
- A character that has no token makes its whole word unknown, not only itself. It needs one token
  at the beginning of words and another, with `##`, inside them; each is adopted by its own count.

Method: Schuster and Nakajima, "Japanese and Korean voice search" (2012), as BERT's own
`tokenization.py` and Hugging Face's `tokenizers` implement it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import copy_tokenizer
from lexigraft.families.byte_level import (
    engine_of_file,
    open_engine,
    require_own_ids,
    template_start,
    write_tokenizer_json,
)
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.plain import PlainCounting
from lexigraft.families.renumbering import renumber_settings, renumbered_json
from lexigraft.families.spelling import is_word
from lexigraft.families.tokenmap import TokenMap
from lexigraft.families.units import Unit
from lexigraft.files import read_json, sha256_json

VOCABULARY = "vocab.txt"
# Classes that read vocab.txt as BERT does; others give the same file name another meaning
# (PhoBERT and BERTweet: BPE, ESM: letters, BERT Japanese: a morphological analyser first).
_BERT_CLASSES = frozenset(
    f"{name}Tokenizer{suffix}"
    for name in ("Bert", "ConvBert", "DistilBert", "Electra", "LayoutLM", "MobileBert")
    for suffix in ("", "Fast")
)
_SPECIAL_KEYS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# An unknown word costs its text, which no count of tokens shows: it weighs as one token more.
_WORTH_OF_UNKNOWN = 2


class WordPiece(PlainCounting):
    """See `lexigraft.families.Family`.

    Attributes:
        guaranteed: False: a new token may cut a word of some text differently; see `breakers`.
        unknown_id: the id of [UNK], which stands for whole words.
        prefix: nothing stands before a text.
    """

    name = "WordPiece"
    implicit = False
    guaranteed = False
    prefix = ""
    vacant: tuple[int, ...] = ()

    def __init__(self, folder: Path, data: dict[str, Any] | None) -> None:
        self.folder = folder
        self.map = TokenMap.read(folder)
        self._readers: dict[str, Tokenizer] = {}
        if data is not None:
            self._readers["tokenizers"] = engine_of_file(folder / "tokenizer.json")
        self._has_lines = (folder / VOCABULARY).is_file()
        lines_data = _data_of_lines(folder, self.map) if self._has_lines else None
        if lines_data is not None:
            self._readers[VOCABULARY] = open_engine(lines_data)
        self._has_json = data is not None
        self._data: dict[str, Any] = data if data is not None else lines_data or {}
        self._engine = next(iter(self._readers.values()))
        self._mark_added()
        for engine in self._readers.values():
            require_own_ids(engine.token_to_id, self.map, folder)
        self._mark: str = self._data["model"].get("continuing_subword_prefix", "##")
        self._longest_word: int = self._data["model"].get("max_input_chars_per_word", 100)
        self._vocabulary: dict[str, int] = self._data["model"]["vocab"]
        self.unknown_id = self._unknown()
        self._require_lone_marks()

    def _mark_added(self) -> None:
        """vocab.txt does not say which of its lines are special; the loader's settings do."""
        added = self._data.get("added_tokens") or []
        self.map = TokenMap(
            self.map.texts,
            self.map.added | {token["id"] for token in added},
            self.map.special | {token["id"] for token in added if token.get("special")},
        )

    def _unknown(self) -> int:
        text = self._data["model"].get("unk_token", "[UNK]")
        found = self._vocabulary.get(text)
        if found is None:
            raise LexigraftError(
                f"{self.folder}: the vocabulary has no {text!r}, its own token for unknown words",
                needed="an unk_token that is in the vocabulary",
                fix="set unk_token in tokenizer_config.json (or in tokenizer.json's model)",
            )
        return found

    def _require_lone_marks(self) -> None:
        """`##` marks a token as inner: a word that holds the mark itself could not be spelled."""
        mark = self._mark
        if not mark or any(mark in word for word in self._words_of(f"a{mark}b {mark}a")):
            raise RefusalError(
                f"{self.folder}: a WordPiece tokenizer whose words may hold its own mark {mark!r}",
                needed="a pre-tokenizer that splits at punctuation, as BERT's does: elsewhere a "
                "token inside a word and the written mark cannot be told apart",
                fix="extend a base with the BertPreTokenizer",
            )

    @cached_property
    def content_hash(self) -> str:
        """Hash of what decides ids: vocabulary, word rules, normalizer, splits, added tokens."""
        parts = ("normalizer", "pre_tokenizer", "decoder")
        added = sorted((t["id"], t["content"]) for t in self._data.get("added_tokens") or [])
        return sha256_json(
            {
                "family": self.name,
                "vocab": self._vocabulary,
                "prefix": self._mark,
                "longest_word": self._longest_word,
                "added": added,
                **{part: self._data.get(part) for part in parts},
            }
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without [CLS] and [SEP]."""
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return _encode_batch(self._engine, texts)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, as the decoder spaces it."""
        return str(self._engine.decode(list(ids), skip_special_tokens=skip_special))

    def start_ids(self) -> list[int]:
        """What the template puts before a text: [CLS]."""
        return template_start(self._engine)

    def pieces(self, token: str, *, added: bool = False) -> list[int]:
        """Ids that spell `token`; what the base cannot read counts as one [UNK] a character.

        An added token is spelled as its words are, each from its beginning.
        """
        if not added:
            return self._spell(token)
        spelled = [i for word in self._words_of(token) for i in self._spell(word)]
        return spelled or [self.unknown_id]

    def _spell(self, token: str) -> list[int]:
        return [self._vocabulary.get(s, self.unknown_id) for s in self._symbols(token)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, without the mark of an inner one."""
        text = self.map.texts[token_id]
        return (text if token_id in self.map.added else self._unmarked(text)[0]).encode()

    def _unmarked(self, token: str) -> tuple[str, bool]:
        """The letters of a token, and whether it stands inside a word."""
        inner = token.startswith(self._mark) and len(token) > len(self._mark)
        return (token.removeprefix(self._mark) if inner else token), inner

    def units(self, texts: Sequence[str]) -> Iterator[Unit]:
        """The words of `texts` that something can be joined or adopted in, as base tokens.

        A unit is a whole word, digits and all, for greedy cutting depends on all that comes
        before. A character without a token stands as itself, with `##` inside a word.
        """
        for text, encoding in zip(texts, self._encodings(texts), strict=True):
            words = zip(
                encoding.word_ids, encoding.tokens, encoding.ids, encoding.offsets, strict=True
            )
            for _, parts in groupby(words, key=lambda part: part[0]):
                word = list(parts)
                if len(word) > 1:
                    yield tuple(part[1] for part in word)
                elif word[0][2] == self.unknown_id:
                    begin, end = word[0][3]
                    yield from self._unknown_units(text[begin:end])

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        return list(self._engine.encode_batch(list(texts), add_special_tokens=False))

    def _unknown_units(self, text: str) -> Iterator[Unit]:
        """The symbols of a word that the base cannot read; none of what will stay unreadable."""
        if text == self.map.texts[self.unknown_id]:
            return
        for word in self._words_of(text):
            symbols = self._cutter.cut(word)
            if len(word) <= self._longest_word and all(map(self._may_be_read, symbols)):
                yield tuple(symbols)

    def _may_be_read(self, symbol: str) -> bool:
        return symbol in self._vocabulary or is_word(self._unmarked(symbol)[0])

    def may_come_out(self, token_id: int) -> bool:
        """False for a token that the rules before the vocabulary always change or cut apart.

        Such are `##患` and `患者` where each Han character is a word, `Cell` where all is in lower
        case, `[unused1]` where punctuation stands alone. Any other is the longest match of a word.
        """
        text, inner = self._unmarked(self.map.texts[token_id])
        before = ("x", "7", text) if inner else ("",)
        return any(self._words_of(one + text) == [one + text] for one in before)

    def _words_of(self, text: str) -> list[str]:
        """Words as the engine cuts them before it looks at the vocabulary."""
        engine = self._engine
        plain = engine.normalizer.normalize_str(text) if engine.normalizer else text
        split = engine.pre_tokenizer
        return [word for word, _ in split.pre_tokenize_str(plain)] if split else [plain]

    def _symbols(self, token: str) -> list[str]:
        """A token as the base cuts its letters; one that it cannot read stands as itself."""
        return self._cutter.cut(*self._unmarked(token))

    @cached_property
    def _cutter(self) -> _Cutter:
        return _Cutter(self._vocabulary, self._mark)

    def adoptable(self, units: Iterable[Unit]) -> Mapping[str, int]:
        """Letters without a token, as the base would have to hold them: `x` or `##x`."""
        return {
            symbol: _WORTH_OF_UNKNOWN
            for unit in units
            for symbol in unit
            if symbol not in self._vocabulary and is_word(self._unmarked(symbol)[0])
        }

    def written(self, text: str) -> list[str]:
        """`text` at the beginning of a word and inside one; spaces around it are no part of it."""
        words = self._words_of(text)
        word = words[0] if len(words) == 1 else text.strip(" ")
        return [word, self._mark + word]

    def join(self, left: str, right: str) -> str | None:
        """`card` + `##io` -> `cardio`, `##io` + `##gram` -> `##iogram`: letters of one script."""
        letters, inner = self._unmarked(right)
        token = left + letters
        if not inner or token in self.map.ids or not is_word(self._unmarked(token)[0]):
            return None
        return token

    def admits(self, merges: Sequence[Merge]) -> list[Merge]:
        """All of them, each standing alone: no token here needs its parts to come out."""
        return [Merge(m.token, "", "", m.occurrences) if m.right is not None else m for m in merges]

    def limits(self) -> list[str]:
        """What cannot be learned with this tokenizer, one sentence each."""
        if len(self._words_of("冠状")) == 1:
            return []
        return ["this pre-tokenizer splits every Han character: 0 new Chinese words are possible"]

    def emitted(self, merges: Sequence[Merge], stretches: Sequence[str]) -> list[list[str]]:
        """Tokens of each word (as `units` spells it) under the base extended by `merges`."""
        engine = open_engine(_model_alone(self._extended_data(merges)))
        words = [self._word(stretch) for stretch in stretches]
        return [e.tokens for e in engine.encode_batch(words, add_special_tokens=False)]

    def _word(self, stretch: str) -> str:
        """The letters of a word spelled in tokens; its first token stands at its beginning."""
        return stretch.replace(self._mark, "")

    def breakers(self, merges: Sequence[Merge], stretches: Sequence[str]) -> set[str]:
        """Those of `merges` that cut one of the words in another way than only coarser.

        A word is well cut if its tokens, each replaced by its base pieces, are the base's. Where
        they are not, the first new token that departs from them is to blame. What it hid may
        break in turn, so the words that held it are cut again until all are well. Words that the
        base cannot read are left out: they can only gain.

        Returns:
            Tokens to drop: without them every one of `stretches` is only coarsened.
        """
        kept = {merge.token for merge in merges}
        blamed: set[str] = set()
        base = self.emitted([], stretches)
        unknown = self.map.texts[self.unknown_id]
        pending = []
        for stretch, old, new in zip(stretches, base, self.emitted(merges, stretches), strict=True):
            if old not in (new, [unknown]):
                pending.append((self._word(stretch), old))
        homes: dict[str, list[tuple[str, list[str]]]] = {}
        spelled = {token: self._symbols(token) for token in kept}
        while pending:
            guilty = set()
            cutter = _Cutter(self._vocabulary.keys() | kept, self._mark)
            for word, old in pending:
                cut = cutter.cut(word)
                for token in kept.intersection(cut):
                    homes.setdefault(token, []).append((word, old))
                guilty |= _first_departure(cut, old, spelled)
            blamed |= guilty
            kept -= guilty
            pending = list({home[0]: home for token in guilty for home in homes[token]}.values())
        return blamed

    def extend(self, merges: Sequence[Merge], output: Path) -> None:
        """Write this tokenizer with the tokens of `merges` appended, in each of its formats."""
        copy_tokenizer(self.folder, output)
        tokens = [merge.token for merge in merges]
        if self._has_lines:
            self._write_lines(tokens, output / VOCABULARY)
        if self._has_json:
            write_tokenizer_json(output / "tokenizer.json", self._extended_data(merges))

    @property
    def fixed(self) -> frozenset[int]:
        """Added tokens and [UNK]."""
        return self.map.added | self.map.special | {self.unknown_id}

    def needs(self) -> Mapping[int, tuple[int, ...]]:
        """Nothing: the longest match is the same whatever shorter tokens there are."""
        return {}

    def renumber(self, places: Mapping[int, int], output: Path) -> None:
        """Write the tokens of `places` alone, under their new ids, in each format."""
        copy_tokenizer(self.folder, output)
        renumber_settings(output, places)
        data = renumbered_json(self._data, places)
        if self._has_lines:
            old = (self.folder / VOCABULARY).read_bytes()
            lines = _lines(self.folder / VOCABULARY)
            kept = {places[i]: text for i, text in enumerate(lines) if i in places}
            behind = [new for old, new in places.items() if old >= len(lines)]
            size = min(behind) if behind else max(kept) + 1
            # BERT's own names for unused lines may be taken.
            holes = {i: f"[removed{i}]" for i in range(size) if i not in kept}
            texts = [text for _, text in sorted({**kept, **holes}.items())]
            end = "\r\n" if b"\r\n" in old else "\n"
            (output / VOCABULARY).write_bytes("".join(t + end for t in texts).encode())
            data["model"]["vocab"] |= {text: i for i, text in holes.items()}
        if self._has_json:
            write_tokenizer_json(output / "tokenizer.json", data)

    def _write_lines(self, tokens: Sequence[str], path: Path) -> None:
        """Append to vocab.txt; its lines are the ids, so those of added tokens are filled in."""
        data = path.read_bytes()
        end = b"\r\n" if b"\r\n" in data else b"\n"
        if data and not data.endswith(b"\n"):
            data += end
        behind = [self._line(i) for i in range(data.count(b"\n"), self.map.tokens)]
        path.write_bytes(data + b"".join(text.encode() + end for text in (*behind, *tokens)))

    def _line(self, token_id: int) -> str:
        """The text of one id behind vocab.txt, which has to become a line of it."""
        text = self.map.texts.get(token_id)
        if text is None:
            raise RefusalError(
                f"{self.folder / VOCABULARY} numbers tokens by line, and no file has id {token_id}",
                needed=f"a text for every id up to {self.map.tokens - 1}, to fill the lines before "
                "the new tokens",
                fix=f"append a line such as [unused{token_id}] to {VOCABULARY} at that place",
            )
        if not text or text != text.strip() or len(text.splitlines()) > 1:
            raise RefusalError(
                f"{self.folder}: the added token {text!r} (id {token_id}) cannot be a line of "
                f"{VOCABULARY}",
                needed="added tokens without line breaks and spaces at their ends: a break would "
                "move every later id by one",
                fix=f"remove {VOCABULARY} if the folder has a tokenizer.json, which can hold it",
            )
        return text

    def engines(self) -> dict[str, Callable[[Sequence[str]], list[list[int]]]]:
        """Every engine that reads one of the files: name -> encode of a list of texts."""

        def reader(engine: Tokenizer) -> Callable[[Sequence[str]], list[list[int]]]:
            return lambda texts: _encode_batch(engine, texts)

        return {name: reader(engine) for name, engine in self._readers.items()}

    def _extended_data(self, merges: Sequence[Merge]) -> dict[str, Any]:
        if not merges:  # nothing to move: the same tokenizer
            return dict(self._data)
        first = self.map.tokens
        vocabulary = dict(self._vocabulary)
        for token in self._data.get("added_tokens") or []:
            vocabulary.setdefault(token["content"], token["id"])
        vocabulary.update({merge.token: first + place for place, merge in enumerate(merges)})
        return {**self._data, "model": {**self._data["model"], "vocab": vocabulary}}


class _Cutter:
    """Greedy longest match where every single character counts as a token.

    Args:
        tokens: what may come out beside single characters.
        mark: what begins a token inside a word.
    """

    def __init__(self, tokens: Collection[str], mark: str) -> None:
        self.tokens = tokens
        self.mark = mark
        self.widest = max(map(len, tokens), default=1)

    def cut(self, word: str, inner: bool = False) -> list[str]:
        """The symbols of some letters; `inner` if a word has begun before them."""
        symbols = []
        start, size = 0, len(word)
        while start < size:
            mark = self.mark if inner or start else ""
            end = min(size, start + self.widest)
            while end > start + 1 and mark + word[start:end] not in self.tokens:
                end -= 1
            symbols.append(mark + word[start:end])
            start = end
        return symbols


def _first_departure(
    cut: Sequence[str], old: Sequence[str], spelled: Mapping[str, Sequence[str]]
) -> set[str]:
    """The new token at which a word stops being cut at the base's boundaries; empty if none."""
    place = 0
    for token in cut:
        pieces = spelled.get(token, (token,))
        if list(pieces) != list(old[place : place + len(pieces)]):
            assert token in spelled, "only a new token can depart first"
            return {token}
        place += len(pieces)
    return set()


def _encode_batch(engine: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in engine.encode_batch(list(texts), add_special_tokens=False)]


def _model_alone(data: Mapping[str, Any]) -> dict[str, Any]:
    """The WordPiece model without normalizer, splits and added tokens: a text is one word."""
    bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": [], **bare, "model": data["model"]}


def _data_of_lines(folder: Path, token_map: TokenMap) -> dict[str, Any]:
    """What BERT's own loader makes of vocab.txt and the settings beside it, as tokenizer.json.

    The defaults are those of transformers' `BertTokenizer`.
    """
    settings = _settings(folder)
    _require_bert(folder, settings)
    lines = _lines(folder / VOCABULARY)
    vocabulary = {text: token_id for token_id, text in enumerate(lines)}
    differing = next((i for i, t in enumerate(lines) if token_map.texts.get(i) != t), None)
    if differing is not None:
        raise LexigraftError(
            f"{folder}: line {differing + 1} of {VOCABULARY} is {lines[differing]!r}, "
            f"tokenizer.json gives id {differing} {token_map.texts.get(differing)!r}",
            needed="files of one tokenizer",
            fix=f"remove the one that does not belong to this model, often {folder / VOCABULARY}",
        )
    names = {key: settings.get(key, default) for key, default in _SPECIAL_KEYS.items()}
    special = [_content(name) for name in names.values() if name]
    special += map(_content, settings.get("additional_special_tokens") or ())
    added = {
        **{text: False for i, text in sorted(token_map.texts.items()) if i in token_map.added},
        **{token_map.texts[i]: True for i in sorted(token_map.special)},
        **dict.fromkeys(special, True),
    }
    ids = token_map.ids
    lost = next((text for text in added if text not in ids), None)
    if lost is not None:
        raise LexigraftError(
            f"{folder}: the special token {lost!r} has no line in {VOCABULARY} and no id in any "
            "file; loaders give it the next free id, which new tokens would take",
            needed="an id for every special token",
            fix=f"echo '{lost}' >> {folder / VOCABULARY}",
        )
    engine = Tokenizer(models.WordPiece(vocabulary, unk_token=_content(names["unk_token"])))
    engine.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece(prefix="##")
    data: dict[str, Any] = json.loads(engine.to_str())
    data["added_tokens"] = [
        {
            "id": ids[text],
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": not is_special,
            "special": is_special,
        }
        for text, is_special in sorted(added.items(), key=lambda item: ids[item[0]])
    ]
    first, last = (ids.get(_content(names[key])) for key in ("cls_token", "sep_token"))
    if first is not None and last is not None:
        data["post_processor"] = {"type": "BertProcessing", "sep": [_content(names["sep_token"]),
            last], "cls": [_content(names["cls_token"]), first]}  # fmt: skip
    return data


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, as loaders read them."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            data = read_json(path)
            settings.update(data if isinstance(data, dict) else {})
    return settings


def _require_bert(folder: Path, settings: Mapping[str, Any]) -> None:
    """vocab.txt is a name that other tokenizers use too."""
    name = settings.get("tokenizer_class")
    if name is None or name in _BERT_CLASSES or (folder / "tokenizer.json").is_file():
        return
    raise RefusalError(
        f"{folder / VOCABULARY} is read by {name}, which is not BERT's WordPiece",
        needed="vocab.txt of a BERT tokenizer, or a tokenizer.json: another class cuts words "
        "in its own way, so new lines would be other tokens than those learned",
        fix="save the tokenizer with transformers as tokenizer.json, if its class can",
    )


def _lines(path: Path) -> list[str]:
    """The tokens of vocab.txt by id."""
    data = path.read_bytes()
    if b"\r" in data.replace(b"\r\n", b""):
        raise LexigraftError(
            f"{path} holds a carriage return inside a line: Python's readers end the line there, "
            "the tokenizers library does not",
            needed="one token a line, so that ids do not depend on the reader",
            fix=f"grep -n $'\\r' {path}",
        )
    lines = data.decode("utf-8").split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
