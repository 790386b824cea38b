"""How a new token's row starts: pure numpy functions, one per method, in `METHODS`.

Letters: U base rows at hand, N new tokens, D width. A method gets the base rows that the new
tokens are spelled with and says what the new rows are; input embedding, head and head bias are
each started from their own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.architectures import Role
from lexigraft.checkpoints.growth import repeated

Array = npt.NDArray[Any]
Pieces = Sequence[Sequence[int]]
Weights = Sequence[Sequence[float]]

# The standard deviation of most models' initializer_range, GPT-2's since 2019.
RANDOM_SCALE = 0.02
# transformers, modeling_utils.py, _init_added_embeddings_weights_with_mean and
# _init_added_lm_head_bias_with_mean: of the covariance, and of a bias's standard deviation.
GAUSSIAN_SHARE = 1e-9
_GAUSSIAN_ROWS = 64
_PAIRWISE = 8  # numpy adds so many numbers, or more, in pairs
_ROUNDING = 1e-6


def _no_spread() -> Array:
    raise ValueError("only a table on disk has a spread")


@dataclass(frozen=True)
class Spelled:
    """What a method may look at: a block of the new tokens of one tensor.

    Attributes:
        rows: base rows, float32 (float64 where they are stored so), shape (U, D); (U,) of a bias.
        pieces: per new token the places in `rows` of the pieces that spell it.
        center: the mean of all trained base rows, shape (D,), in the type of `rows`.
        ids: the ids of the new tokens.
        seed: of the methods that draw.
        role: what the tensor is: `embed`, `head` or `bias` (of the head).
        tied: the head is the input embedding, so one row serves both.
        characters: per new token, how many characters each of its pieces holds; a piece that is
            a part of a character holds a share of it.
        weights: per new token, of each piece, where `donor` found it; else empty.
        spread: gives a lower triangle L, shape (D, D), float64, with L L^T = the covariance of the
            trained base rows; of a bias their standard deviation. Reads the whole tensor once.
    """

    rows: Array
    pieces: Pieces
    center: Array
    ids: Sequence[int]
    seed: int = 0
    role: Role = "embed"
    tied: bool = False
    characters: Weights = ()
    weights: Weights = ()
    spread: Callable[[], Array] = _no_spread


Method = Callable[[Spelled], Array]


def mean_of_pieces(spelled: Spelled) -> Array:
    """Start each new token at the average of the pieces that spelled it so far.

    The model has no vector for the new token but reads one for every piece of its old spelling;
    their mean stays inside that region. A token without pieces starts at the mean of all rows.

    Shapes: -> (N, D). Sums run in the type of `rows`, piece after piece.
    Source: Gee et al. 2022, Fast Vocabulary Transfer (arXiv 2402.09977).

    >>> rows = np.array([[0, 2], [4, 0]], np.float32)
    >>> mean_of_pieces(Spelled(rows, [[0, 1], [1]], rows[0], [2, 3])).tolist()
    [[2.0, 1.0], [4.0, 0.0]]
    """
    result = mean_of_all(spelled)
    by_length: dict[int, list[int]] = {}
    for row, pieces in enumerate(spelled.pieces):
        by_length.setdefault(len(pieces), []).append(row)
    by_length.pop(0, None)
    for length, some in by_length.items():
        places = np.array([spelled.pieces[row] for row in some], np.int64)
        result[some] = _sums(spelled.rows, places) / spelled.rows.dtype.type(length)
    return result


def mean_by_characters(spelled: Spelled) -> Array:
    """Start at the mean of the pieces, each weighing as many characters as it holds.

    A long piece says more of the word than a short one. Without `spelled.characters` every piece
    weighs the same.

    Shapes: -> (N, D). Source: Joshi et al. 2026, *Beyond Initialization Loss* (BIL, arXiv
    2608.03494), where it is the start of the head.
    """
    return _weighted_mean(spelled, spelled.characters or [[1.0] * len(p) for p in spelled.pieces])


def exponential(spelled: Spelled) -> Array:
    """Start at a mean in which each piece weighs e^2 times the one before it, or behind it.

    In the input embedding the last piece weighs most: the model goes on from there. In the head
    (and its bias) the first does: that is what the old model would have said next. A row that is
    both takes the input's.

    Shapes: -> (N, D). Source: Nakash et al. 2025, AdaptiVocab (arXiv 2503.19693), weights
    exp(2i) and exp(-2i) for the pieces i = 1 ... k.
    """
    last = spelled.role == "embed" or spelled.tied
    # Counted from the end that weighs most: the same weights, without overflow.
    by_length = [np.exp(-2.0 * np.arange(n)) for n in range(1 + max(map(len, spelled.pieces)))]
    weights = [by_length[len(p)][::-1] if last else by_length[len(p)] for p in spelled.pieces]
    return _weighted_mean(spelled, weights)


def _weighted_mean(spelled: Spelled, weights: Sequence[Sequence[float] | Array]) -> Array:
    result = mean_of_all(spelled)
    for row, (pieces, weight) in enumerate(zip(spelled.pieces, weights, strict=True)):
        if len(pieces):
            share = np.asarray(weight, np.float64)
            total = share.sum()
            # Pieces that stand for no character, such as [UNK] alone, weigh the same.
            share = share / total if total > 0 else np.full(len(pieces), 1 / len(pieces))
            result[row] = _combined(spelled.rows, pieces, share)
    return result


def mixture(spelled: Spelled) -> Array:
    """Start at the sum of weighted base rows that `weights` names, else at the mean of the pieces.

    Shapes: -> (N, D). Source of the weights: `donor`.
    """
    result = mean_of_pieces(spelled)
    for row, weights in enumerate(spelled.weights):
        if len(weights):
            result[row] = _combined(spelled.rows, spelled.pieces[row], np.asarray(weights))
    return result


def _combined(rows: Array, pieces: Sequence[int], weights: Array) -> Array:
    """The weighted sum of some rows, piece after piece, in the type of `rows`."""
    some = rows[np.asarray(pieces, np.int64)]
    total: Array = (some * _column(weights, some)).sum(axis=0, dtype=rows.dtype)
    return total


def _sums(rows: Array, places: npt.NDArray[np.int64]) -> Array:
    """The sums of rows: shape (U, D), (N, K) -> (N, D).

    In the order of `np.add.reduceat`, on which the hashes in manifests rest: to the first of K is
    added the sum of the others. It takes ten times as long, for it begins anew for each number.
    """
    first, *others = places.T
    sums: Array = rows[first]
    if len(others) >= _PAIRWISE:
        starts = np.arange(0, places.size, places.shape[1])
        sums = np.add.reduceat(rows[places.ravel()], starts, axis=0)
    elif others:
        sums += reduce(np.add, (rows[other] for other in others))
    return sums


def _column(values: Array, like: Array) -> Array:
    """One value per row, in the type of `like` and of as many dimensions."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).astype(like.dtype)


