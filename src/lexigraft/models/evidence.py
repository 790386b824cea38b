"""What shows that a new row was learned: a look at the places where its token should come next.

At each such target: the bits it costs, its rank, and how much probability stays with the first
old piece of its spelling (the leak). At a few targets of each row the model also writes on by
itself until the token's text is there or can no longer come: it has *adopted* the token, still
*spells* it in other tokens, or *missed* it. Adoption is adopted / (adopted + spelled), after
Vocabulary Customization (eBay 2025, arXiv:2509.26124); ranks are looked at as in the Greek
extension of Apertus (fffoivos/glossapi-tokenizer-extension).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lexigraft.families import Family
from lexigraft.families.measure import read_rows
from lexigraft.families.tokenmap import readable
from lexigraft.manifest import NEW_TOKENS, NewIds
from lexigraft.models.bits import POSITIONS, Score, predictions

# Contexts in which a model writes on: enough to tell 80% from 90% over all, and each row a few.
WRITTEN_PER_ROW = 4
WRITTEN = 256
# Positions of training text that are read for rows that held-out text lacks: about as many as a
# measurement reads.
TRAINING_POSITIONS = 8192


class NewTokens(NamedTuple):
    """The new tokens of a model.

    Attributes:
        ids: their ids.
        pieces: id -> the base ids that spell it; ids of which no file tells are not in it.
    """

    family: Family
    ids: NewIds
    pieces: dict[int, list[int]]

    def text(self, token: int) -> bytes | None:
        """The UTF-8 bytes that an id stands for, old or new; None for a padding row."""
        return self.family.token_bytes(token) if token in self.family.map.texts else None

    def spelled(self, line: Sequence[int]) -> list[int] | None:
        """`line` in base ids alone; None where a new token's spelling is unknown."""
        found: list[int] = []
        for token in line:
            if token not in self.ids:
                found.append(token)
            elif token in self.pieces:
                found += self.pieces[token]
            else:
                return None
        return found


def new_tokens(folder: Path, family: Family, ids: NewIds) -> NewTokens:
    """The new tokens of the model in `folder`, spelled as its `new_tokens.jsonl` says.

    Raises:
        LexigraftError: that file is damaged, or belongs to another tokenizer.
    """
    listed = folder / NEW_TOKENS
    rows = read_rows(listed, ids) if len(ids) and listed.is_file() else []
    return NewTokens(family, ids, {int(row["id"]): list(row["pieces"]) for row in rows})


class Target(NamedTuple):
    """A place where a new token comes next, under the model.

    Attributes:
        place, position: which line, and which of its ids; what stands before is the context.
        rank: 1 if the token is the likeliest.
        leak: probability of the first old piece of its spelling; NaN where that is unknown.
        likeliest: the id that the model would write.
    """

    token: int
    place: int
    position: int
    nats: float
    rank: int
    leak: float
    likeliest: int


class Watcher:
    """Collects a `Target` for each new token among some lines while they are scored."""

    def __init__(self, new: NewTokens, lines: Sequence[Sequence[int]], before: int = 0) -> None:
        """`lines[i][before:]` are the ids whose logits `__call__` will be shown."""
        self.targets: list[Target] = []
        self._new, self._lines, self._before = new, lines, before

    def __call__(self, place: int, logits: Tensor) -> None:
        """Look at line `place`: logits (ids, rows)."""
        line = self._lines[place]
        found = [i for i in range(self._before, len(line)) if line[i] in self._new.ids]
        for begin in range(0, len(found), POSITIONS):
            some = found[begin : begin + POSITIONS]
            rows = torch.tensor([i - self._before for i in some], device=logits.device)
            self.targets += self._seen(place, some, logits[rows])

    def _seen(self, place: int, positions: Sequence[int], logits: Tensor) -> list[Target]:
        tokens = [self._lines[place][i] for i in positions]
        pieces = self._new.pieces
        log_p = logits.float().log_softmax(dim=-1)

        def of(ids: Sequence[int]) -> Tensor:
            index = torch.tensor(ids, device=logits.device)[:, None]
            return log_p.gather(1, index)

        own = of(tokens)
        first = of([pieces[t][0] if pieces.get(t) else 0 for t in tokens])[:, 0].exp().tolist()
        leaks = [p if pieces.get(t) else math.nan for p, t in zip(first, tokens, strict=True)]
        columns = zip(
            tokens,
            positions,
            (-own[:, 0]).tolist(),
            ((log_p > own).sum(dim=-1) + 1).tolist(),
            leaks,
            log_p.argmax(dim=-1).tolist(),
            strict=True,
        )
        return [Target(token, place, position, *rest) for token, position, *rest in columns]


