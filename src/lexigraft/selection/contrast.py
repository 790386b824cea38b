"""Which candidates belong to the domain: log-odds against a contrast text, with a z-score.

Monroe, Colaresi & Quinn 2008, "Fightin' Words: Lexical Feature Selection and Evaluation for
Identifying the Content of Political Conflict", Political Analysis 16(4), equations 15, 16 and 22.
A ratio of counts is unstable where counts are small; an informative Dirichlet prior pulls each
candidate's rate in both texts towards its rate in the two pooled, by as much as the prior weighs
against the counts, and the z-score divides by what chance alone would do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# The 97.5% point of the normal distribution: of the candidates that are no more frequent in the
# domain than elsewhere, at most one in 40 passes by chance.
SPECIFIC = 1.96
# The prior holds a tenth of each candidate's pooled count. As much as all of it would halve every
# difference; much less would make the z-score of what the contrast text lacks altogether, which is
# what the prior is there for, fall towards 0. At a tenth, in texts of equal size, 8 against 0
# occurrences are specific (z = 2.06) and 7 against 0 are not.
PRIOR_SHARE = 0.1


def log_odds(
    domain: ArrayLike,
    contrast: ArrayLike,
    *,
    domain_total: float,
    contrast_total: float,
    prior_share: float = PRIOR_SHARE,
) -> tuple[Floats, Floats]:
    """Log-odds of each candidate in the domain against the contrast text, and its z-score.

    With y the counts, n the totals, and the prior a = `prior_share` * (y1 + y2),
    a0 = `prior_share` * (n1 + n2):

        delta = log((y1 + a) / (n1 + a0 - y1 - a)) - log((y2 + a) / (n2 + a0 - y2 - a))
        variance = 1 / (y1 + a) + 1 / (y2 + a);  z = delta / sqrt(variance)

    A candidate that occurs in neither text has delta 0 and z 0.

    Args:
        domain: counts of each candidate in the domain text.
        contrast: counts of the same candidates in the contrast text.
        domain_total: all tokens of the domain text, candidates or not.
        contrast_total: all tokens of the contrast text.
        prior_share: the weight of the prior, as a share of both texts.

    Raises:
        ValueError: counts that are negative, or of different shapes, or larger than the totals.
    """
    counts = np.stack([np.asarray(domain, np.float64), np.asarray(contrast, np.float64)])
    totals = np.array([[domain_total], [contrast_total]], np.float64)
    if counts.size and (counts.min() < 0 or (counts > totals).any()):
        raise ValueError("a count is negative or larger than the total of its text")
    prior = prior_share * counts.sum(axis=0)
    seen = prior > 0
    inside = counts[:, seen] + prior[seen]
    # A text that holds nothing but one candidate has no odds; half a token keeps them finite.
    outside = np.maximum(totals + prior_share * totals.sum() - inside, 0.5)
    delta, z = np.zeros(len(prior)), np.zeros(len(prior))
    domain_odds, contrast_odds = np.log(inside / outside)
    delta[seen] = domain_odds - contrast_odds
    z[seen] = delta[seen] / np.sqrt((1 / inside).sum(axis=0))
    return delta, z


def is_specific(z: ArrayLike, threshold: float = SPECIFIC) -> NDArray[np.bool_]:
    """Whether each candidate is more frequent in the domain than chance explains."""
    return np.asarray(np.asarray(z, np.float64) >= threshold)