def mean_of_all(spelled: Spelled) -> Array:
    """Start every new token at the mean of all trained rows: safe, but all alike (Hewitt 2021)."""
    return repeated(spelled.center, len(spelled.pieces))


def first_piece(spelled: Spelled) -> Array:
    """Start at the first piece: in a head, p(new) begins as p(first piece) (EEVE, 2402.14714)."""
    return _one_piece(spelled, 0)


def half_first(spelled: Spelled) -> Array:
    """Start half-way between the first piece and the mean of the pieces.

    In a head the first piece says where the token may come, but all tokens that begin alike would
    share one row, and its probability each; the mean tells them apart.

    Shapes: -> (N, D). Source: measured, bench/results/init.md (the half-way of EEVE and FVT).
    """
    half = spelled.rows.dtype.type(0.5)
    result: Array = half * first_piece(spelled) + half * mean_of_pieces(spelled)
    return result


def outward(spelled: Spelled) -> Array:
    """Start at the mean of the pieces, moved away from the mean of all rows.

    Pieces point different ways from the mean of all, so that their mean lies nearer to it than
    any of them: the token comes out too unlikely where it belongs and too likely elsewhere. The
    distance becomes the geometric mean of what it is and of what the pieces have on average.
    Unlike a longer row this does not depend on the constant that a model adds to all its logits.

    Shapes: -> (N, D); a bias, of one number a row, starts at the mean. Sums run in float64.
    Source: measured, bench/results/init.md.
    """
    result = mean_of_pieces(spelled)
    if result.ndim == 1:
        return result
    center = spelled.center.astype(np.float64)
    far = np.linalg.norm(spelled.rows - center, axis=1)
    for row, pieces in enumerate(spelled.pieces):
        moved = result[row] - center
        distance = np.linalg.norm(moved)
        if len(pieces) > 1 and distance > 0:
            result[row] = center + np.sqrt(far[list(pieces)].mean() / distance) * moved
    return result


