"""Starts that were tried and are not in `lexigraft.embeddings.METHODS`, for bench/init.py.

    cd bench && python init.py --data ../../shared/data --research init_candidates:quarter_first

Letters: N new tokens, D width. Each takes a `Spelled` and gives (N, D). docs/log.md says what came
of them.
"""

from __future__ import annotations

import numpy as np

from lexigraft.embeddings.methods import Array, Spelled, first_piece, last_piece, mean_of_pieces


def _blend(one: Array, other: Array, share: float) -> Array:
    return (share * one + (1 - share) * other).astype(one.dtype)


def _to_the_distance_of_pieces(
    spelled: Spelled, rows: Array, center: Array | float, power: float
) -> Array:
    """Rows moved away from `center`, at power 1 to the mean distance that their pieces have."""
    if rows.ndim < 2:
        return rows
    far = np.linalg.norm(spelled.rows - center, axis=1)
    wanted = np.array([far[list(p)].mean() if len(p) else 0.0 for p in spelled.pieces])
    own = np.linalg.norm(rows - center, axis=1)
    factor = np.where((wanted > 0) & (own > 0), wanted / np.maximum(own, 1e-30), 1.0) ** power
    return (center + (rows - center) * factor[:, None]).astype(rows.dtype)


def quarter_first(spelled: Spelled) -> Array:
    """A quarter the first piece, the rest the mean."""
    return _blend(first_piece(spelled), mean_of_pieces(spelled), 0.25)


def half_last(spelled: Spelled) -> Array:
    """Half the last piece, half the mean."""
    return _blend(last_piece(spelled), mean_of_pieces(spelled), 0.5)


def mean_20(spelled: Spelled) -> Array:
    """The mean, lengthened to a fifth (of the logarithm) of the way to the pieces' norm."""
    return _to_the_distance_of_pieces(spelled, mean_of_pieces(spelled), 0.0, 0.2)


def mean_100(spelled: Spelled) -> Array:
    """The mean with the pieces' norm."""
    return _to_the_distance_of_pieces(spelled, mean_of_pieces(spelled), 0.0, 1.0)


def outward_30(spelled: Spelled) -> Array:
    """`outward` with the power 0.3 instead of 0.5."""
    return _to_the_distance_of_pieces(spelled, mean_of_pieces(spelled), spelled.center, 0.3)


def quarter_first_outward_50(spelled: Spelled) -> Array:
    """A quarter the first piece, then outward."""
    return _to_the_distance_of_pieces(spelled, quarter_first(spelled), spelled.center, 0.5)
