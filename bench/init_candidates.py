"""Starts that were tried beside those of `lexigraft.embeddings.METHODS`, for bench/init.py.

    cd bench && python init.py --data ../../shared/data --research init_candidates:half_first ...

Letters: U base rows at hand, N new tokens, D width. Each takes a `Spelled` and gives (N, D).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lexigraft.embeddings.methods import (
    Array,
    Spelled,
    first_piece,
    last_piece,
    mean_by_characters,
    mean_of_pieces,
)


def at_least_one(spelled: Spelled) -> Array:
    """Pieces weigh as many characters as they hold, a part of a character one."""
    whole = [[max(1.0, size) for size in sizes] for sizes in spelled.characters]
    return mean_by_characters(replace(spelled, characters=whole))


def _blend(spelled: Spelled, share: float) -> Array:
    return share * first_piece(spelled) + (1 - share) * mean_of_pieces(spelled)


def quarter_first(spelled: Spelled) -> Array:
    """A quarter the first piece, the rest the mean."""
    return _blend(spelled, 0.25).astype(spelled.rows.dtype)


def half_first(spelled: Spelled) -> Array:
    """Half the first piece, half the mean."""
    return _blend(spelled, 0.5).astype(spelled.rows.dtype)


def half_first_characters(spelled: Spelled) -> Array:
    """Half the first piece, half the mean by characters."""
    rows = 0.5 * first_piece(spelled) + 0.5 * at_least_one(spelled)
    return rows.astype(spelled.rows.dtype)


def half_last(spelled: Spelled) -> Array:
    """Half the last piece, half the mean."""
    rows = 0.5 * last_piece(spelled) + 0.5 * mean_of_pieces(spelled)
    return rows.astype(spelled.rows.dtype)


def _longer(spelled: Spelled, rows: Array, power: float) -> Array:
    """Rows times (mean norm of the pieces / own norm) to a power: 1 gives that norm."""
    if rows.ndim < 2:
        return rows
    norms = np.linalg.norm(spelled.rows, axis=1)
    wanted = np.array([norms[list(p)].mean() if len(p) else 0.0 for p in spelled.pieces])
    own = np.linalg.norm(rows, axis=1)
    factor = np.where((wanted > 0) & (own > 0), wanted / np.maximum(own, 1e-30), 1.0) ** power
    return (rows * factor[:, None]).astype(rows.dtype)


def mean_10(spelled: Spelled) -> Array:
    """The mean with a tenth (in the exponent) of the pieces' norm."""
    return _longer(spelled, mean_of_pieces(spelled), 0.1)


def mean_20(spelled: Spelled) -> Array:
    """The mean with a fifth of the pieces' norm."""
    return _longer(spelled, mean_of_pieces(spelled), 0.2)


def mean_30(spelled: Spelled) -> Array:
    """The mean with three tenths of the pieces' norm."""
    return _longer(spelled, mean_of_pieces(spelled), 0.3)


def mean_100(spelled: Spelled) -> Array:
    """The mean with the whole norm of the pieces."""
    return _longer(spelled, mean_of_pieces(spelled), 1.0)


def characters_20(spelled: Spelled) -> Array:
    """The mean by characters with a fifth of the pieces' norm."""
    return _longer(spelled, at_least_one(spelled), 0.2)


def _outward(spelled: Spelled, rows: Array, power: float) -> Array:
    """Rows moved away from the mean of all, to a share of the pieces' distance from it."""
    center = spelled.center
    if rows.ndim < 2:
        return rows
    far = np.linalg.norm(spelled.rows - center, axis=1)
    wanted = np.array([far[list(p)].mean() if len(p) else 0.0 for p in spelled.pieces])
    own = np.linalg.norm(rows - center, axis=1)
    factor = np.where((wanted > 0) & (own > 0), wanted / np.maximum(own, 1e-30), 1.0) ** power
    return (center + (rows - center) * factor[:, None]).astype(rows.dtype)


def outward_30(spelled: Spelled) -> Array:
    """The mean, outward to the power 0.3."""
    return _outward(spelled, mean_of_pieces(spelled), 0.3)


def outward_50(spelled: Spelled) -> Array:
    """The mean, outward to the power 0.5."""
    return _outward(spelled, mean_of_pieces(spelled), 0.5)


def quarter_first_outward_30(spelled: Spelled) -> Array:
    """A quarter the first piece, outward to the power 0.3."""
    return _outward(spelled, quarter_first(spelled), 0.3)


def quarter_first_outward_50(spelled: Spelled) -> Array:
    """A quarter the first piece, outward to the power 0.5."""
    return _outward(spelled, quarter_first(spelled), 0.5)
