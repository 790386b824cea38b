"""Was the training enough? Rules with their thresholds, and what to do where one is broken.

The verdict is `harmful` where the model has become worse than it was, `not yet` where more text,
more training or fewer tokens would help, `sufficient` where no rule is broken. What could not be
measured breaks no rule; it is listed as unknown. Sources of the thresholds: docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which needs torch; reports read verdicts without it
    from lexigraft.models.evidence import RowEvidence

SUFFICIENT, NOT_YET, HARMFUL = "sufficient", "not yet", "harmful"
# What a verdict may call unknown, filled with its thresholds.
UNKNOWN = {
    "domain": "bits per byte of the field's text (give --held-out text)",
    "base": "bits per byte of the base (name it with --base)",
    "general": "whether general text got worse (give --general text, more than a page of it)",
    "falling": "whether more text would help (measure more often, --measurements)",
    "adoption": "whether new tokens are adopted: the model wrote the text of one at fewer than "
    "{decided} places",
    "parts": "how parts of longer new tokens read where they stand alone: some were predicted "
    "fewer than {floor} times, and more text of this kind holds them inside the longer ones too",
}


@dataclass(frozen=True)
class Thresholds:
    """All of them, as they stand in training.json.

    Attributes:
        floor, floor_share: at most this share of the new rows may have been a target fewer than
            `floor` times; those that `is_taken` are not counted.
        support, support_share: the same for what a row should have.
        falling: domain bits per byte still fall by more than this share per doubling of the text.
        general: general bits per byte may be this share above the base's.
        adoption: the least share of new tokens where the model writes the text of one.
        decided: at fewer places than this, adoption is not judged.
        weakest: how many tokens are named.
    """

    floor: int = 20
    floor_share: float = 0.01
    support: int = 100
    support_share: float = 0.1
    falling: float = 0.01
    general: float = 0.01
    adoption: float = 0.9
    decided: int = 10
    weakest: int = 10


@dataclass(frozen=True)
class Reason:
    """A rule that is broken: what was found, what is needed, and what to do next."""

    rule: str
    verdict: str
    found: str
    needed: str
    next: str


@dataclass(frozen=True)
class Verdict:
    """What the training amounts to.

    Attributes:
        verdict: `sufficient`, `not yet` or `harmful`: that of the worst reason.
        reasons: the rules that are broken.
        unknown: what was not measured, and how to have it measured.
    """

    verdict: str
    reasons: tuple[Reason, ...]
    unknown: tuple[str, ...]
    thresholds: Thresholds

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self),
            "reasons": [asdict(reason) for reason in self.reasons],
            "unknown": list(self.unknown),
        }


def verdict_lines(verdict: Mapping[str, Any]) -> list[str]:
    """A verdict, as `to_json` gives it, in plain words."""
    meaning = {
        SUFFICIENT: "no rule is broken",
        NOT_YET: "what is missing, and what to do",
        HARMFUL: "the model has become worse",
    }[verdict["verdict"]]
    lines = [f"verdict  {verdict['verdict']}: {meaning}"]
    for reason in verdict["reasons"]:
        lines += [f"- {reason['found']}; needed: {reason['needed']}", f"  next: {reason['next']}"]
    return [*lines, *(f"- unknown: {text}" for text in verdict["unknown"])]


def judge(
    log: Sequence[Mapping[str, float | None]],
    base: Mapping[str, float | None],
    rows: Sequence[RowEvidence],
    thresholds: Thresholds = Thresholds(),
) -> Verdict:
    """The verdict on a training.

    Args:
        log: its measurements, that of the untrained model first; the last is of what is kept.
        base: `domain_bpb` and `general_bpb` of the un-grafted base on the same text, each None
            where it is unknown.
        rows: the evidence of every new row.
    """
    found = [
        *_general(log, base, thresholds),
        *_domain(log, base, thresholds),
        *_occurrences(log, rows, thresholds),
        *_unmoved(rows, thresholds),
        *_adoption(rows, thresholds),
    ]
    kinds = {reason.verdict for reason in found}
    worst = next((kind for kind in (HARMFUL, NOT_YET) if kind in kinds), SUFFICIENT)
    return Verdict(worst, tuple(found), tuple(_unknown(log, base, rows, thresholds)), thresholds)


def _general(
    log: Sequence[Mapping[str, float | None]],
    base: Mapping[str, float | None],
    limits: Thresholds,
) -> list[Reason]:
    after, before = log[-1]["general_bpb"], _reference(log, base, "general_bpb")
    if after is None or before is None or after <= before[0] * (1 + limits.general):
        return []
    return [
        Reason(
            "general",
            HARMFUL,
            f"general text takes {after:.3f} bits per byte, {after / before[0] - 1:.1%} more than "
            f"{before[1]} ({before[0]:.3f})",
            f"at most {limits.general:.0%} more",
            "raise --replay (more --general text), or lower --learning-rate",
        )
    ]


def _reference(
    log: Sequence[Mapping[str, float | None]], base: Mapping[str, float | None], key: str
) -> tuple[float, str] | None:
    """What a figure is compared with, and its name: the base's, else that before training."""
    known, start = base.get(key), log[0][key]
    if known is not None:
        return known, "the base"
    return None if start is None else (start, "before training")