def shares(targets: Sequence[Target], new: NewTokens, whole: Score) -> dict[str, float | None]:
    """The bits of a text split into those of its new and of its old tokens.

    Args:
        targets: all new tokens of the text.
        whole: the text under the model.

    Returns:
        `old_bpb` and `new_bpb`, each over the bytes that these tokens stand for; `new_top1`, the
        share of new tokens that are the likeliest; `leak`, the mean. None without such a token.
    """
    of_new = sum(target.nats for target in targets) / math.log(2)
    new_size = sum(len(new.family.token_bytes(target.token)) for target in targets)
    old_size = whole.bytes - new_size
    return {
        "old_bpb": (whole.bits - of_new) / old_size if old_size > 0 else None,
        "new_bpb": of_new / new_size if new_size else None,
        "new_top1": _mean([float(target.rank == 1) for target in targets]),
        "leak": _mean([target.leak for target in targets]),
    }


def bits_of(targets: Iterable[Target]) -> dict[int, float]:
    """Id of each token among `targets` -> the bits that it costs there, in the mean."""
    found: dict[int, list[float]] = {}
    for target in targets:
        found.setdefault(target.token, []).append(target.nats / math.log(2))
    return {token: sum(bits) / len(bits) for token, bits in found.items()}


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class RowEvidence:
    """What is known of one new row.

    Attributes:
        text: its token as it reads; bytes that are no whole character as `<E596>`.
        targets, inputs: how often training met it, as what comes next and as what is read.
        moved: distance from where it was, over all vocabulary matrices.
        looked_at: targets at which the measures below were taken.
        held_out: whether these stand in held-out text; otherwise in training text.
        top1: share of them at which it is the likeliest token.
        rank: its mean rank there.
        leak: mean probability of the first old piece of its spelling there.
        adopted, spelled, missed: what the model wrote at some of them.
        bits: what it costs there, in the mean.
        bits_before: the same before training; None where that is not known, as at targets in
            training text.
        within: how often longer new tokens that hold its text were targets of training.
    """

    id: int
    text: str
    targets: int
    inputs: int
    moved: float
    looked_at: int
    held_out: bool
    top1: float | None
    rank: float | None
    leak: float | None
    adopted: int
    spelled: int
    missed: int
    bits: float | None = None
    bits_before: float | None = None
    within: int = 0


class TrainingLines:
    """Lines of training text that end in new tokens which held-out text lacks, one for each."""

    def __init__(self, ids: NewIds, held: Iterable[Sequence[int]]) -> None:
        """`held` are the lines of held-out text."""
        at_hand = {token for line in held for token in line if token in ids}
        self.lines: list[list[int]] = []
        self._ids = ids
        self._missing = np.array([token not in at_hand for token in ids])
        self._room = TRAINING_POSITIONS

    @property
    def are_enough(self) -> bool:
        """Whether nothing is missing, or no more may be read."""
        return self._room <= 0 or not self._missing.any()

    def look(
        self,
        inputs: npt.NDArray[Any],
        targets: npt.NDArray[Any],
        positions: npt.NDArray[Any],
    ) -> None:
        """Take what is missing out of some training text, each array (B, T) as in `Blocks`."""
        found = places_of(targets, self._ids)
        for place in np.unique(np.nonzero(found >= 0)[0]).tolist():
            if self.are_enough:
                return
            new = np.unique(found[place][found[place] >= 0])
            for row in new[self._missing[new]].tolist():
                # From the start of the document, as far as the block has it.
                end = int(np.flatnonzero(found[place] == row)[0])
                begin = end - int(positions[place, end])
                line = [*inputs[place, begin : end + 1].tolist(), self._ids[row]]
                self.lines.append(line)
                self._room -= len(line)
            self._missing[new] = False


def gather(
    model: Any,
    new: NewTokens,
    held: Sequence[Sequence[int]],
    training: Sequence[Sequence[int]],
    seen: Sequence[tuple[int, int, float]],
    *,
    before: Mapping[int, float],
) -> list[RowEvidence]:
    """The evidence of every new row, in the order of their ids.

    Args:
        model: as it is after training.
        held: lines of held-out text, each with what stands before a text.
        training: `TrainingLines`: where rows are looked at that `held` lacks.
        seen: per row how often it was a target of training, how often an input, and how far it
            has moved.
        before: id -> `bits_of` the targets in held-out text before training.
    """
    at_hand = {token for line in held for token in line if token in new.ids}
    lines = [*held, *training]
    watcher = Watcher(new, lines, before=1)
    for place, logits in predictions(model, lines):
        watcher(place, logits)
    targets = sorted(watcher.targets, key=lambda target: (target.place, target.position))
    by_row: dict[int, list[Target]] = {token: [] for token in new.ids}
    for target in targets:
        by_row[target.token].append(target)
    outcomes = written(model, new, lines, _sample(by_row))
    texts = [new.family.token_bytes(token) for token in new.ids]
    within = within_longer(texts, [targets for targets, _, _ in seen])
    return [
        _row(
            token,
            new,
            [t for t in by_row[token] if t.place < len(held) or token not in at_hand],
            outcomes[token],
            is_held=token in at_hand,
            seen=seen[place],
            before=before.get(token),
            within=within[place],
        )
        for place, token in enumerate(new.ids)
    ]


