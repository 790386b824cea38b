"""What an extension does to texts: lengths, how often each new token comes out, the size curve."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from lexigraft.families import Family
from lexigraft.families.choice import Choice
from lexigraft.families.continued_bpe import Merge

_BATCH = 512
_CURVE_POINTS = 10


@dataclass(frozen=True)
class Lengths:
    """Tokens of one text under both tokenizers, and its UTF-8 bytes."""

    tokens_before: int
    tokens_after: int
    bytes: int

    @property
    def ratio(self) -> float:
        """Tokens after per token before."""
        return self.tokens_after / max(1, self.tokens_before)

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return {
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "bytes": self.bytes,
        }


def lengths(base: Family, extended: Family, texts: Sequence[str]) -> Lengths:
    """Tokens of `texts` under both tokenizers."""
    before = sum(map(len, base.encode_batch(texts)))
    after = sum(map(len, extended.encode_batch(texts)))
    return Lengths(before, after, sum(len(text.encode()) for text in texts))


def emissions(extended: Family, first_id: int, documents: Iterable[str]) -> Counter[str]:
    """New token -> how often it comes out of `documents`, by the engine itself."""
    counts: Counter[int] = Counter()
    stream = iter(documents)
    while batch := list(islice(stream, _BATCH)):
        for ids in extended.encode_batch(batch):
            counts.update(token_id for token_id in ids if token_id >= first_id)
    return Counter({extended.map.texts[token_id]: n for token_id, n in counts.items()})


def curve(base: Family, merges: Sequence[Merge], texts: Sequence[str]) -> list[tuple[int, float]]:
    """[k, tokens per byte of `texts`] for some ten sizes from 0 to all: the first k merges."""
    stretches = Counter("".join(unit) for unit in base.units(texts))
    spelled = list(stretches)
    outside = sum(map(len, base.encode_batch(texts)))
    size = max(1, sum(len(text.encode()) for text in texts))
    sizes = sorted({round(len(merges) * step / _CURVE_POINTS) for step in range(_CURVE_POINTS + 1)})
    lengths_at = []
    for k in sizes:
        emitted = base.emitted(merges[:k], spelled)
        inside = sum(
            len(tokens) * stretches[stretch]
            for stretch, tokens in zip(spelled, emitted, strict=True)
        )
        lengths_at.append(inside)
    return [
        (k, round((outside - lengths_at[0] + inside) / size, 6))
        for k, inside in zip(sizes, lengths_at, strict=True)
    ]


def new_tokens(
    base: Family, extended: Family, choice: Choice, counts: Mapping[str, int], general: list[str]
) -> Iterator[str]:
    """The lines of `new_tokens.jsonl`, in the order of the ids."""
    elsewhere = emissions(extended, base.map.tokens, general)
    total = sum(counts.values())
    total_elsewhere = sum(map(len, extended.encode_batch(general)))
    for merge in choice.merges:
        token_id = extended.map.ids[merge.token]
        data = extended.token_bytes(token_id)
        pieces = base.pieces(merge.token)
        count = counts[merge.token]
        specificity = (
            log_odds(count, total, elsewhere[merge.token], total_elsewhere) if general else None
        )
        row = {
            "id": token_id,
            "token": merge.token,
            "bytes": data.hex(),
            "text": _text(data),
            "pieces": pieces,
            "count": count,
            "tokens_saved": count * (len(pieces) - 1),
            "specificity": specificity,
            "origin": _origin(merge, choice),
        }
        yield json.dumps(row, ensure_ascii=False)


def log_odds(count: int, total: int, elsewhere: int, total_elsewhere: int) -> float:
    """How much more likely a token is in the domain than in general text, in bits (add-half)."""
    inside = (count + 0.5) / (total + 1)
    outside = (elsewhere + 0.5) / (total_elsewhere + 1)
    return round(math.log2(inside / outside), 3)


def _origin(merge: Merge, choice: Choice) -> str:
    if merge.token in choice.bridges:
        return "bridge"
    return "character" if merge.right is None else "merge"


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
