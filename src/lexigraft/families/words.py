"""The words that a byte-level tokenizer's pre-tokenizer makes of many short chunks of text.

Calling the engine for each chunk costs more than joining its bytes. Most chunks are alike: some
marks, one run of Han or of small Latin letters, some marks. How such a chunk is split depends on
its marks alone, so the engine is asked once for each pair of marks, with a long run of letters in
between; what does not fit goes to the engine itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lexigraft.families.tokenmap import CHARACTER_TO_BYTE

# No apostrophe: what follows one is split off by the letters themselves ('s, 'll).
_MARKS = ' \n\t,.;:!?()\\[\\]"/%+*=<>，。、；：？！（）《》〈〉【】“”「」『』—…·-'
_PLAIN = re.compile(f"([{_MARKS}]*)(?:([一-龥]+)|([a-z]+))([{_MARKS}]*)")
# Long, so that a pre-tokenizer that cuts long runs is found out.
_SAMPLES = ("甲乙丙丁" * 64, "abcdefgh" * 32)

# Byte-mapped characters -> the bytes as characters of Latin-1.
_TO_LATIN = {ord(character): chr(byte) for character, byte in CHARACTER_TO_BYTE.items()}
Split = tuple[tuple[bytes, ...], bytes, bytes, tuple[bytes, ...]]


class WordSplitter:
    """Words as bytes, as `engine`'s normalizer and pre-tokenizer make them.

    Args:
        engine: a tokenizer whose pre-tokenizer ends in a byte-level map.
    """

    def __init__(self, engine: Any) -> None:
        self._normalizer = engine.normalizer
        self._splitter = engine.pre_tokenizer
        self._memory: dict[tuple[str, str, bool], Split | None] = {}

    def count(self, chunks: Iterable[tuple[str, int]]) -> dict[bytes, int]:
        """Distinct words of counted chunks -> occurrences."""
        words: dict[bytes, int] = {}
        around: dict[tuple[str, str, bool], int] = {}  # marks -> occurrences
        match, memory, known, seen = _PLAIN.fullmatch, self._memory, words.get, around.get
        for text, weight in chunks:
            found = match(text)
            if found is not None:
                before, han, latin, after = found.groups()
                key = (before, after, latin is None)
                split = memory[key] if key in memory else self._learn(key)
                if split is not None:
                    word = split[1] + (han or latin).encode() + split[2]
                    words[word] = known(word, 0) + weight
                    around[key] = seen(key, 0) + weight
                    continue
            for word in self.split(text):
                words[word] = known(word, 0) + weight
        for key, weight in around.items():
            split = memory[key]
            for word in (*split[0], *split[3]) if split else ():
                words[word] = known(word, 0) + weight
        return words

    def split(self, text: str) -> list[bytes]:
        """The words of one text."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        return [
            word.translate(_TO_LATIN).encode("latin-1")
            for word, _ in self._splitter.pre_tokenize_str(text)
        ]

    def _learn(self, key: tuple[str, str, bool]) -> Split | None:
        """How a run of letters is split from the marks around it; None if it is split itself."""
        before, after, han = key
        sample = _SAMPLES[0] if han else _SAMPLES[1]
        words = self.split(before + sample + after)
        letters = sample.encode()
        split: Split | None = None
        place = next((at for at, word in enumerate(words) if letters in word), None)
        if place is not None:
            left, right = words[place].split(letters)
            split = tuple(words[:place]), left, right, tuple(words[place + 1 :])
        self._memory[key] = split
        return split