def _row(
    token: int,
    new: NewTokens,
    targets: Sequence[Target],
    outcomes: Counter[str],
    *,
    is_held: bool,
    seen: tuple[int, int, float],
    before: float | None,
    within: int,
) -> RowEvidence:
    return RowEvidence(
        id=token,
        text=readable(new.family.token_bytes(token)),
        targets=seen[0],
        inputs=seen[1],
        moved=seen[2],
        looked_at=len(targets),
        held_out=is_held,
        top1=_mean([float(target.rank == 1) for target in targets]),
        rank=_mean([target.rank for target in targets]),
        leak=_mean([target.leak for target in targets]),
        adopted=outcomes["adopted"],
        spelled=outcomes["spelled"],
        missed=outcomes["missed"],
        bits=bits_of(targets).get(token),
        bits_before=before,
        within=within,
    )


def within_longer(texts: Sequence[bytes], counts: Sequence[int]) -> list[int]:
    """Of each text, how often the longer ones that it stands in were counted.

    >>> within_longer([b"hepat", b"hepatitis", b"hepatic"], [0, 50, 7])
    [57, 0, 0]
    """
    known = set(texts)
    lengths = sorted({len(text) for text in known if text})
    within: Counter[bytes] = Counter()
    for text, count in zip(texts, counts, strict=True):
        pieces = {
            piece
            for length in lengths[: bisect_left(lengths, len(text))]
            for begin in range(len(text) - length + 1)
            if (piece := text[begin : begin + length]) in known
        }
        within.update(dict.fromkeys(pieces, count))
    return [within[text] for text in texts]


def places_of(found: npt.NDArray[Any], ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """The place of each of `found` among `ids`, which ascend; -1 of what is not there."""
    known = np.asarray(ids, np.int64)
    if not known.size:
        return np.full(found.shape, -1)
    places = np.searchsorted(known, found).clip(max=known.size - 1)
    return np.where(known[places] == found, places, -1)


def _sample(by_row: Mapping[int, Sequence[Target]]) -> list[Target]:
    """The targets of each row with the shortest contexts, which cost least to write on from.

    One of every row comes before a second of any.
    """
    shortest = [sorted(targets, key=lambda target: target.position) for targets in by_row.values()]
    turns = [
        targets[turn]
        for turn in range(WRITTEN_PER_ROW)
        for targets in shortest
        if turn < len(targets)
    ]
    return turns[:WRITTEN]


def written(
    model: Any, new: NewTokens, lines: Sequence[Sequence[int]], targets: Iterable[Target]
) -> dict[int, Counter[str]]:
    """Id -> how often the model `adopted`, `spelled` or `missed` it where it should come next.

    The model writes its likeliest token, and the next, until the new token's text is complete
    (spelled, exactly), or what it wrote can no longer become it (missed). The new token itself
    as the first one is adopted.
    """
    outcomes: dict[int, Counter[str]] = {token: Counter() for token in new.ids}
    going: list[tuple[Target, list[int]]] = []
    for target in targets:
        if target.rank == 1:
            outcomes[target.token]["adopted"] += 1
        else:
            going.append((target, [target.likeliest]))
    while going:
        unfinished = []
        for target, ids in going:
            state = _state(new, target.token, ids)
            if state is None:
                unfinished.append((target, ids))
            else:
                outcomes[target.token][state] += 1
        contexts = [[*lines[target.place][: target.position], *ids] for target, ids in unfinished]
        following = _likeliest(model, contexts)
        going = [(t, [*ids, token]) for (t, ids), token in zip(unfinished, following, strict=True)]
    return outcomes


def _state(new: NewTokens, token: int, ids: Sequence[int]) -> str | None:
    """What `ids`, written instead of `token`, have come to; None while it may still be spelled."""
    texts = [new.text(i) for i in ids]
    wanted = new.family.token_bytes(token)
    if any(not text for text in texts):
        return "missed"
    text = b"".join(filter(None, texts))
    if text == wanted:
        return "spelled"
    return None if wanted.startswith(text) else "missed"


def _likeliest(model: Any, contexts: Sequence[Sequence[int]]) -> list[int]:
    """The id that the model would write behind each context."""
    found = [0] * len(contexts)
    for place, logits in predictions(model, [[*context, 0] for context in contexts]):
        found[place] = int(logits[-1].argmax())
    return found
