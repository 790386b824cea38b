"""Which old tokens new words may replace, in the order in which they go.

First the tokens that are of no use to anyone: those that the tokenizer never emits, then those
whose rows training never moved (Land & Bartolo 2024, arXiv 2405.05417, for both signs). Then the
least used ones of some text: of tokens that nothing else is made of, the one that comes out least
often goes, its uses fall to its parts, and so on. The order is that of "replace, then expand"
(VocabAdapt, arXiv 2605.17379), whose replaced tokens are those of the first two kinds alone.
"""

from __future__ import annotations

import heapq
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.families.proof import Removal
from lexigraft.families.replacing import refuse_ranks, vacate

UNREACHABLE, UNTRAINED, LEAST_USED = "unreachable", "untrained", "least used"
# What may stand before a token: at the start of a text, within a word, a line, a number.
_BEFORE = ("", "a", " ", "a ", "\n", "1", ".")


@dataclass(frozen=True)
class Leaving:
    """A token that is to go: its id, why, and how often it comes out of the text looked at."""

    id: int
    why: str
    count: int


def leaving(
    family: Family,
    count: int,
    *,
    untrained: Collection[int],
    kept: Collection[int],
    texts: Iterable[str],
    least_used: bool,
) -> list[Leaving]:
    """The first `count` tokens to go, or as many as there are.

    Never goes what is kept by its nature (`kept`, `Family.fixed`, characters and their parts, the
    highest id), nor what a token that stays needs (`Family.needs`): every beginning of the result
    can go without the rest.

    Args:
        family: the base.
        count: how many.
        untrained: ids whose rows training never moved.
        kept: further ids that must stay.
        texts: what comes out of them goes last, whatever else is known of it.
        least_used: whether tokens go for no other reason than that.
    """
    used = Counter(token_id for ids in _read(family, texts) for token_id in ids)
    removable = _removable(family, kept)
    dead = _unreachable(family, sorted(i for i in removable if not used[i]))
    parts = family.needs()
    children: Counter[int] = Counter(part for of in parts.values() for part in set(of))

    def rank(token_id: int) -> tuple[int, int, int]:
        if used[token_id]:
            return 2, used[token_id], -token_id
        if token_id in dead:
            return 0, 0, -token_id
        return (1 if token_id in untrained else 2), 0, -token_id

    waiting = [rank(i) for i in removable if not children[i]]
    heapq.heapify(waiting)
    found: list[Leaving] = []
    while waiting and len(found) < count:
        kind, uses, negative = heapq.heappop(waiting)
        token_id = -negative
        if kind == 2 and not least_used:
            break
        found.append(Leaving(token_id, (UNREACHABLE, UNTRAINED, LEAST_USED)[kind], uses))
        for part in set(parts.get(token_id, ())):
            children[part] -= 1
            used[part] += uses
            if part in removable and not children[part]:
                heapq.heappush(waiting, rank(part))
    return found


@dataclass(frozen=True)
class Replacement:
    """Old tokens whose ids and rows new words have, and what that costs.

    Attributes:
        unreachable: how many of them came out of no text.
        untrained: of the others, whose rows training never moved.
        least_used: the rest.
        domain: what became of the domain text without them, before any new word.
        general: the same of general text in which they were not chosen; None without such text.
        proved: the same of all proof texts.
    """

    unreachable: int
    untrained: int
    least_used: int
    domain: Removal | None
    general: Removal | None
    proved: Removal

    @classmethod
    def of(
        cls, gone: Sequence[Leaving], *, domain: Removal, general: Removal, hard: Removal
    ) -> Replacement:
        """What is known of the tokens that are gone."""
        found = Counter(one.why for one in gone)
        return cls(
            found[UNREACHABLE],
            found[UNTRAINED],
            found[LEAST_USED],
            domain if domain.texts else None,
            general if general.texts else None,
            hard.plus(domain).plus(general),
        )

    @property
    def count(self) -> int:
        """How many tokens were replaced."""
        return self.unreachable + self.untrained + self.least_used

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"count": self.count, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """What a person reads."""
        yield (
            f"{self.count:,} old tokens gave their ids and rows away: {self.unreachable:,} that "
            f"no text has, {self.untrained:,} never trained, {self.least_used:,} least used"
        )
        for name, found in (("domain", self.domain), ("general", self.general)):
            if found is not None:
                yield (
                    f"without them, {found.changed:,} of {found.texts:,} {name} texts are read "
                    f"otherwise: {found.lengths.tokens_before:,} -> "
                    f"{found.lengths.tokens_after:,} tokens"
                )


def choose_leaving(
    family: Family,
    count: int,
    *,
    untrained: Collection[int],
    kept: Collection[int],
    texts: Sequence[str],
    least_used: bool,
) -> list[Leaving]:
    """`leaving`, of tokens whose text the others can spell.

    Raises:
        LexigraftError: there are not so many.
        RefusalError: a kind of tokenizer in which ids cannot be given away.
    """
    refuse_ranks(family)
    stay = set(kept)
    while True:
        found = leaving(
            family, count, untrained=untrained, kept=stay, texts=texts, least_used=least_used
        )
        if len(found) < count:
            by_use = "" if least_used else ", and without --general none can go for its little use"
            raise LexigraftError(
                f"--replace {count}: {len(found):,} tokens can go (that no text has, or whose "
                f"rows training never moved){by_use}",
                needed="as many tokens as are to be replaced",
                fix=f"--replace {len(found)}" + ("" if least_used else ", or add --general TEXT"),
            )
        with tempfile.TemporaryDirectory(prefix="lexigraft-") as scratch:
            ids = sorted(one.id for one in found)
            left = vacate(family, ids, Path(scratch))
            lost = [
                token_id
                for token_id in ids
                if b"".join(map(left.token_bytes, left.pieces(family.map.texts[token_id])))
                != family.token_bytes(token_id)
            ]
        if not lost:
            return found
        stay.update(lost)


def _removable(family: Family, kept: Collection[int]) -> set[int]:
    texts = family.map.texts
    apart = {
        *family.fixed,
        *kept,
        *family.start_ids(),
        family.unknown_id,
        family.map.tokens - 1,
    }
    return {
        token_id
        for token_id, text in texts.items()
        if token_id not in apart
        and family.map.ids[text] == token_id
        and _is_longer_than_a_character(family.token_bytes(token_id))
    }


def _is_longer_than_a_character(data: bytes) -> bool:
    try:
        return len(data.decode()) > 1
    except UnicodeDecodeError:  # parts of characters
        return False


def _unreachable(family: Family, ids: Sequence[int]) -> set[int]:
    """Those of `ids` that come out of no text: not by their spelling, and where it is known what
    a text is split into first, neither alone nor behind what may stand before them."""
    texts = family.map.texts
    dead = {i for i in ids if family.pieces(texts[i]) != [i]}
    asked = ids if family.guaranteed else sorted(dead)
    emitted: set[int] = set()
    for before in _BEFORE:
        left = [i for i in asked if i not in emitted]
        words = [before + family.token_bytes(i).decode() for i in left]
        lines = family.encode_batch(words)
        emitted |= {i for i, line in zip(left, lines, strict=True) if i in line}
    return {i for i in asked if i not in emitted}


def _read(family: Family, texts: Iterable[str]) -> Iterator[list[int]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 1024:
            yield from family.encode_batch(batch)
            batch.clear()
    if batch:
        yield from family.encode_batch(batch)
