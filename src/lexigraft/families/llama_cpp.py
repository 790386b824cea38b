"""llama.cpp: the text by which its converter knows a tokenizer, and its SentencePiece tokenizer.

llama.cpp's converter names the pre-tokenizer of a byte-level model by the hash of the ids of one
fixed text; a tokenizer that reads this text in another way is refused as unknown. Its "llama"
(SPM) tokenizer joins characters by the scores of the pieces; it is simulated here, so that an
extended `tokenizer.model` can be proved for GGUF without building llama.cpp.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

SPACE = "\u2581"
BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_USER_DEFINED, _BYTE = 4, 6  # sentencepiece_model.proto, ModelProto.SentencePiece.Type

# `CHK_TXT` of ggml-org/llama.cpp (MIT), convert_hf_to_gguf_update.py. tests/test_llama_cpp.py
# compares the hashes that it gives with those that llama.cpp lists.
_CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


def check_text() -> str:
    """The text whose ids tell llama.cpp's converter which pre-tokenizer a model has."""
    return _CHECK_TEXT


def simulate(proto: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """llama.cpp's SPM tokenizer over the pieces of a SentencePiece model: an encode of texts.

    Method: llm_tokenizer_spm in llama.cpp's src/llama-vocab.cpp. A queue holds each adjacent pair
    whose concatenation is a piece, whatever its type; the best score is joined first, then the
    leftmost. What is no piece at the end is spelled in byte pieces. A space becomes `▁`, and one
    is put before the text where the model says so; no other normaliser is applied.
    """
    return _Spm(proto).encode_batch


class _Spm:
    def __init__(self, proto: Any) -> None:
        self._ids = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
        self._scores = [piece.score for piece in proto.pieces]
        self._bytes = {
            int(piece.piece[3:-1], 16): token_id
            for token_id, piece in enumerate(proto.pieces)
            if piece.type == _BYTE and BYTE_PIECE.fullmatch(piece.piece)
        }
        self._prefix = " " if proto.normalizer_spec.add_dummy_prefix else ""
        defined = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type == _USER_DEFINED]
        longest_first = sorted(defined, key=len, reverse=True)
        self._defined = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self._encode(text)) for text in texts]

    def _encode(self, text: str) -> Iterator[int]:
        """User-defined pieces are cut out first; each stretch between them gets the prefix."""
        done = 0
        for match in self._defined.finditer(text):
            yield from self._join(text[done : match.start()])
            yield self._ids[match.group().replace(" ", SPACE)]
            done = match.end()
        yield from self._join(text[done:])

    def _join(self, text: str) -> Iterator[int]:
        if not text:
            return
        symbols = list((self._prefix + text).replace(" ", SPACE))
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            joined = symbols[left] + symbols[right]
            token_id = self._ids.get(joined)
            if token_id is not None:
                heapq.heappush(queue, (-self._scores[token_id], left, right, len(joined)))

        for place in range(len(symbols) - 1):
            offer(place, place + 1)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            stale = not symbols[left] or not symbols[right]
            if stale or len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        for symbol in filter(None, symbols):
            if symbol in self._ids:
                yield self._ids[symbol]
            else:
                yield from (self._bytes[byte] for byte in symbol.encode("utf-8", "replace"))
