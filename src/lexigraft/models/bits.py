"""Bits per byte: the one loss that is comparable across tokenizers.

Every byte of a text is scored once, in windows that are cut at the same byte offsets for every
model, so that a longer token does not buy a longer context. A window's first token is predicted
from the start token. Source of the measure: -log2 p(text) / UTF-8 bytes (Gao et al. 2020, The
Pile, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import Family
from lexigraft.models.load import context_limit, evaluating, start_and_end, text_part
from lexigraft.models.shards import shape_of

# Logits of a batch: at most so many floats (128 MiB), so that memory does not grow with rows.
LOGITS = 2**25
# Positions whose softmax is computed at once: its temporaries then stay in the cache's reach.
POSITIONS = 64
_SMALLEST_WINDOW = 64
# A token that is not yet to be seen changes nothing in a causal model, but for the order of sums
# (0 in all that were measured; PaliGemma: 0.1). The fewer tokens, the more one of them shows.
_SIGHT_TOKENS = 8
_SIGHT_LIMIT = 0.02
_SPACES = " \t\n\r\u3000"


@dataclass(frozen=True)
class Score:
    """A text under a model: `bits` over `bytes` of UTF-8, spelled in `tokens`."""

    bits: float
    bytes: int
    tokens: int
    new_tokens: int

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return self.bits / self.bytes

    @property
    def adoption(self) -> float:
        """Share of new tokens among the tokens of the text."""
        return self.new_tokens / self.tokens


class SpareShare:
    """What ids without a token take of the probability, as an observer of `score`."""

    def __init__(self, ids: Sequence[int]) -> None:
        """`ids` have a row and no token."""
        self._ids = list(ids)
        self._total, self._positions = 0.0, 0

    @property
    def mean(self) -> float:
        """Over all positions; 0 where there is no such id."""
        return self._total / max(1, self._positions)

    def __call__(self, place: int, logits: Tensor) -> None:
        """Take in the logits (positions, rows) of a window."""
        self._positions += len(logits)
        for part in logits.split(POSITIONS) if self._ids else ():
            logs = part[:, self._ids].float().logsumexp(-1) - part.float().logsumexp(-1)
            self._total += float(logs.double().exp().sum())


def windows(document: str, size: int) -> list[str]:
    """`document` in pieces of at most `size` UTF-8 bytes; joined they are the document.

    A piece ends after a line break if the second half of the window holds one, else before the
    last white space there, else at the last whole character.

    >>> windows("ab cd ef", 5)
    ['ab', ' cd', ' ef']
    """
    pieces = []
    data = document.encode("utf-8")
    begin = 0
    while len(data) - begin > size:
        cut = begin + _cut(data[begin : begin + size + 1], size)
        pieces.append(data[begin:cut].decode("utf-8"))
        begin = cut
    pieces.append(data[begin:].decode("utf-8"))
    return pieces


def _cut(data: bytes, size: int) -> int:
    """Where to cut `data`, of `size` + 1 bytes, so that at most `size` remain before."""
    half = size // 2
    line = data.rfind(b"\n", half, size)
    if line >= 0:
        return line + 1
    space = max(data.rfind(mark.encode(), half, size + 1) for mark in _SPACES)
    if space > 0:
        return space
    cut = size
    while cut > 1 and data[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    return cut


def up_to(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The first of `documents`, to `max_bytes` of UTF-8; the last one is cut as a window is."""
    for document in documents:
        size = len(document.encode())
        yield document if size <= max_bytes else windows(document, max_bytes)[0]
        max_bytes -= size
        if max_bytes <= 0:
            return


def fitting_window(
    documents: Sequence[str], folders: Sequence[Path], readers: Sequence[Family], size: int
) -> int:
    """`size`, halved until each window and its start fit into the context of every model.

    Raises:
        LexigraftError: the shortest context has no room for the smallest window.
    """
    limits = [
        context_limit(folder) - len(start_and_end(r)[0])
        for folder, r in zip(folders, readers, strict=True)
    ]
    while size >= _SMALLEST_WINDOW:
        cut = [window for document in documents for window in windows(document, size)]
        if all(
            max(map(len, reader.encode_batch(cut))) <= limit
            for reader, limit in zip(readers, limits, strict=True)
        ):
            return size
        size //= 2
    raise LexigraftError(
        f"a context of {min(limits)} tokens",
        needed=f"room for windows of {_SMALLEST_WINDOW} bytes",
        fix="leave out the model with the shortest context",
    )


