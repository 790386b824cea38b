"""What a graft changed in what a model says: the base and the grafted model on the same text.

The text is cut into windows as for bits per byte. The *shared* positions of a window are those
before the first id in which the two tokenizers differ: there both models have read the same ids
and expect the same next one, so what they say may be compared. Letters: V old tokens, N new ones,
k new padding rows; p is what the base says, q what the grafted model says.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexigraft.checkpoints.growth import Growth
from lexigraft.corpus import read_documents
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import Family
from lexigraft.files import read_object
from lexigraft.models.bits import (
    LOGITS,
    POSITIONS,
    Score,
    fitting_window,
    looks_ahead,
    score,
    up_to,
    windows,
)
from lexigraft.models.load import load_model, reading_class, start_and_end

# Both models read the same text, so a little is enough: some 4,000 tokens, under a minute for
# 135M parameters on two cores.
PROBE_BYTES = 16 * 1024
WINDOW_BYTES = 1024
# Old ids must keep their distribution among each other. Float32 rounds by 1e-7 nats, 16-bit logits
# by some 1e-3 (estimated); wrong rows or a damaged body move it by whole nats.
KL_LIMIT = 0.01
# What new ids take from text that does not hold them: general text may lose 1% (train's target).
# A few positions say nothing of a mean.
BITS_LIMIT = 0.01
LEAST_SHARED = 256
# Law 9 bounds the share of k padding rows by k/(V+k); twice that leaves room for the rounding of
# rows and for old rows that the mean leaves out.
PADDING_FACTOR = 2.0
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Share:
    """How much probability some ids take, over the shared positions."""

    mean: float
    most: float


@dataclass(frozen=True)
class ProbeResult:
    """Two models on one text.

    Attributes:
        before: the base with its own tokenizer.
        after: the grafted model with the extended one.
        shared: positions at which both read the same ids and expect the same next one.
        bits: share of bits that the grafted model needs more (or less) at these.
        kl: mean over `compared` of them of KL(p || q) in nats, both restricted to old ids and
            normalised; with what new and padding ids take this is the whole change.
        compared: how many shared positions `kl` is the mean of, spread evenly.
        new: what new ids take.
        padding: what padding ids take.
        padding_before: what padding ids take in the base.
        padding_limit: the most that they may take in the mean.
        guess: bits of a blind guess among all rows.
        seconds: wall time.
    """

    before: Score
    after: Score
    shared: int
    bits: float
    kl: float
    compared: int
    new: Share
    padding: Share
    padding_before: Share
    padding_limit: float
    guess: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Keys as in docs/files.md."""
        shares = {name: vars(getattr(self, name)) for name in ("new", "padding", "padding_before")}
        return {
            "bytes": self.after.bytes,
            "tokens": [self.before.tokens, self.after.tokens],
            "new_tokens": self.after.new_tokens,
            "bpb": [self.before.bpb, self.after.bpb],
            "shared": self.shared,
            "bits": self.bits,
            "kl": self.kl,
            "compared": self.compared,
            **shares,
            "padding_limit": self.padding_limit,
            "seconds": round(self.seconds, 3),
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        return [
            f"probe, {self.after.bytes:,} bytes in {self.seconds:.0f} s: bits per byte "
            f"{self.before.bpb:.4f} -> {self.after.bpb:.4f}; "
            f"{self.after.new_tokens:,} of {self.after.tokens:,} tokens are new",
            f"where both read the same tokens ({self.shared:,} positions): bits {self.bits:+.2%}, "
            f"old ids moved by {self.kl:.1g} nats (KL), new ids take {_percent(self.new.mean)} "
            f"(at most {_percent(self.new.most)}), padding ids {_percent(self.padding.mean)}",
        ]


@dataclass(frozen=True)
class ProbeText:
    """What both models will read.

    Attributes:
        windows: the text in pieces that fit the model's context.
        encoded: ids of each window, of the base's tokenizer and of the extended one.
        shared: how many positions of each window are shared.
        start: ids before each window.
    """

    windows: list[str]
    encoded: tuple[list[list[int]], list[list[int]]]
    shared: list[int]
    start: list[int]


def probe_text(base: Family, extended: Family, spec: str | Path) -> ProbeText:
    """The first `PROBE_BYTES` of the text that `spec` names, as both tokenizers read it.

    Args:
        base: the tokenizer in the folder of the base.
        extended: the one that knows the new tokens.
        spec: a text as `--corpus` takes them; everyday text tells most.

    Raises:
        RefusalError: the model beside `base` does not predict the next token of a text.
        LexigraftError: there is no text, nothing in it is read alike, or nothing stands before
            a text in this tokenizer.
    """
    _require_causal(base.folder)
    texts = list(up_to(read_documents([spec]), PROBE_BYTES))
    if not texts:
        raise LexigraftError(f"--probe {spec} holds no text", needed="some text", fix=f"ls {spec}")
    start, _ = start_and_end(base)
    size = fitting_window(texts, [base.folder, base.folder], [base, extended], WINDOW_BYTES)
    cut = [window for text in texts for window in windows(text, size)]
    encoded = base.encode_batch(cut), extended.encode_batch(cut)
    shared = list(map(_alike, *encoded))
    if not sum(shared):
        raise LexigraftError(
            f"--probe {spec}: every part of the text, {len(cut)} in all, begins with a new token",
            needed="text in which both tokenizers read something alike",
            fix="--probe with everyday text",
        )
    return ProbeText(cut, encoded, shared, start)


def _require_causal(folder: Path) -> None:
    if reading_class(folder) is None:
        config = read_object(folder / "config.json")
        named = ", ".join(map(str, config.get("architectures") or [])) or config.get("model_type")
        raise _not_causal(f"{named} does not predict the next token of a text from those before it")


def _not_causal(found: str) -> RefusalError:
    return RefusalError(
        f"--probe: {found}",
        needed="a causal language model; the rows of any other are grafted without a probe",
        fix="leave out --probe",
    )


def probe(
    text: ProbeText,
    base: Path,
    grafted: Path,
    growth: Growth,
    *,
    trust_remote_code: bool = False,
    advance: Callable[[int], None] | None = None,
) -> ProbeResult:
    """Let both models read `text`, one model at a time.

    Args:
        text: from `probe_text`.
        base: its folder.
        grafted: the folder of the grafted model.
        growth: how the rows grew.
        trust_remote_code: run the Python files that a folder brings for its architecture.
        advance: told how many bytes a model has read.

    Raises:
        RefusalError: the base sees the tokens that it is to predict.
        LexigraftError: transformers cannot load a model, or a limit of `refuse` is broken.
    """
    began = time.perf_counter()
    chosen = _spread(text.shared, LOGITS // growth.rows)
    found: list[tuple[Score, _Watch]] = []
    kept: dict[int, Tensor] = {}
    for folder, ids in zip((base, grafted), text.encoded, strict=True):
        last = growth.tokens if found else growth.first_id
        watch = _Watch(
            ids,
            text.shared,
            chosen,
            growth.first_id,
            last,
            kept,
            first=not found,
            replaced=list(growth.replaced),
        )
        model = load_model(folder, trust_remote_code=trust_remote_code)
        if not found and looks_ahead(model, [*text.start, *max(ids, key=len)]):
            kind = type(model).__name__
            raise _not_causal(f"{kind} looks at a token before it is to predict it")
        scored = score(
            model,
            text.windows,
            ids,
            start=text.start,
            new_ids=frozenset(growth.new_ids if found else ()),
            advance=advance,
            observe=watch,
        )
        found.append((scored, watch))
        del model
        gc.collect()  # one model at a time: torch's modules are cycles
    (before, old), (after, new) = found
    result = ProbeResult(
        before,
        after,
        shared=sum(text.shared),
        bits=(new.nats - old.nats) / max(old.nats, _ROUNDING),
        kl=sum(new.kl) / len(new.kl),
        compared=len(new.kl),
        new=new.new,
        padding=new.padding,
        padding_before=old.padding,
        # Padding grows with the rest where replaced tokens take less than they did.
        padding_limit=old.padding.mean / max(_ROUNDING, 1 - old.new.most)
        + PADDING_FACTOR * growth.new_padding / growth.rows
        + _ROUNDING,
        guess=math.log2(growth.rows),
        seconds=time.perf_counter() - began,
    )
    refuse(result)
    return result


def _alike(old: Sequence[int], new: Sequence[int]) -> int:
    """How many ids two lists begin with alike."""
    pairs = enumerate(zip(old, new, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))


def _percent(share: float) -> str:
    """Two digits, however small.

    >>> _percent(0.0000123), _percent(0.25)
    ('0.0012%', '25%')
    """
    return f"{100 * share:.2g}%" if share >= _ROUNDING else "0.0001% or less"


def _spread(shared: Sequence[int], count: int) -> dict[int, list[int]]:
    """Per window at most `count` shared positions in all, spread evenly."""
    step = max(1, -(-sum(shared) // count))
    chosen: dict[int, list[int]] = {}
    passed = 0
    for place, length in enumerate(shared):
        chosen[place] = list(range(-passed % step, length, step))
        passed += length
    return chosen


@dataclass
class _Watch:
    """Sums over the shared positions of one model's reading.

    Attributes:
        encoded: ids of each window.
        shared: shared positions of each window.
        chosen: those of them at which whole distributions are compared.
        old: V.
        tokens: max id + 1 of the tokenizer; rows from here on are padding.
        kept: log p over old ids at the chosen positions of each window, which the first of two
            watches writes and the other reads.
        first: whether it is the first.
        replaced: ids below V that have other tokens under the second model.
    """

    encoded: Sequence[Sequence[int]]
    shared: Sequence[int]
    chosen: dict[int, list[int]]
    old: int
    tokens: int
    kept: dict[int, Tensor]
    first: bool
    replaced: list[int] = field(default_factory=list)
    nats: float = 0.0
    kl: list[float] = field(default_factory=list)
    _new: list[float] = field(default_factory=list)
    _padding: list[float] = field(default_factory=list)

    @property
    def new(self) -> Share:
        """What new ids take; under the first model what it loses with their old tokens."""
        return Share(sum(self._new) / len(self._new), max(self._new))

    @property
    def padding(self) -> Share:
        """What padding ids take."""
        return Share(sum(self._padding) / len(self._padding), max(self._padding))

    def __call__(self, place: int, logits: Tensor) -> None:
        """Take in the logits (positions, rows) of a window."""
        shared = self.shared[place]
        targets = torch.tensor(self.encoded[place][:shared], dtype=torch.int64)
        parts = zip(logits[:shared].split(POSITIONS), targets.split(POSITIONS), strict=True)
        for part, wanted in parts:
            logs = part.float().log_softmax(-1)
            picked = logs.gather(1, wanted.to(logs.device)[:, None])
            self.nats -= float(picked.double().sum())
            new = logs[:, self.old : self.tokens].exp().sum(-1)
            self._new += (new + logs[:, self.replaced].exp().sum(-1)).tolist()
            self._padding += logs[:, self.tokens :].exp().sum(-1).tolist()
        if not self.chosen[place]:
            return
        old = logits[self.chosen[place], : self.old].float()
        old[:, self.replaced] = -math.inf
        old = old.log_softmax(-1)
        if self.first:
            self.kept[place] = old
            return
        p = self.kept.pop(place)
        change = torch.where(p > -math.inf, p.exp() * (p - old), 0.0).sum(-1)
        self.kl += change.tolist()


def refuse(found: ProbeResult) -> None:
    """Stop where a limit is broken.

    - Both models give finite numbers.
    - Old ids keep their distribution among each other: `kl` <= `KL_LIMIT`.
    - Padding ids take no more than in the base and law 9 allow: `padding_limit`.
    - Text without new tokens costs at most `BITS_LIMIT` more bits: that is what new ids take.
      Asked from `LEAST_SHARED` positions on.
    - A new token costs no more bits than a guess among all rows, log2(R'), beyond what its
      pieces cost: with worse rows the model would do better not to know it.

    Raises:
        LexigraftError: the first limit that is broken, with its figure.
    """
    for name, bits in (("base", found.before.bits), ("grafted model", found.after.bits)):
        if not math.isfinite(bits):
            raise _broken(f"the {name} gives NaN or infinity", "finite numbers")
    if not found.kl <= KL_LIMIT:
        raise _broken(
            f"what the model says of old ids moved by {found.kl:.3g} nats (KL)",
            f"at most {KL_LIMIT} nats: their rows and the body are the base's",
        )
    if not found.padding.mean <= found.padding_limit:
        raise _broken(
            f"padding ids take {found.padding.mean:.3%} of the probability "
            f"({found.padding_before.mean:.3%} in the base)",
            f"at most {found.padding_limit:.3%}",
        )
    if found.shared >= LEAST_SHARED and not found.bits <= BITS_LIMIT:
        raise _broken(
            f"new ids take {found.new.mean:.1%} of the probability where none belongs, and padding "
            f"ids {found.padding.mean:.1%}, so that text without them costs {found.bits:.1%} more "
            "bits",
            f"at most {BITS_LIMIT:.0%} more",
        )
    more = found.after.bits - found.before.bits
    if found.after.new_tokens and more > found.after.new_tokens * found.guess:
        raise _broken(
            f"a new token costs {more / found.after.new_tokens:.1f} bits more than its pieces did "
            f"({found.after.new_tokens:,} in the text)",
            f"at most {found.guess:.1f}, which a blind guess costs",
        )


def _broken(found: str, needed: str) -> LexigraftError:
    return LexigraftError(
        f"--probe: {found}; nothing was kept",
        needed=needed,
        fix="another --init; or leave out --probe, and train the rows before anyone uses them",
    )
