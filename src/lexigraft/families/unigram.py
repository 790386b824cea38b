"""Unigram: T5, Pegasus and XLM-R kinds, as a SentencePiece `.model`, `tokenizer.json` or both.

A text is cut along the path of the best sum of scores (Kudo 2018, arXiv 1804.10959), so a new
token moves old text unless its score says exactly what its spelling said before. It gets the sum
of the scores of its base pieces, and a little more for each token saved:

    score = score(p1) + ... + score(pk) + DELTA * (k - 1)

Any path through new tokens, each written out again in base pieces, is a path of the base with
the same score but for these little gifts. So the best path is the base's best path, coarsened
where that saves most, unless another path of the base comes within a few hundredths of the best.
How much text that is was measured: see DELTA.

A character without a piece (`<unk>`) gets the score that the base gives an unknown character:
then each path weighs as before. The unknown score itself is 10 below the lowest piece and sinks
with the new ones, which only makes texts with unknown characters come out closer to the text.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from tokenizers import Tokenizer

from lexigraft.errors import LexigraftError
from lexigraft.families.byte_level import (
    open_engine,
    template_start,
)
from lexigraft.families.continued_bpe import Merge, Unit
from lexigraft.families.layouts import layout_of, tokenizer_class
from lexigraft.families.plain import PlainCounting
from lexigraft.families.renumbering import Needs, joined_needs, needs_of_paths
from lexigraft.families.sentencepiece_model import (
    BYTE_PIECES,
    CONTROL,
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
    SentencePieceFiles,
    copy_of,
    processor_of,
    spaced,
    splits_words,
    without_prefix,
    without_self_test,
)
from lexigraft.families.spelling import is_word, script_of
from lexigraft.families.tokenmap import TokenMap, token_text
from lexigraft.families.units import Units, batches
from lexigraft.files import read_object, sha256_bytes, sha256_json

# What a saved token is worth, in nats. The more, the more near-ties of the base turn (of 32,000
# distinct words of English Wikipedia, T5 cut 0 otherwise at 0.001, 3 at 0.01 and 25 at 0.1); the
# less, the earlier the float32 sums of long lines lose it (at 0.001 at 100,000 characters; at
# 0.01 not much at a million).
DELTA = 0.01
_UNKNOWN_PENALTY = 10.0  # kUnkPenalty in both engines: an unknown character is that far below all
_ADOPTION = 2  # an unknown character loses its text: adopting it is worth one saved token
# SentencePiece adds up the scores of a whole text in float32, whose step behind 1,000 characters
# of English is a fortieth of DELTA. Longer texts are proved in parts.
_PROOF_CHARACTERS = 1000
_LIMIT = (
    "SentencePiece adds up scores along a text in float32: the laws are proved in stretches of "
    f"{_PROOF_CHARACTERS:,} characters; in far longer ones, with the base as with the extension, "
    "roundings decide where two spellings nearly tie"
)


class Unigram(SentencePieceFiles, PlainCounting):
    """See `lexigraft.families.Family`.

    Attributes:
        guaranteed: False: coarsening holds but for near-ties, so each new token is to be proved.
        unknown_id: id of what has no piece, or None.
    """

    name = "Unigram"
    implicit = True
    guaranteed = False

    def __init__(
        self, folder: Path, *, model_file: Path | None, data: dict[str, Any] | None
    ) -> None:
        super().__init__(folder, model_file=model_file, data=data)
        self._ids: list[int] = []  # place in the .model -> id
        if model_file:
            self._ids = _ids_of_places(self._proto, self.map, model_file)
            self._proto = self._with_gap_filled(self._proto)
            self._processor = processor_of(self._proto)

    @property
    def unknown_id(self) -> int | None:
        """The id of text that has no piece."""
        if self._data is not None:
            unknown = self._data["model"].get("unk_id")
            return None if unknown is None else int(unknown)
        return self._ids[self._processor.unk_id()]

    @cached_property
    def content_hash(self) -> str:
        """Hash of what decides ids, over each format that the folder holds."""
        parts: dict[str, Any] = {"family": self.name}
        if self._engine is not None:
            data = json.loads(self._engine.to_str())  # as the engine itself spells it
            model = data["model"]
            settings = ("normalizer", "pre_tokenizer", "decoder")
            added = sorted((token["id"], token["content"]) for token in data["added_tokens"])
            parts["tokenizer.json"] = sha256_json(
                [model["vocab"], model["unk_id"], model["byte_fallback"], added]
                + [data[part] for part in settings]
            )
        if self._proto is not None:
            pieces = [[p.piece, p.score, p.type] for p in self._proto.pieces]
            normalizer = sha256_bytes(self._proto.normalizer_spec.SerializeToString())
            parts["tokenizer.model"] = sha256_json([pieces, self._ids, normalizer])
        return sha256_json(parts)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        if self._engine is not None:
            batch = self._engine.encode_batch(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in batch]
        return self._sentencepiece_encode(texts)

    def _sentencepiece_encode(self, texts: Sequence[str]) -> list[list[int]]:
        batch: list[list[int]] = self._processor.encode(list(texts))
        return [[self._ids[place] for place in places] for places in batch]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; ids of the class alone, which no piece has, have none."""
        if self._engine is not None:
            return str(self._engine.decode(list(ids), skip_special_tokens=skip_special))
        kept = [i for i in ids if not (skip_special and i in self.map.special)]
        return str(self._processor.decode([self._places[i] for i in kept if i in self._places]))

    @cached_property
    def _places(self) -> dict[int, int]:
        return {token_id: place for place, token_id in enumerate(self._ids)}

    def start_ids(self) -> list[int]:
        """What the template puts before a text; without one, bos where the settings ask for it."""
        if self._engine is not None:
            return template_start(self._engine)
        path = self.folder / "tokenizer_config.json"
        config = read_object(path) if path.is_file() else {}
        bos = self._processor.bos_id()
        return [self._ids[bos]] if config.get("add_bos_token") and bos >= 0 else []

    def pieces(self, token: str, *, added: bool = False) -> list[int]:
        """Ids that spell `token`, without prefix, normalizer and added tokens."""
        spelled = token.replace(" ", SPACE) if added else token
        if self._proto is not None:
            return [self._ids[place] for place in self._plain_processor.encode(spelled)]
        return list(self._plain_engine.encode(spelled, add_special_tokens=False).ids)

    @cached_property
    def _plain_processor(self) -> sentencepiece.SentencePieceProcessor:
        return processor_of(_plain_proto(self._proto))

    @cached_property
    def _plain_engine(self) -> Tokenizer:
        assert self._data is not None
        return open_engine(_plain_data(self._data))

    def count_units(self, chunks: Mapping[str, int]) -> Units:
        """The stretches of `chunks` in which new tokens may arise, as base tokens.

        Chunks are cut inside texts, so no dummy prefix is put before them; `prefix` is what a
        whole text gets.
        """
        counted: Counter[Unit] = Counter()
        total = 0
        for texts, weights in batches(chunks):
            for words, weight in zip(self._words_of(texts), weights, strict=True):
                total += weight * sum(map(len, words))
                for word in words:
                    for unit in self._units_of(word):
                        counted[unit] += weight
        units = Units.from_tuples(counted, self.map.ids, self.adoptable(counted))
        return replace(units, total=total)

    def units(self, texts: Sequence[str]) -> Iterator[Unit]:
        """The stretches of `texts` in which new tokens may arise, as base tokens."""
        for words in self._words_of(texts):
            for word in words:
                yield from self._units_of(word)

    def _units_of(self, tokens: Sequence[str]) -> Iterator[Unit]:
        """Stretches end before `▁` and at every token that cannot be part of a word.

        A letter that the base has no piece for stands as itself.
        """
        unit: list[str] = []
        for symbol in self._symbols(tokens):
            if symbol is None or symbol.startswith(SPACE):
                if self._is_unit(unit):
                    yield tuple(unit)
                unit = []
            if symbol is not None:
                unit.append(symbol)
        if self._is_unit(unit):
            yield tuple(unit)

    def _words_of(self, chunks: Sequence[str]) -> list[list[list[str]]]:
        """The tokens of each chunk, by the words that the pre-tokenizer makes where it splits more.

        What is unknown stands there as it is written in the (normalised) text.
        """
        if self._proto is not None:
            tokens: list[list[str]] = self._chunk_processor.encode(list(chunks), out_type=str)
            return [[one] for one in tokens]
        assert self._data is not None
        batch = self._inner_engine.encode_batch(list(chunks), add_special_tokens=False)
        if not splits_words(self._data):
            return [[encoding.tokens] for encoding in batch]
        return [
            [
                [token for _, token in word]
                for _, word in groupby(
                    zip(encoding.word_ids, encoding.tokens, strict=True), key=itemgetter(0)
                )
            ]
            for encoding in batch
        ]

    @cached_property
    def _chunk_processor(self) -> sentencepiece.SentencePieceProcessor:
        return processor_of(without_prefix(self._proto))

    @property
    def proof_characters(self) -> int | None:
        """How long the texts may be on which the laws are proved; None for any length."""
        return _PROOF_CHARACTERS if self._proto is not None else None

    def limits(self) -> list[str]:
        """What a user must know of this kind of tokenizer."""
        return [_LIMIT] if self._proto is not None else []

    def _symbols(self, tokens: Iterable[str]) -> Iterator[str | None]:
        """Tokens, letters out of bytes and out of unknown text, None for what ends a stretch."""
        spelled = bytearray()
        for token in tokens:
            if token in BYTE_PIECES:
                spelled.append(BYTE_PIECES[token])
                continue
            yield from _letters(spelled.decode("utf-8", "replace"))
            spelled.clear()
            token_id = self.map.ids.get(token)
            if token_id is None:
                yield from _letters(token)
            elif token_id in self.map.special or token_id in self.map.added:
                yield None
            else:
                yield token if _is_joinable(token) else None
        yield from _letters(spelled.decode("utf-8", "replace"))

    def _is_unit(self, unit: Sequence[str]) -> bool:
        """A stretch with something to join, or a letter to adopt."""
        return len(unit) > 1 or (len(unit) == 1 and unit[0] not in self.map.ids)

    def adoptable(self, units: Iterable[Unit]) -> Mapping[str, int]:
        """Letters without a piece -> the bytes that spell each now, or what `<unk>` is worth."""
        letters = {symbol for unit in units for symbol in unit if symbol not in self.map.ids}
        return {
            letter: len(letter.encode()) if self._byte_fallback else _ADOPTION for letter in letters
        }

    @property
    def _byte_fallback(self) -> bool:
        if self._data is not None:
            return bool(self._data["model"].get("byte_fallback"))
        return bool(self._proto.trainer_spec.byte_fallback)

    def join(self, left: str, right: str) -> str | None:
        """The piece of two parts, unless it is no word or known."""
        token = left + right
        return None if token in self.map.ids or not is_word(spaced(token)) else token

    def admits(self, merges: Sequence[Merge]) -> list[Merge]:
        """`merges` without those whose own spelling is a near-tie, or would outweigh every piece.

        Where two spellings of a token come within DELTA of each other, the engines' roundings
        decide between them, differently from place to place. The parts of the others are left
        empty: a Unigram token is found as a whole, so none needs a bridge.
        """
        return [
            merge if merge.right is None else Merge(merge.token, "", "", merge.occurrences)
            for merge in merges
            if all(scores.is_clear(merge.token) for scores in self._all_scores)
        ]

    def emitted(self, merges: Sequence[Merge], stretches: Sequence[str]) -> list[list[str]]:
        """Tokens of each stretch (as `units` spells it) under the base extended by `merges`."""
        if self._proto is not None:
            processor = processor_of(_plain_proto(self._extended_proto(merges)))
            tokens: list[list[str]] = processor.encode(list(stretches), out_type=str)
            return tokens
        engine = open_engine(_plain_data(self._extended_data(merges)))
        return [e.tokens for e in engine.encode_batch(list(stretches), add_special_tokens=False)]

    def extend(self, merges: Sequence[Merge], output: Path) -> None:
        """Write this tokenizer with `merges` appended into `output`, in each of its formats."""
        super().extend(merges, output)
        if self._model_name is not None:
            self._settle_sentinels(output / "tokenizer_config.json")

    def _ids_in_file(self, pieces: int) -> Sequence[int]:
        return self._ids[:pieces]

    @property
    def fixed(self) -> frozenset[int]:
        """Also the lowest and the highest piece, by which the engines score what is none."""
        ends: set[int] = set()
        if self._proto is not None:
            normal = [i for i, p in enumerate(self._proto.pieces) if p.type == NORMAL]
            score = {self._ids[i]: self._proto.pieces[i].score for i in normal}
            ends |= {min(score, key=score.__getitem__), max(score, key=score.__getitem__)}
        if self._data is not None:
            scores = [score for _, score in self._data["model"]["vocab"]]
            ends |= {scores.index(min(scores)), scores.index(max(scores))}
        unknown = set() if self.unknown_id is None else {self.unknown_id}
        return super().fixed | ends | unknown

    def needs(self) -> Needs:
        """A piece that the best path never takes needs those that it takes instead."""
        fixed = self.fixed
        own = {text: i for i, text in self.map.texts.items() if i not in fixed}
        found: Needs = {}
        if self._proto is not None:
            read = self._plain_processor.encode(list(own))
            ids = ([self._ids[place] for place in places] for places in read)
            found = needs_of_paths(own.values(), ids)
        if self._data is not None:
            batch = self._plain_engine.encode_batch(list(own), add_special_tokens=False)
            by_list = needs_of_paths(own.values(), (e.ids for e in batch))
            found = joined_needs(found, by_list)
        return found

    def engines(self) -> dict[str, Any]:
        """Every engine that reads one of the files: name -> encode of a list of texts."""
        readers: dict[str, Any] = {}
        if self._engine is not None:
            readers["tokenizers"] = self.encode_batch
        if self._proto is not None:
            readers["sentencepiece"] = self._sentencepiece_encode
        if self._engine is None:
            readers["converted"] = self._converted_encode
        return readers

    def _converted_encode(self, texts: Sequence[str]) -> list[list[int]]:
        """A lone `.model` as loaders convert it for tokenizers: the scores summed in float64."""
        normalised = [self._processor.normalize(text) for text in texts]
        batch = self._converted.encode_batch(normalised, add_special_tokens=False)
        return [[self._ids[place] for place in encoding.ids] for encoding in batch]

    @cached_property
    def _converted(self) -> Tokenizer:
        scores = self._proto_scores
        vocabulary = []
        for piece in self._proto.pieces:
            score = piece.score
            if piece.type == USER_DEFINED:  # as SentencePiece scores them
                score = len(piece.piece.encode()) * scores.highest - 0.1
            elif piece.type != NORMAL:
                score = 2 * len(piece.piece) * scores.unknown
            vocabulary.append([piece.piece, score])
        model = {
            "type": "Unigram",
            "unk_id": self._processor.unk_id(),
            "vocab": vocabulary,
            "byte_fallback": self._byte_fallback,
        }
        return open_engine(_plain_data({"model": model}))

    def _with_gap_filled(self, proto: Any) -> Any:
        """`proto` with a piece for each id behind it, so that new pieces come behind them all.

        Special tokens become control pieces, which text never becomes; others user-defined ones.
        """
        filled = copy_of(proto)
        known = {piece.piece for piece in proto.pieces}
        for token_id in range(self._ids[-1] + 1, self.map.tokens):
            text = self.map.texts.get(token_id)
            piece = filled.pieces.add()
            piece.score = 0.0
            if text is None or text in known:
                piece.piece, piece.type = f"<unused_{token_id}>", UNUSED
            else:
                special = token_id in self.map.special
                piece.piece, piece.type = text, CONTROL if special else USER_DEFINED
            known.add(piece.piece)
            self._ids.append(token_id)
        filled.trainer_spec.vocab_size = len(filled.pieces)
        return without_self_test(filled)

    def _settle_sentinels(self, path: Path) -> None:
        """T5's loaders put `extra_ids` sentinels behind the `.model`; it now holds them itself."""
        sentinels = layout_of(path.parent).tail
        if not sentinels or self._model_name is None:
            return
        config = read_object(path) if path.is_file() else {}
        config.setdefault("tokenizer_class", tokenizer_class(self.folder))
        config["extra_ids"] = 0
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(config.get(key), list):
                config[key] = [t for t in config[key] if token_text(t) not in sentinels]
        decoder = dict(config.get("added_tokens_decoder") or {})
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for text in sentinels:
            entry = {"content": text, **flags, "special": True}
            decoder.setdefault(str(self.map.ids[text]), entry)
        config["added_tokens_decoder"] = decoder
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")

    def _extended_proto(self, merges: Sequence[Merge]) -> Any:
        proto = copy_of(self._proto)
        for token, score in self._proto_scores.of(merges):
            piece = proto.pieces.add()
            piece.piece, piece.score, piece.type = token, float(np.float32(score)), NORMAL
        proto.trainer_spec.vocab_size = len(proto.pieces)
        return proto

    def _extended_data(self, merges: Sequence[Merge]) -> dict[str, Any]:
        assert self._data is not None
        model = self._data["model"]
        vocabulary = list(model["vocab"])
        for token_id in range(len(vocabulary), self.map.tokens):
            text = self.map.texts.get(token_id, f"<unused_{token_id}>")
            # Below any other spelling: an added token is found in the text, never by the model.
            vocabulary.append([text, 2 * len(text) * self._data_scores.unknown])
        vocabulary.extend([token, score] for token, score in self._data_scores.of(merges))
        return {**self._data, "model": {**model, "vocab": vocabulary}}

    @cached_property
    def _all_scores(self) -> list[_Scores]:
        scores = [self._data_scores] if self._data is not None else []
        return [*scores, self._proto_scores] if self._proto is not None else scores

    @cached_property
    def _proto_scores(self) -> _Scores:
        normal = {p.piece: p.score for p in self._proto.pieces if p.type == NORMAL}
        return _Scores(normal, min(normal.values()), max(normal.values()))

    @cached_property
    def _data_scores(self) -> _Scores:
        assert self._data is not None
        every: dict[str, float] = dict(self._data["model"]["vocab"])
        ids = self.map.ids  # without vacant ones
        words = [score for token, score in every.items() if ids.get(token) not in self._apart]
        return _Scores(every, min(every.values()), max(words))

    @cached_property
    def _apart(self) -> frozenset[int]:
        return self.map.added | self.map.special


