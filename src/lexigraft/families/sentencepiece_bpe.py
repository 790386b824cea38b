"""SentencePiece BPE with byte fallback: Llama 2 and Mistral kinds.

Held as `tokenizer.model`, `tokenizer.json` or both; all that the base has are extended and equal.

SentencePiece keeps no merge list: it joins any adjacent pair whose concatenation is a piece, the
piece of the best score first. Three things follow.

- New pieces score below every old one, whitespace runs (-1e9 in Llama 2) included, each one
  float32 step below the last: then every text is segmented as before and only then coarsened.
- `tokenizer.json`, whose merge list is explicit, needs every split of a new piece into two
  pieces, in the order of the scores.
- A new piece must not be what a base piece that was never formed waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sentencepiece
from tokenizers import Tokenizer

from lexigraft.families.byte_level import (
    content_hash,
    extend_json,
    open_engine,
    plain_model,
    template_start,
)
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.implicit import (
    beginnings_and_ends,
    formed_alike,
    last_pair,
    ordered_splits,
)
from lexigraft.families.renumbering import (
    Needs,
    joined_needs,
    needs_by_list,
    needs_by_rank,
)
from lexigraft.families.sentencepiece_model import (
    BYTE_PIECES,
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
from lexigraft.families.spelling import is_word
from lexigraft.families.units import UnitCounter, Units, batches
from lexigraft.files import read_object, sha256_bytes, sha256_json

if TYPE_CHECKING:
    from lexigraft.families.replay import Replayed


class SentencePieceBPE(SentencePieceFiles):
    """See `lexigraft.families.Family`."""

    name = "SentencePiece BPE"
    implicit = True
    guaranteed = True
    unknown_id: int | None = None

    def __init__(
        self, folder: Path, *, model_file: Path | None, data: dict[str, Any] | None
    ) -> None:
        super().__init__(folder, model_file=model_file, data=data)
        self._processor = processor_of(self._proto) if self._proto is not None else None
        self._spelled: dict[str, list[str]] = {}  # new token -> base tokens and letters

    @cached_property
    def content_hash(self) -> str:
        """Hash of what decides ids, over each format that the folder holds."""
        parts = {}
        if self._data:
            parts["tokenizer.json"] = content_hash(self.name, self._data)
        if self._proto is not None:
            pieces = [[p.piece, p.score, p.type] for p in self._proto.pieces]
            normalizer = sha256_bytes(self._proto.normalizer_spec.SerializeToString())
            parts["tokenizer.model"] = sha256_json([pieces, normalizer])
        return sha256_json(parts)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        if self._engine is not None:
            batch = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in batch]
        return self._sentencepiece_encode(texts)

    def _sentencepiece_encode(self, texts: Sequence[str]) -> list[list[int]]:
        assert self._processor is not None
        encoded: list[list[int]] = self._processor.encode(list(texts))
        return encoded

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`."""
        if self._engine is not None:
            return str(self._engine.decode(list(ids), skip_special_tokens=skip_special))
        assert self._processor is not None
        kept = [i for i in ids if not (skip_special and i in self.map.special)]
        return str(self._processor.decode(kept))

    @property
    def sentencepiece_proto(self) -> Any:
        """The parsed `.model`; None where the base has none."""
        return self._proto

    def start_ids(self) -> list[int]:
        """bos where the template or the config asks for it."""
        if self._engine is not None:
            return template_start(self._engine)
        path = self.folder / "tokenizer_config.json"
        config = read_object(path) if path.is_file() else {}
        bos = self._proto.trainer_spec.bos_id
        return [bos] if config.get("add_bos_token", True) and bos >= 0 else []

    def pieces(self, token: str, *, added: bool = False) -> list[int]:
        """Ids that spell `token`, without prefix, normalizer and added tokens."""
        spelled = token.replace(" ", SPACE) if added else token
        if self._plain_processor is not None:
            encoded: list[int] = self._plain_processor.encode(spelled)
            return encoded
        return list(self._plain_engine.encode(spelled, add_special_tokens=False).ids)

    @cached_property
    def _plain_processor(self) -> sentencepiece.SentencePieceProcessor | None:
        return processor_of(without_prefix(self._proto)) if self._proto is not None else None

    @cached_property
    def _plain_engine(self) -> Tokenizer:
        assert self._data is not None
        return open_engine(plain_model(self._data))

    def count_units(self, chunks: Mapping[str, int]) -> Units:
        """The stretches of `chunks` in which new tokens may arise, as base tokens.

        Chunks are cut inside texts, so no dummy prefix is put before them; `prefix` is what a
        whole text gets.
        """
        pieces = self.map.texts
        counter = UnitCounter(
            pieces,
            self.token_bytes,
            excluded=self.map.added | self.map.special,
            byte_pieces=(i for i, text in pieces.items() if text in BYTE_PIECES),
        )
        for texts, weights in batches(chunks):
            if self._plain_processor is not None:
                counter.add(self._plain_encode(texts), weights)
                continue
            batch = self._inner_engine.encode_batch(texts, add_special_tokens=False)
            words = [encoding.word_ids for encoding in batch] if self._splits_words else None
            counter.add([encoding.ids for encoding in batch], weights, words)
        return counter.units()

    @cached_property
    def _splits_words(self) -> bool:
        return self._data is not None and splits_words(self._data)

    def _plain_encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._plain_processor is not None:
            encoded: list[list[int]] = self._plain_processor.encode(list(texts), num_threads=-1)
            return encoded
        spelled = [text.replace(" ", SPACE) for text in texts]
        batch = self._plain_engine.encode_batch(spelled, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def written(self, text: str) -> list[str]:
        """`text` as tokens of this family are spelled in the files."""
        return [text.replace(" ", SPACE)]

    def replay(self, units: Units, merges: Sequence[Merge]) -> Replayed:
        """What this tokenizer extended by `merges` makes of `units`."""
        from lexigraft.families.replay import replay

        return replay(units, merges, implicit=self.implicit)

    def join(self, left: str, right: str) -> str | None:
        """The piece of two parts, unless it is no word, known, or awaited by a dead base piece."""
        token = left + right
        if not is_word(spaced(token)) or token in self.map.ids or token in self._awaited:
            return None
        return token

    @cached_property
    def _awaited(self) -> frozenset[str]:
        """Every beginning and end of a base piece that the base itself never forms."""
        pieces = [
            (token_id, text)
            for token_id, text in self.map.texts.items()
            if token_id not in self.map.added | self.map.special and text not in BYTE_PIECES
        ]
        read = self._plain_encode([text.replace(SPACE, " ") for _, text in pieces])
        dead = [
            text for (token_id, text), ids in zip(pieces, read, strict=True) if ids != [token_id]
        ]
        return beginnings_and_ends(dead)

    def admits(self, merges: Sequence[Merge]) -> list[Merge]:
        """`merges` that both engines form alike, each with the parts it is made of."""
        return formed_alike(merges, self.map.ids, self._derived)

    def _derived(self, merges: Sequence[Merge]) -> Iterable[Merge]:
        places = {merge.token: place for place, merge in enumerate(merges)}
        adopted = {merge.token for merge in merges if merge.right is None}
        spelled = self._letters([merge.token for merge in merges if merge.right is not None])
        for merge in merges:
            if merge.right is None:
                yield merge
                continue
            symbols = spelled[merge.token]
            closed = any(s not in self.map.ids and s not in adopted for s in symbols)
            parts = None if closed else last_pair(symbols, places, merge.token)
            if parts is not None:
                yield merge._replace(left=parts[0], right=parts[1])

    def _letters(self, tokens: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Each token as base tokens; a letter in byte pieces is itself."""
        fresh = [token for token in tokens if token not in self._spelled]
        for token, ids in zip(
            fresh, self._plain_encode([t.replace(SPACE, " ") for t in fresh]), strict=True
        ):
            pieces = [self.map.texts[token_id] for token_id in ids]
            symbols: list[str] = []
            for spelled, run in groupby(pieces, key=BYTE_PIECES.__contains__):
                if spelled:
                    data = bytes(BYTE_PIECES[piece] for piece in run)
                    symbols += data.decode("utf-8", "replace")
                else:
                    symbols += run
            self._spelled[token] = symbols
        return self._spelled

    def needs(self) -> Needs:
        """By the merges of tokenizer.json, by the scores of the `.model`, or by both."""
        found: Needs = {}
        if self._data is not None:
            model = self._data["model"]
            read = self._plain_engine.encode_batch(list(model["vocab"]), add_special_tokens=False)
            found = needs_by_list(model["vocab"], (e.ids for e in read), model["merges"])
        if self._plain_processor is not None:
            ids = {piece.piece: place for place, piece in enumerate(self._proto.pieces)}
            spelled = [piece.replace(SPACE, " ") for piece in ids]
            ranks = {piece.piece: -piece.score for piece in self._proto.pieces}
            by_score = needs_by_rank(ids, self._plain_processor.encode(spelled), ranks)
            found = joined_needs(found, by_score)
        fixed = self.fixed
        return {i: parts for i, parts in found.items() if i not in fixed}

    def limits(self) -> list[str]:
        """Nothing that a user must know."""
        return []

    def engines(self) -> dict[str, Any]:
        """Every engine that reads one of the files: name -> encode of a list of texts."""
        readers: dict[str, Any] = {}
        if self._engine is not None:
            readers["tokenizers"] = self.encode_batch
        if self._processor is not None:
            readers["sentencepiece"] = self._sentencepiece_encode
        return readers

    def _extended_proto(self, merges: Sequence[Merge]) -> Any:
        proto = copy_of(self._proto)
        # Ids behind the model belong to added tokens: pieces of the same text keep them there.
        for token_id in range(len(proto.pieces), self.map.tokens):
            text = self.map.texts.get(token_id)
            piece = proto.pieces.add()
            piece.piece = text if text is not None else f"<unused_{token_id}>"
            piece.score, piece.type = 0.0, UNUSED if text is None else USER_DEFINED
        score = np.float32(min(p.score for p in self._proto.pieces))
        for merge in merges:
            score = np.nextafter(score, np.float32(-np.inf), dtype=np.float32)
            piece = proto.pieces.add()
            piece.piece, piece.score, piece.type = merge.token, float(score), NORMAL
        proto.trainer_spec.vocab_size = len(proto.pieces)
        return without_self_test(proto)

    def _extended_data(self, merges: Sequence[Merge]) -> dict[str, Any]:
        assert self._data is not None
        tokens = [merge.token for merge in merges]
        first = self.map.tokens
        ids = {**self.map.ids, **{token: first + place for place, token in enumerate(tokens)}}
        pairs = [pair for token in tokens for pair in ordered_splits(token, ids)]
        return extend_json(self._data, tokens, pairs, first)
