"""How many tokens: the curve, its knee, what more would buy, and where more slows the model down.

New tokens come in rank order, each with the tokens that it saves on held-out text; so one training
gives the result of every size. Savings of a first k tokens are those of the first k ranks: a merge
fires or not whatever ranks after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

POINTS = 20
FURTHER = 1_000
# More rows than a tenth of the base's cost more than they bring, and their training starves.
MAX_SHARE = 0.10


def tokens_after(saved: ArrayLike, base_tokens: float) -> Floats:
    """Tokens of the held-out text with the first k new tokens, for k from 0 to all of them.

    Args:
        saved: tokens that each new token saves, in rank order.
        base_tokens: tokens of the text before.

    Raises:
        ValueError: more saved than there was.
    """
    gains = np.asarray(saved, np.float64)
    after = base_tokens - np.concatenate([[0.0], np.cumsum(gains)])
    if gains.size and after.min() <= 0:
        raise ValueError("new tokens cannot save all tokens of a text")
    return np.asarray(after)


def curve(after: ArrayLike, text_bytes: int, points: int = POINTS) -> list[tuple[int, float]]:
    """(k, tokens per byte) at `points` sizes or fewer, evenly spaced from 0 to all."""
    tokens = np.asarray(after, np.float64)
    sizes = np.unique(np.linspace(0, len(tokens) - 1, points).round().astype(int))
    return [(int(k), float(tokens[k] / text_bytes)) for k in sizes]


def knee(after: ArrayLike) -> int:
    """The size after which a further token buys clearly less than those before.

    Kneedle (Satopaa, Albrecht, Irwin & Raghavan 2011, "Finding a 'Kneedle' in a Haystack"): on the
    curve scaled to the unit square, the point farthest from the straight line between its ends. A
    straight curve has no knee: then this is the last size.
    """
    tokens = np.asarray(after, np.float64)
    last = len(tokens) - 1
    drop = tokens[0] - tokens[-1]
    if last < 2 or drop <= 0:
        return last
    above = (tokens[0] - tokens) / drop - np.arange(last + 1) / last
    farthest = int(np.argmax(above))
    return farthest if above[farthest] > 1e-9 else last


def further_gain(after: ArrayLike, k: int, further: int = FURTHER) -> float:
    """The share of the text's tokens at size `k` that `further` more tokens would save.

    Read off the curve where it is long enough; else what is left of it is taken.
    """
    tokens = np.asarray(after, np.float64)
    end = min(k + further, len(tokens) - 1)
    return float(1 - tokens[end] / tokens[k])


@dataclass(frozen=True)
class ModelSize:
    """What one more row costs in a model.

    Attributes:
        hidden: length of a row.
        parameters: of the whole model, estimated from its config.
        matrices: 1 if embedding and head are one tensor, else 2.
    """

    hidden: int
    parameters: int
    matrices: int


def model_size(config: Mapping[str, Any], *, tied: bool) -> ModelSize | None:
    """An *estimate* of a model's size from its `config.json`; None where keys are missing.

    Counts what llama-like decoders are made of: attention with grouped keys and values, a gated
    MLP, two norms a layer, embedding and head. Biases are left out; of a mixture of experts the
    experts that one token passes through are counted, since the estimate is used for speed. The
    text part of a multimodal config is read from its `text_config`.

    Args:
        config: the keys of a `config.json`.
        tied: whether embedding and head are one tensor.
    """
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, Mapping) else config

    def number(*names: str) -> int | None:
        found = (merged.get(name) for name in names)
        return next((v for v in found if isinstance(v, int) and v > 0), None)

    hidden = number("hidden_size", "n_embd", "d_model")
    layers = number("num_hidden_layers", "n_layer")
    heads = number("num_attention_heads", "n_head")
    vocabulary = number("vocab_size")
    if hidden is None or layers is None or heads is None or vocabulary is None:
        return None
    inner = number("intermediate_size", "n_inner") or 4 * hidden
    width = number("head_dim") or hidden // heads
    shared = number("num_key_value_heads") or heads
    attention = 2 * hidden * width * (heads + shared)
    # GPT-2 and its kin (the short names) have two matrices in the MLP, llama-like models three.
    mlp = (2 if "n_embd" in merged else 3) * hidden * inner
    experts = number("num_experts_per_tok")
    if experts is not None:
        mlp = 3 * hidden * (number("moe_intermediate_size") or inner) * experts
    matrices = 1 if tied else 2
    body = layers * (attention + mlp + 2 * hidden) + hidden
    return ModelSize(hidden, body + matrices * vocabulary * hidden, matrices)


def speed_up(after: ArrayLike, size: ModelSize) -> Floats:
    """How much faster the model reads and writes the text, at each k.

    S(k) = (1 / r(k)) / (1 + k * d * m / N), with r the length as a share of the base's, d the
    length of a row, m the number of matrices, N the parameters: time per token is taken as
    proportional to the weights that it passes through.
    """
    tokens = np.asarray(after, np.float64)
    rows = np.arange(len(tokens)) * size.hidden * size.matrices / size.parameters
    return np.asarray(tokens[0] / tokens / (1 + rows))


def expected_occurrences(
    counts: ArrayLike, counted_bytes: int, train_bytes: int
) -> tuple[float, float]:
    """Median and 10th percentile of how often each new token will be seen in training.

    Args:
        counts: occurrences of each new token on the learning text.
        counted_bytes: size of that text.
        train_bytes: size of the text that training will see.
    """
    seen = np.asarray(counts, np.float64) * (train_bytes / counted_bytes)
    if not seen.size:
        return 0.0, 0.0
    middle, low = np.percentile(seen, [50, 10])
    return float(middle), float(low)


@dataclass(frozen=True)
class Because:
    """What decided how many tokens there are, with all that a sentence about it names.

    Attributes:
        rule: `asked`; `few`: fewer than `asked` occur often enough; `all` that do; `share` of the
            base's tokens; or `speed`: more would make the model slower.
        k: the number.
        asked: the number asked for; None where it was chosen.
        share: the largest share of the base's tokens.
        ratio: tokens of the held-out text as a share of the base's.
        knee: where the curve bends.
        more: so many further tokens would save `further` of these.
    """

    rule: str
    k: int
    asked: int | None
    share: float
    ratio: float
    knee: int
    more: int
    further: float

    def sentence(self) -> str:
        """For people, in English."""
        begin = {
            "asked": f"{self.k:,} tokens, as asked for",
            "few": f"{self.k:,} tokens of {self.asked or 0:,} asked for: no more occur often "
            "enough",
            "all": f"{self.k:,} tokens: all that occur often enough",
            "share": f"{self.k:,} tokens: {self.share:.0%} of the base",
            "speed": f"{self.k:,} tokens: more would make the model slower, not faster",
        }[self.rule]
        told = f"; the text is {self.ratio:.3f} of its length, the curve bends at {self.knee:,}"
        if self.more:
            told += f", and {self.more:,} more tokens would save another {self.further:.1%}"
        return begin + told


@dataclass(frozen=True)
class Size:
    """How many tokens were chosen, and why.

    Attributes:
        k: the number.
        because: what decided it.
        knee: where the curve bends.
        best_speed_k: where the model is fastest; None if its size is unknown.
        speed: the estimated speed-up at `k`; None if the model's size is unknown.
        ratio: tokens of the held-out text as a share of the base's.
        further: the share of these that 1,000 more tokens would save, as far as known.
        median: expected occurrences in training of the middle new token; None if not asked for.
        low: the same, of the one that nine in ten exceed.
        curve: (k, tokens per byte).
    """

    k: int
    because: Because
    knee: int
    best_speed_k: int | None
    speed: float | None
    ratio: float
    further: float
    median: float | None
    low: float | None
    curve: list[tuple[int, float]]

    @property
    def why(self) -> str:
        """A sentence for people."""
        return self.because.sentence()

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {**asdict(self), "why": self.why}


def choose_size(
    saved: ArrayLike,
    *,
    base_tokens: int,
    text_bytes: int,
    vocabulary: int,
    requested: int | None = None,
    model: ModelSize | None = None,
    counts: ArrayLike | None = None,
    counted_bytes: int = 0,
    train_bytes: int = 0,
    max_share: float = MAX_SHARE,
) -> Size:
    """The number of new tokens: as asked, or the most that nothing speaks against.

    Automatic: all candidates (those that occur too rarely to be trained are not among them), but no
    more than `max_share` of the base's tokens, and no more than make the model fastest. The knee is
    reported, not obeyed: where it lies depends on where the curve was cut off.

    Args:
        saved: tokens that each candidate saves on held-out text, in rank order.
        base_tokens: tokens of that text before.
        text_bytes: its size.
        vocabulary: the base's tokens.
        requested: a number asked for; None chooses.
        model: what a row costs.
        counts: occurrences of each candidate on the learning text, in rank order.
        counted_bytes: size of the learning text.
        train_bytes: size of the text that training will see.
        max_share: the largest share of the base's tokens.
    """
    after = tokens_after(saved, base_tokens)
    candidates = len(after) - 1
    cap = int(max_share * vocabulary)
    speeds = speed_up(after, model) if model else None
    fastest = int(np.argmax(speeds)) if speeds is not None else None
    if requested is not None:
        k = min(requested, candidates)
        rule = "asked" if k == requested else "few"
    else:
        limits = [(candidates, "all"), (cap, "share")]
        if fastest is not None:
            limits.append((fastest, "speed"))
        k, rule = min(limits, key=lambda limit: limit[0])
    bend, ratio, further = knee(after), float(after[k] / after[0]), further_gain(after, k)
    more = min(FURTHER, candidates - k)
    median = low = None
    if counts is not None and counted_bytes and train_bytes:
        median, low = expected_occurrences(np.asarray(counts)[:k], counted_bytes, train_bytes)
    return Size(
        k=k,
        because=Because(rule, k, requested, max_share, ratio, bend, more, further),
        knee=bend,
        best_speed_k=fastest,
        speed=float(speeds[k]) if speeds is not None else None,
        ratio=ratio,
        further=further,
        median=median,
        low=low,
        curve=curve(after, text_bytes),
    )