def _domain(
    log: Sequence[Mapping[str, float | None]],
    base: Mapping[str, float | None],
    limits: Thresholds,
) -> list[Reason]:
    after, start, of_base = log[-1]["domain_bpb"], log[0]["domain_bpb"], base.get("domain_bpb")
    if after is None or start is None:
        return []
    found = []
    if after > start:
        found.append(
            Reason(
                "domain",
                HARMFUL,
                f"text of the field takes {after:.3f} bits per byte, {start:.3f} before training",
                "less than before training",
                "lower --learning-rate and --new-row-learning-rate",
            )
        )
    elif of_base is not None and after > of_base:
        found.append(
            Reason(
                "domain",
                NOT_YET,
                f"text of the field takes {after:.3f} bits per byte, the base {of_base:.3f}",
                "no more than the base",
                "train on more text (--max-bytes), or learn fewer tokens (lexigraft learn "
                "--tokens)",
            )
        )
    fall = fall_per_doubling(log)
    if fall is not None and fall > limits.falling:
        found.append(
            Reason(
                "falling",
                NOT_YET,
                f"bits per byte of the field's text were still falling, by {fall:.1%} per "
                "doubling of the text",
                f"at most {limits.falling:.0%}",
                "train on more text (--max-bytes): it still helps",
            )
        )
    return found


def fall_per_doubling(log: Sequence[Mapping[str, float | None]]) -> float | None:
    """By which share domain bits per byte fell, per doubling of the text, in the last half of it.

    None without a measurement between the start and the end, near half of the text.

    >>> log = [{"text_bytes": n, "domain_bpb": b} for n, b in ((0, 3.0), (50, 2.0), (100, 1.5))]
    >>> fall_per_doubling(log)
    0.25
    """
    end = log[-1]
    size, after = end["text_bytes"] or 0, end["domain_bpb"]
    earlier = [
        (entry["text_bytes"], entry["domain_bpb"])
        for entry in log[1:]
        if entry["text_bytes"] and size / 4 <= entry["text_bytes"] < size
    ]
    if after is None or not earlier:
        return None
    middle, before = min(earlier, key=lambda pair: abs((pair[0] or 0) - size / 2))
    if not middle or not before:
        return None
    return (1 - after / before) / math.log2(size / middle)


@dataclass(frozen=True)
class Starved:
    """New rows that were a target too few times.

    Attributes:
        places: which rows, in their order.
        rows: how many were judged.
        least, share: all but this share of them should have been a target so many times.
        supported: bytes of text for which `learn` chooses only what this training can teach.
    """

    places: tuple[int, ...]
    rows: int
    least: int
    share: float
    supported: int


def is_taken(count: int, within: int, least: int) -> bool:
    """Whether the text held a token often enough, but in longer new ones, which took its places.

    BPE needs such a token on its way to the longer one, and more text of the kind does not help it.
    """
    return count < least <= count + within


def starved(
    counts: Sequence[int], within: Sequence[int], text_bytes: int, limits: Thresholds
) -> Starved | None:
    """The rule on occurrences: `floor`, else `support`; None where it is kept.

    `learn` expects of a token what it counts in its corpus, but a longer token takes some of that,
    and words come in clusters. So the size of text that is advised is smaller by what the first row
    that should have had enough is short of: the same number again would choose the same tokens.

    Args:
        counts: how often each new row was a target.
        within: how often the longer new tokens were that hold its token.
        text_bytes: how much text was read.
    """
    for least, share in (
        (limits.floor, limits.floor_share),
        (limits.support, limits.support_share),
    ):
        taken = sum(is_taken(*pair, least) for pair in zip(counts, within, strict=True))
        few = tuple(i for i, count in enumerate(counts) if count + within[i] < least)
        judged = len(counts) - taken
        allowed = int(share * judged)
        if len(few) > allowed:
            first = sorted(counts[place] for place in few)[allowed]
            supported = text_bytes * max(first, 1) // least
            return Starved(few, judged, least, share, supported)
    return None


