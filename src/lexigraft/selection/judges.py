"""Reasons to drop a candidate that only the whole set of candidates shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lexigraft.families import Family
from lexigraft.families.choice import Judge, children_of
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.llama_cpp import changes_check_text
from lexigraft.families.units import Units
from lexigraft.selection.contrast import Floats, is_specific, log_odds


class Contrast:
    """Candidates against a contrast text: which belong to the domain.

    Args:
        family: the base.
        domain: units of the learning text.
        contrast: units of the text to compare with.
    """

    def __init__(self, family: Family, domain: Units, contrast: Units) -> None:
        self.family = family
        self.contrast = contrast
        self.domain_tokens = domain.total
        self.contrast_tokens = contrast.total

    def z_scores(self, merges: Sequence[Merge], counts: Mapping[str, int]) -> Floats:
        """(n,) z-score of each token's log-odds in the domain."""
        if not merges:
            return np.zeros(0)
        there = self.family.replay(self.contrast, merges).counts
        _, z = log_odds(
            [counts[merge.token] for merge in merges],
            [there[merge.token] for merge in merges],
            domain_total=max(1, self.domain_tokens),
            contrast_total=max(1, self.contrast_tokens),
        )
        return z

    def judge(self, kept: Sequence[Merge], counts: Mapping[str, int]) -> set[str]:
        """Tokens that are not specific, and are no part of one that is."""
        specific = is_specific(self.z_scores(kept, counts))
        children = children_of(kept)
        good = {merge.token for merge, fine in zip(kept, specific, strict=True) if fine}
        for merge in reversed(kept):  # parts rank before what is made of them
            if children.get(merge.token, set()) & good:
                good.add(merge.token)
        return {merge.token for merge in kept} - good


def check_text_judge(family: Family) -> Judge:
    """Drops tokens that llama.cpp's check text would be read with.

    Its converter to GGUF refuses a byte-level tokenizer that reads this text in a way it does
    not know.
    """

    def judge(kept: Sequence[Merge], _: Mapping[str, int]) -> set[str]:
        return set(changes_check_text(family, kept))

    return judge