def by_legibility(spelled: Spelled) -> Array:
    """Start as `exponential` where every piece holds whole characters, else as `outward`.

    In an embedding the last piece says most, for the model has learned to go on from it, if it is
    one that can be read. The last byte of a character says nothing of it; then only all pieces
    together tell tokens apart.

    Shapes: -> (N, D). Source: measured, bench/results/init.md.
    """
    result = exponential(spelled)
    illegible = [
        row
        for row, widths in enumerate(spelled.characters)
        # Shares of a character are sums of 1/2, 1/3 and 1/4: near a whole number, not equal to it.
        if any(abs(width - round(width)) > _ROUNDING for width in widths)
    ]
    if illegible:
        some = replace(spelled, pieces=[spelled.pieces[row] for row in illegible])
        result[illegible] = outward(some)
    return result


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
    drawn = _draws(spelled, spelled.ids, spelled.center.shape)
    return (RANDOM_SCALE * drawn).astype(spelled.rows.dtype)


def gaussian(spelled: Spelled) -> Array:
    """Draw from the distribution that transformers draws new rows from.

    N(mean, 1e-9 covariance) of the trained rows (of a bias: a normal with 1e-9 of their standard
    deviation): the mean of all, each row moved by some 3e-5 of the usual spread, which in 16 bits
    mostly rounds away. One matrix product instead of one per row. It also works where the
    covariance is singular, where transformers gives every token the same row.

    Rows are made in groups of fixed ids and in float64, so that a row does not depend on how the
    work is cut into blocks.

    Shapes: -> (N, D). Source: Hewitt 2021; transformers' `resize_token_embeddings`.
    """
    center, spread = spelled.center.astype(np.float64), spelled.spread()
    if not center.ndim:
        drawn = _draws(spelled, spelled.ids, ())
        return (center + GAUSSIAN_SHARE * spread * drawn).astype(spelled.rows.dtype)
    result = np.empty((len(spelled.ids), *center.shape), spelled.rows.dtype)
    groups = np.asarray(spelled.ids) // _GAUSSIAN_ROWS
    for group in np.unique(groups):
        first = int(group) * _GAUSSIAN_ROWS
        drawn = _draws(spelled, range(first, first + _GAUSSIAN_ROWS), center.shape)
        rows = center + np.sqrt(GAUSSIAN_SHARE) * (drawn @ spread.T)
        here = groups == group
        result[here] = rows[np.asarray(spelled.ids)[here] - first]
    return result


def _draws(spelled: Spelled, ids: Sequence[int], shape: tuple[int, ...]) -> Array:
    """Standard normal rows, float64, each from a generator of its own."""
    seed = spelled.seed % 2**64  # numpy takes no negative one
    rows = [np.random.default_rng((seed, i)).standard_normal(shape) for i in ids]
    return np.array(rows, np.float64).reshape(len(ids), *shape)


METHODS: dict[str, Method] = {
    "mean": mean_of_pieces,
    "char-weighted": mean_by_characters,
    "exponential": exponential,
    "first": first_piece,
    "last": last_piece,
    "half-first": half_first,
    "outward": outward,
    "legible": by_legibility,
    "mean-all": mean_of_all,
    "gaussian": gaussian,
    "random": normal,
    "copy": mean_of_pieces,  # of what `--init-from` names
    "donor": mixture,
}


def told_apart_by(method: str, spelled: Spelled) -> list[object]:
    """Per new token what its row depends on: rows must differ somewhere where this does."""
    if method == "mean-all":
        return [None] * len(spelled.ids)
    if method in ("random", "gaussian"):
        return list(spelled.ids)
    ends = {"first": slice(0, 1), "last": slice(-1, None)}
    return [frozenset(pieces[ends.get(method, slice(None))]) for pieces in spelled.pieces]