class _Spelling(NamedTuple):
    """The best way to spell a token in base pieces.

    Attributes:
        score: the sum of its scores.
        margin: how far the next best way is below it.
        parts: its number of pieces, unknown characters counted one by one.
    """

    score: float
    margin: float
    parts: int


class _Scores:
    """Scores of new tokens, under the scores that one file gives the base's."""

    def __init__(self, pieces: Mapping[str, float], lowest: float, highest: float) -> None:
        self.unknown = lowest - _UNKNOWN_PENALTY
        self._pieces = pieces
        self.highest = highest
        self._longest = max(map(len, pieces))
        self._spellings: dict[str, _Spelling] = {}

    def of(self, merges: Sequence[Merge]) -> Iterator[tuple[str, float]]:
        """(token, score) of each, in order."""
        for merge in merges:
            spelling = self.spell(merge.token)
            yield merge.token, spelling.score + _bonus(merge.token, spelling.parts)

    def is_clear(self, token: str) -> bool:
        """True if no rounding decides how the base spells it, and it stays below the best piece."""
        spelling = self.spell(token)
        score = spelling.score + _bonus(token, spelling.parts)
        return spelling.margin > DELTA and score < self.highest

    def spell(self, token: str) -> _Spelling:
        """The best spelling by Viterbi's algorithm, as both engines do it, in float64."""
        if token not in self._spellings:
            self._spellings[token] = self._spell(token)
        return self._spellings[token]

    def _spell(self, token: str) -> _Spelling:
        # For each end: the best sum, its number of pieces, and the best sum of any other path.
        none = float("-inf")
        ways = [(0.0, 0, none)] + [(none, 0, none)] * len(token)
        for start in range(len(token)):
            for end in range(start + 1, min(len(token), start + self._longest) + 1):
                score = self._pieces.get(token[start:end])
                if score is None:
                    if end > start + 1:
                        continue
                    score = self.unknown
                best, parts, second = ways[start]
                ways[end] = _better(ways[end], (best + score, parts + 1, second + score))
        score, parts, second = ways[-1]
        return _Spelling(score, score - second, parts)


