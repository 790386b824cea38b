"""Reasons to drop a candidate that only the whole set of candidates shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lexigraft.families import Family
from lexigraft.families.choice import Judge, with_parts
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.llama_cpp import check_text
from lexigraft.families.units import Ints, Units
from lexigraft.selection.contrast import Floats, is_specific, log_odds


class Contrast:
    """Candidates against a contrast text: which belong to the domain.

    What is compared is how often the letters of a token are joined to it in both texts, also
    where it is then a part of a longer token: that depends on the texts, not on what else is
    learned.

    Args:
        family: the base.
        domain: units of the learning text.
        contrast: units of the text to compare with.
        asked: tokens that are wanted however common they are.
    """

    def __init__(
        self, family: Family, domain: Units, contrast: Units, asked: frozenset[str] = frozenset()
    ) -> None:
        self.family = family
        self.domain = domain
        self.contrast = contrast
        self.asked = asked

    def z_scores(self, merges: Sequence[Merge]) -> Floats:
        """(n,) z-score of each token's log-odds in the domain."""
        if not merges:
            return np.zeros(0)
        _, z = log_odds(
            self._formed(self.domain, merges),
            self._formed(self.contrast, merges),
            domain_total=max(1, self.domain.total),
            contrast_total=max(1, self.contrast.total),
        )
        return z

    def _formed(self, units: Units, merges: Sequence[Merge]) -> Ints:
        replayed = self.family.replay(units, merges)
        if self.family.guaranteed:
            adopted = np.array([merge.right is None for merge in merges])
            counts = np.array([replayed.counts[merge.token] for merge in merges], dtype=np.int64)
            return np.where(adopted, counts, replayed.saved)
        return np.array([replayed.counts[merge.token] for merge in merges], dtype=np.int64)

    def refuse(self, candidates: Sequence[Merge]) -> set[str]:
        """Tokens that are not specific, and are no part of one that is, or that is asked for."""
        specific = is_specific(self.z_scores(candidates))
        good = {merge.token for merge, fine in zip(candidates, specific, strict=True) if fine}
        good |= self.asked
        return {merge.token for merge in candidates} - with_parts(candidates, frozenset(good))


def check_text_judge(family: Family) -> Judge:
    """Drops tokens that llama.cpp's check text would be read with.

    Its converter to GGUF refuses a byte-level tokenizer that reads this text in a way it does
    not know.
    """

    units = family.count_units({check_text(): 1})

    def judge(kept: Sequence[Merge], _: Mapping[str, int]) -> set[str]:
        counts = family.replay(units, kept).counts
        return {token for token, count in counts.items() if count}

    return judge