def _occurrences(
    log: Sequence[Mapping[str, float | None]], rows: Sequence[RowEvidence], limits: Thresholds
) -> list[Reason]:
    found = starved(
        [row.targets for row in rows],
        [row.within for row in rows],
        int(log[-1]["text_bytes"] or 0),
        limits,
    )
    if found is None:
        return []
    few = [rows[place] for place in found.places]
    apart = "" if found.rows == len(rows) else " (parts of longer ones apart)"
    return [
        Reason(
            "occurrences",
            NOT_YET,
            f"{len(few):,} of {found.rows:,} new tokens{apart} were predicted fewer than "
            f"{found.least} times in training",
            f"{found.least} times, for all but {found.share:.0%} of them",
            f"train on more text that holds {_weakest(few, limits)}, or learn only words that "
            f"this much can teach (lexigraft learn --train-bytes {found.supported})",
        )
    ]


def _unmoved(rows: Sequence[RowEvidence], limits: Thresholds) -> list[Reason]:
    still = [row for row in rows if not row.moved]
    if not still:
        return []
    return [
        Reason(
            "moved",
            NOT_YET,
            f"{len(still):,} new rows have not moved",
            "every new row moves",
            f"prune these tokens, or add text that holds them: {_weakest(still, limits)}",
        )
    ]


def adoption(rows: Sequence[RowEvidence]) -> tuple[float | None, int]:
    """Share of new tokens where the model wrote the text of one, and at how many places it did."""
    adopted, spelled = sum(row.adopted for row in rows), sum(row.spelled for row in rows)
    decided = adopted + spelled
    return (adopted / decided if decided else None), decided


def row_verdict(row: Mapping[str, Any], limits: Thresholds = Thresholds()) -> str:
    """What the rules say of one new row, given as `RowEvidence` has it.

    `unmoved`; `rare`, a target too few times; `spelled`, the model rather writes its old
    spelling; else `learned`.
    """
    if not row["moved"]:
        return "unmoved"
    if row["targets"] < limits.floor:
        return "rare"
    return "spelled" if row["spelled"] >= max(1, row["adopted"]) else "learned"


def _adoption(rows: Sequence[RowEvidence], limits: Thresholds) -> list[Reason]:
    share, decided = adoption(rows)
    if share is None or decided < limits.decided or share >= limits.adoption:
        return []
    spelled = [row for row in rows if row.spelled >= max(1, row.adopted)]
    return [
        Reason(
            "adoption",
            NOT_YET,
            f"where the model wrote the text of a new token, it used the token in {share:.0%} of "
            f"{decided:,} places and its old spelling in the others",
            f"the token in {limits.adoption:.0%}",
            f"train longer, or add text that holds {_weakest(spelled or rows, limits)}",
        )
    ]


def _weakest(rows: Sequence[RowEvidence], limits: Thresholds) -> str:
    """The rows with the least support, by name."""
    order = sorted(rows, key=lambda row: (row.targets, row.adopted - row.spelled, row.id))
    named = ", ".join(repr(row.text) for row in order[: limits.weakest])
    rest = len(rows) - limits.weakest
    return f"{named} and {rest:,} more" if rest > 0 else named


def _unknown(
    log: Sequence[Mapping[str, float | None]],
    base: Mapping[str, float | None],
    rows: Sequence[RowEvidence],
    limits: Thresholds,
) -> list[str]:
    end = log[-1]
    found = []
    if end["domain_bpb"] is None:
        found.append("domain")
    elif base.get("domain_bpb") is None:
        found.append("base")
    if end["general_bpb"] is None:
        found.append("general")
    if end["domain_bpb"] is not None and fall_per_doubling(log) is None:
        found.append("falling")
    if rows and adoption(rows)[1] < limits.decided:
        found.append("adoption")
    if any(is_taken(row.targets, row.within, limits.floor) for row in rows):
        found.append("parts")
    return [UNKNOWN[key].format(**asdict(limits)) for key in found]
