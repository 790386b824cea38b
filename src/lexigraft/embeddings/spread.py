"""How the trained rows of a tensor on disk are spread around their mean, for `gaussian`.

Memory: two float64 matrices of D x D (D 4096: 268 MB), whatever the number of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.rows import by_row, in_blocks
from lexigraft.checkpoints.survey import Survey

Array = npt.NDArray[Any]

# Added to the diagonal, as a share of its mean: a singular covariance (fewer rows than columns, or
# a column that is constant) has a triangle too. Far below what is rounded away afterwards.
_RIDGE = 1e-8


def spread_of(tensor: Tensor, tokens: int, known: Survey) -> Array:
    """A lower triangle L with L L^T = the covariance of the trained rows below `tokens`.

    Divided by their number, as transformers does. Of a bias: the standard deviation, divided by
    one less (torch.std). Sums run in float64, block after block.

    Shapes: (D, D) float64, or () of a bias.
    """
    view = by_row(tensor)
    width = view.shape[1:]
    total = np.zeros((*width, *width))
    for start, block in in_blocks(view, 0, tokens):
        stop = start + len(block)
        here = known.untrained[(known.untrained >= start) & (known.untrained < stop)]
        rows = np.delete(block.astype(np.float64), here - start, axis=0) - known.mean
        total += rows.T @ rows
    count = tokens - len(known.untrained)
    if not width:
        deviation: Array = np.sqrt(total / max(1, count - 1))
        return deviation
    covariance = total / max(1, count)
    size = float(np.trace(covariance)) / len(covariance)
    if not size:
        return covariance  # zeros: all rows are alike
    covariance[np.diag_indices_from(covariance)] += _RIDGE * size
    return np.linalg.cholesky(covariance)
