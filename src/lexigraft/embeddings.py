"""How a new token's row starts: pure numpy functions, one per method, in `METHODS`.

Letters: U base rows at hand, N new tokens, D width. A method gets the base rows that the new
tokens are spelled with and says what the new rows are; input embedding, head and head bias are
each started from their own rows. `starter` feeds a method from a tensor on disk, block by block,
so that memory does not grow with the vocabulary; graft and merge share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.growth import NewRows
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.rows import by_row, read_ids
from lexigraft.errors import LexigraftError
from lexigraft.families import Family, TokenMap

Array = npt.NDArray[Any]
Pieces = Sequence[Sequence[int]]

# The standard deviation of most models' initializer_range, GPT-2's since 2019.
RANDOM_SCALE = 0.02


@dataclass(frozen=True)
class Spelled:
    """What a method may look at.

    Attributes:
        rows: base rows, float32 (float64 where they are stored so), shape (U, D); (U,) of a bias.
        pieces: per new token the places in `rows` of the pieces that spell it.
        center: the mean of all used base rows, shape (D,), in the type of `rows`.
        ids: the ids of the new tokens.
        seed: of the methods that draw.
    """

    rows: Array
    pieces: Pieces
    center: Array
    ids: Sequence[int]
    seed: int = 0


Method = Callable[[Spelled], Array]


def mean_of_pieces(spelled: Spelled) -> Array:
    """Start each new token at the average of the pieces that spelled it so far.

    The model has no vector for the new token but reads one for every piece of its old spelling;
    their mean stays inside that region. A token without pieces starts at the mean of all rows.

    Shapes: -> (N, D). Sums run in the type of `rows`, piece after piece.
    Source: Gee et al. 2022, Fast Vocabulary Transfer.

    >>> rows = np.array([[0, 2], [4, 0]], np.float32)
    >>> mean_of_pieces(Spelled(rows, [[0, 1], [1]], rows[0], [2, 3])).tolist()
    [[2.0, 1.0], [4.0, 0.0]]
    """
    result = mean_of_all(spelled)
    lengths = np.array([len(pieces) for pieces in spelled.pieces], np.int64)
    spelt = np.flatnonzero(lengths)
    if spelt.size:
        flat = np.concatenate([spelled.pieces[place] for place in spelt]).astype(np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths[spelt])[:-1]))
        sums = np.add.reduceat(spelled.rows[flat], starts, axis=0)
        result[spelt] = sums / lengths[spelt].reshape(-1, *[1] * (sums.ndim - 1)).astype(sums.dtype)
    return result


def mean_of_all(spelled: Spelled) -> Array:
    """Start every new token at the mean of all used rows: safe, but all alike (Hewitt 2021)."""
    return np.repeat(spelled.center[None], len(spelled.pieces), axis=0)


def first_piece(spelled: Spelled) -> Array:
    """Start at the first piece: in a head, p(new) begins as p(first piece) (EEVE, 2402.14714)."""
    return _one_piece(spelled, 0)


def last_piece(spelled: Spelled) -> Array:
    """Start at the last piece, whose position the model would have read last."""
    return _one_piece(spelled, -1)


def _one_piece(spelled: Spelled, place: int) -> Array:
    result = mean_of_all(spelled)
    for row, pieces in enumerate(spelled.pieces):
        if len(pieces):
            result[row] = spelled.rows[pieces[place]]
    return result


def normal(spelled: Spelled) -> Array:
    """Draw from N(0, 0.02): the usual start of an untrained model, here for comparison.

    Each row has its own generator, seeded by `seed` and the token's id, so that a row does not
    depend on how the work is cut into blocks, and copies of a matrix stay copies.
    """
    rows = [
        np.random.default_rng((spelled.seed, token_id)).normal(
            0.0, RANDOM_SCALE, spelled.center.shape
        )
        for token_id in spelled.ids
    ]
    shape = (len(rows), *spelled.center.shape)
    return np.array(rows, spelled.rows.dtype).reshape(shape)


METHODS: dict[str, Method] = {
    "mean": mean_of_pieces,
    "mean-all": mean_of_all,
    "first": first_piece,
    "last": last_piece,
    "random": normal,
}


def resolve(init: str) -> str:
    """The method's name: `auto` is `mean`, the best of the cheap ones in every published table
    and in our own measurements (bits per byte right after the graft).

    Raises:
        LexigraftError: no such method.
    """
    if init == "auto":
        return "mean"
    if init not in METHODS:
        raise LexigraftError(
            f"--init {init}",
            needed="auto, " + ", ".join(METHODS),
            fix="leave --init out: auto chooses",
        )
    return init


def spell(base: Family, extended: TokenMap, first_id: int) -> list[list[int]]:
    """Per id from `first_id` on, the base tokens that spell the token; [] for an unused id."""
    return [
        base.pieces(extended.texts[token_id], added=token_id in extended.added)
        if token_id in extended.texts
        else []
        for token_id in range(first_id, extended.tokens)
    ]


def starter(
    tensor: Tensor,
    pieces: Pieces,
    first_id: int,
    *,
    init: str,
    seed: int,
    center: Callable[[], Array],
) -> NewRows:
    """New rows of a vocabulary tensor on disk, for `checkpoints.growth.grown`.

    Args:
        tensor: the base's; only the rows of the pieces are read.
        pieces: per new token, base ids.
        first_id: id of the first new token.
        init: a name in `METHODS`.
        seed: of methods that draw. A tied pair and stored copies get equal rows.
        center: gives the float64 mean of the used rows; called when a block is made.

    Shapes: (start, stop) -> (stop - start, D), float32, or float64 where the tensor is.
    """
    view = by_row(tensor)
    kind = np.float64 if tensor.dtype == "F64" else np.float32

    def rows(start: int, stop: int) -> Array:
        wanted = pieces[start:stop]
        flat = np.array([place for spelt in wanted for place in spelt], np.int64)
        ids, places = np.unique(flat, return_inverse=True)
        ends = np.cumsum([len(spelt) for spelt in wanted])
        local = [part.tolist() for part in np.split(places, ends[:-1])]
        return METHODS[init](
            Spelled(
                read_ids(view, ids.tolist()).astype(kind),
                local,
                center().astype(kind),
                range(first_id + start, first_id + stop),
                seed,
            )
        )

    return rows
