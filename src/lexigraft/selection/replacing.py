"""Which old tokens new words replace, and what texts lose with them.

The order is that of pruning (`selection.pruning`): tokens that come out of no text, then those
whose rows training never moved, then the least used ones. "Replace, then expand" (VocabAdapt,
arXiv 2605.17379) replaces tokens of the first two kinds alone.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.families.proof import HARD_TEXTS
from lexigraft.families.replacing import refuse_ranks, vacate
from lexigraft.files import disk_faults
from lexigraft.selection.pruning import Reading, choose, count_tokens, prove, template_ids

_ALL = 2**62  # no number of occurrences keeps a token


@dataclass(frozen=True)
class Replacement:
    """Old tokens whose ids and rows new words have, and what that costs.

    Attributes:
        unreachable: how many of them came out of no text.
        untrained: of the others, whose rows training never moved.
        rare: the rest, the least used ones.
        domain: the domain text without them, before any new word; None without such text.
        general: the same of general text by which none of them was chosen.
    """

    unreachable: int
    untrained: int
    rare: int
    domain: Reading | None
    general: Reading | None

    @classmethod
    def of(
        cls,
        base: Family,
        left: Family,
        reasons: Sequence[str],
        *,
        domain: Sequence[str],
        general: Sequence[str],
    ) -> Replacement:
        """Prove that texts without these tokens are read as before, and count the others.

        Args:
            base: the tokenizer.
            left: the same without its `vacant` tokens.
            reasons: why each of them went.
            domain: text of the field.
            general: text that must not get worse.

        Raises:
            LexigraftError: a text of tokens that stay is read otherwise.
        """
        places = {token_id: token_id for token_id in left.map.texts}
        prove(base, left, places, HARD_TEXTS)
        readings = (
            prove(base, left, places, texts) if texts else None for texts in (domain, general)
        )
        found = Counter(reasons)
        return cls(found["unreachable"], found["untrained"], found["rare"], *readings)

    @property
    def count(self) -> int:
        """How many tokens were replaced."""
        return self.unreachable + self.untrained + self.rare

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"count": self.count, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """What a person reads."""
        yield (
            f"{self.count:,} old tokens gave their ids and rows away: {self.unreachable:,} that "
            f"no text has, {self.untrained:,} never trained, {self.rare:,} least used"
        )
        for name, reading in (("domain", self.domain), ("general", self.general)):
            if reading is not None:
                yield "without them, " + reading.line(f"{name} text")


def choose_leaving(
    family: Family,
    count: int,
    *,
    untrained: Collection[int],
    kept: Collection[int],
    texts: Sequence[str],
    by_use: bool,
) -> dict[int, str]:
    """The tokens to go, id -> why, in the order in which they go.

    The chat template's tokens stay, the highest id, and tokens that come out of texts which the
    others cannot spell. Without its last tokens, the result is one as well: none needs a token
    behind it.

    Args:
        family: the base.
        count: how many.
        untrained: ids whose rows training never moved; one that comes out of a text goes for its
            little use alone.
        kept: further ids that must stay.
        texts: where the least used tokens are looked for.
        by_use: whether tokens go for that reason.

    Raises:
        LexigraftError: there are not so many.
        RefusalError: a kind of tokenizer in which ids cannot be given away.
    """
    refuse_ranks(family)
    counts = count_tokens(family, texts)
    stay = {*kept, *template_ids(family), *family.start_ids(), family.map.tokens - 1}
    while True:
        found = choose(
            family,
            protected=stay if by_use else stay.union(counts.nonzero()[0].tolist()),
            counts=counts if by_use else None,
            min_count=_ALL,
            untrained=[token_id for token_id in untrained if not counts[token_id]],
            most=count,
        ).dropped
        if len(found) < count:
            lacking = "" if by_use else ", and without --general none can go for its little use"
            raise LexigraftError(
                f"--replace {count}: {len(found):,} tokens can go (that no text has, or whose "
                f"rows training never moved){lacking}",
                needed="as many tokens as are to be replaced",
                fix=f"--replace {len(found)}" + ("" if by_use else ", or add --general TEXT"),
            )
        lost = _not_spelled(family, found)
        if not lost:
            return found
        stay.update(lost)


def _not_spelled(family: Family, gone: Mapping[int, str]) -> list[int]:
    """Those of the tokens that texts have and the others do not spell."""
    with tempfile.TemporaryDirectory(prefix="lexigraft-") as scratch:
        with disk_faults(Path(scratch)):
            left = vacate(family, sorted(gone), Path(scratch))
        return [
            token_id
            for token_id, why in gone.items()
            if why != "unreachable"
            and b"".join(map(left.token_bytes, left.pieces(family.map.texts[token_id])))
            != family.token_bytes(token_id)
        ]