def score(
    model: Any,
    texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    *,
    start: Sequence[int],
    new_ids: Container[int] = (),
    rows: int | None = None,
    advance: Callable[[int], None] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Score:
    """Bits of `texts` under `model`; both are windows, in the same order.

    Args:
        model: a causal language model (B, T) -> logits (B, T, rows).
        encoded: ids of each text, without the start.
        start: ids before each text; at least one.
        new_ids: which ids count as new.
        rows: score as if the model had only this many rows, the first ones.
        advance: told how many bytes have been scored.
        observe: shown the place of each text and the logits (ids of the text, rows) that
            predict its ids.
    """
    bits = 0.0
    for place, found in predictions(model, [[*start, *ids] for ids in encoded], len(start)):
        logits = found[:, :rows]
        bits += _sum_nats(logits, encoded[place]) / math.log(2)
        if observe is not None:
            observe(place, logits)
        if advance is not None:
            advance(len(texts[place].encode()))
    ids = [token for line in encoded for token in line]
    return Score(
        bits, sum(len(t.encode()) for t in texts), len(ids), sum(token in new_ids for token in ids)
    )


def predictions(
    model: Any, lines: Sequence[Sequence[int]], before: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """The place of each line, shortest first, and the logits that predict its ids.

    Args:
        model: a causal language model (B, T) -> logits (B, T, rows); it runs in eval mode.
        lines: ids, each line with at least `before` of them.
        before: how many ids at the start of a line are only read; the logits are those of the
            ids behind them, (length - before, rows).
    """
    rows = shape_of(model.get_output_embeddings().weight)[0]
    order = sorted(range(len(lines)), key=lambda place: (len(lines[place]), place))
    with evaluating(model):
        for batch in _batches(order, [len(line) for line in lines], LOGITS // rows):
            found = _logits_of(model, [lines[place] for place in batch])
            for place, logits in zip(batch, found, strict=True):
                yield place, logits[before - 1 : len(lines[place]) - 1]


def looks_ahead(model: Any, ids: Sequence[int]) -> bool:
    """Whether a model sees a token that it is to predict, as PaliGemma does in its prompt.

    Args:
        model: a language model (B, T) -> logits (B, T, rows).
        ids: at least two; a few are enough, and show it best.
    """
    few = [*ids[:_SIGHT_TOKENS]]
    lines = [few, [*few[:-1], few[-1] ^ 1]]
    (_, one), (_, other) = sorted(predictions(model, lines), key=lambda found: found[0])
    return float((one - other).abs().max()) > _SIGHT_LIMIT * float(one.float().std())


def require_next_token(model: Any, ids: Sequence[int]) -> None:
    """Stop where a model that sees images too would see the text that it is to predict.

    Args:
        model, ids: as in `looks_ahead`.

    Raises:
        RefusalError: it would.
    """
    if text_part(model) is not model and looks_ahead(model, ids):
        raise RefusalError(
            f"{type(model).__name__} looks at a token before it is to predict it",
            needed="a model that tells of each token what comes next",
            fix="choose another model",
        )


def _batches(order: Iterable[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    """Places in `order` (shortest first) in groups whose padded size fits into `room` tokens."""
    groups: list[list[int]] = []
    for place in order:
        if not groups or (len(groups[-1]) + 1) * lengths[place] > room:
            groups.append([])
        groups[-1].append(place)
    return groups


@torch.no_grad()  # type: ignore[untyped-decorator]  # sharded weights gathered in inference mode
def _logits_of(model: Any, lines: Sequence[Sequence[int]]) -> Tensor:
    """The logits (lines, T, rows) behind each id; those behind a line's end mean nothing."""
    ids = torch.zeros((len(lines), max(map(len, lines))), dtype=torch.int64)
    for place, line in enumerate(lines):
        # Padding stands on the right, where a causal model cannot see it.
        ids[place, : len(line)] = torch.tensor(line)
    ids = ids.to(model.get_output_embeddings().weight.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _sum_nats(logits: Tensor, line: Sequence[int]) -> float:
    targets = torch.tensor(line, dtype=torch.int64, device=logits.device)
    parts = zip(logits.split(POSITIONS), targets.split(POSITIONS), strict=True)
    return sum(float(nats(some, few).double().sum()) for some, few in parts)


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, in float32: logits (N, rows), targets (N,) -> (N,)."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
