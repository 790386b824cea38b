"""What an extension does to texts: how often each new token comes out, and the size curve."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from lexigraft.families import Family
from lexigraft.families.choice import Choice
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.proof import Proof

_BATCH = 512
_CURVE_POINTS = 10


def emissions(
    extended: Family, first_id: int, documents: Iterable[str]
) -> tuple[Counter[str], int]:
    """New token -> how often it comes out of `documents`, by the engine itself; and all tokens."""
    counts: Counter[int] = Counter()
    total = 0
    stream = iter(documents)
    while batch := list(islice(stream, _BATCH)):
        for ids in extended.encode_batch(batch):
            total += len(ids)
            counts.update(token_id for token_id in ids if token_id >= first_id)
    return Counter({extended.map.texts[token_id]: n for token_id, n in counts.items()}), total


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
    base: Family,
    extended: Family,
    choice: Choice,
    *,
    counts: Mapping[str, int],
    domain_tokens: int,
    general: Proof | None,
) -> Iterator[str]:
    """The lines of `new_tokens.jsonl`, in the order of the ids.

    Args:
        counts: new token -> occurrences in the learning text, of `domain_tokens` tokens.
        general: what was read of the general text, where there is any.
    """
    for merge in choice.merges:
        token_id = extended.map.ids[merge.token]
        data = extended.token_bytes(token_id)
        pieces = base.pieces(merge.token)
        count = counts[merge.token]
        specificity = (
            log_odds(count, domain_tokens, general.emitted[token_id], general.lengths.tokens_after)
            if general
            else None
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