def _bonus(token: str, parts: int) -> float:
    """DELTA for each token that `token` saves, and up to a quarter of it more or less by its text.

    Of two ways to save as much (ab c, a bc), one must win in float32 and in float64 alike,
    wherever it stands in a text: the wider the range, the seldomer their difference is lost. But
    one that saves less may not win over one that saves more: that holds where both together have
    at most four new tokens, for example one against three.
    """
    if parts == 1:
        return 0.0
    by_text = zlib.crc32(token.encode()) / 2**32 - 0.5
    return DELTA * (parts - 1 + by_text / 2)


_Way = tuple[float, int, float]


def _better(old: _Way, new: _Way) -> _Way:
    """Both sets of paths as one: its best, and the second best of all."""
    first, other = (new, old) if new[0] > old[0] else (old, new)
    return first[0], first[1], max(first[2], other[0])


def _ids_of_places(proto: Any, token_map: TokenMap, path: Path) -> list[int]:
    """Place in the `.model` -> id, by the pieces' texts: the class may have moved them."""
    ids = []
    for place, piece in enumerate(proto.pieces):
        same = token_map.texts.get(place) == piece.piece
        token_id = place if same else token_map.ids.get(piece.piece)
        if token_id is None:
            raise LexigraftError(
                f"{path} holds {piece.piece!r}, which is no token of this folder",
                needed="files of one tokenizer",
                fix=f"remove the file that does not belong to this model, for example {path.name}",
            )
        ids.append(token_id)
    if ids[-1] != max(ids):
        raise LexigraftError(
            f"{path}: its last piece has id {ids[-1]}, another piece id {max(ids)}",
            needed="pieces in the order of their ids, so that new ones can follow",
            fix=f"keep tokenizer.json alone: remove {path.name} from the folder",
        )
    return ids


@lru_cache(maxsize=2**16)
def _is_joinable(token: str) -> bool:
    """True for letters and marks, and for `▁` alone or before them."""
    body = token.removeprefix(SPACE)
    return all(script_of(character) is not None for character in body)


def _letters(text: str) -> Iterator[str | None]:
    for character in text:
        yield character if script_of(character) is not None else None


def _plain_proto(proto: Any) -> Any:
    """The model alone, for text that is normalised already."""
    plain = without_prefix(proto)
    plain.normalizer_spec.precompiled_charsmap = b""
    return plain


def _plain_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """The Unigram model alone: no normalizer, no pre-tokenizer, no added tokens."""
    bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": [], **bare, "model": data["model"]}
