"""Orthogonal matching pursuit: vectors as sums of few atoms, out of more atoms than fit in memory.

Letters: N vectors, M atoms, D width, k atoms at most for each vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Blocks = Callable[[], Iterator[Array]]

# Vectors at a time: their bases, k x D float32 each, take at most this much.
_BASES_BYTES = 64 * 2**20
# A residual below this share of the vector is rounding, and so is the rest of an atom below this
# share of the atom: it adds no direction to those chosen before it.
_ROUNDING = 1e-5


def matching_pursuit(vectors: Array, atoms: Blocks, count: int) -> tuple[Array, Array]:
    """Write each vector as a sum of at most `count` atoms.

    The atom that points most along what is left (the largest |cosine|) is taken, all taken atoms
    are fitted to the vector again by least squares, and so on. Fitting is a QR decomposition that
    grows by one column: the projection on each new direction is final, and the weights of the
    atoms come out of one triangular system at the end.

    Source: Pati, Rezaiifar & Krishnaprasad 1993. For embeddings: Goddard & Fernandes Neto 2025
    (arXiv 2506.06607), mergekit's tokensurgeon.

    Args:
        vectors: shape (N, D), float32.
        atoms: gives all atoms, in the same blocks each time, shape (m, D), float32. It is called
            `count` times for each group of vectors, and no more than a block is held.
        count: k.

    Returns:
        Places of the atoms, shape (N, k), int64, and their weights, shape (N, k), float64. Places
        that were not needed have weight 0.

    >>> two = np.eye(3, dtype=np.float32)[:2]
    >>> places, weights = matching_pursuit(np.float32([[0, 5, 0]]), lambda: iter([two]), 1)
    >>> places.tolist(), weights.tolist()
    ([[1]], [[5.0]])
    """
    step = max(1, _BASES_BYTES // max(1, 4 * count * vectors.shape[1]))
    done = [
        _pursue(vectors[start : start + step], atoms, count)
        for start in range(0, len(vectors), step)
    ]
    if not done:
        return np.empty((0, count), np.int64), np.empty((0, count))
    return np.concatenate([p for p, _ in done]), np.concatenate([w for _, w in done])


def _pursue(vectors: Array, atoms: Blocks, count: int) -> tuple[Array, Array]:
    number, width = vectors.shape
    left = vectors.astype(np.float32)
    enough = _ROUNDING * np.linalg.norm(vectors, axis=1)
    bases = np.zeros((number, count, width), np.float32)
    triangles = np.tile(np.eye(count), (number, 1, 1))
    along = np.zeros((number, count))
    places = np.zeros((number, count), np.int64)
    active = np.linalg.norm(left, axis=1) > enough
    for turn in range(count):
        if not active.any():
            break
        best, chosen = _best_atoms(left, atoms, places[:, :turn])
        places[active, turn] = best[active]
        direction, shares = _orthogonal(chosen, bases[:, :turn])
        length = np.linalg.norm(direction, axis=1)
        active &= length > _ROUNDING * np.linalg.norm(chosen, axis=1)
        direction[active] /= length[active, None]
        direction[~active] = 0
        bases[:, turn] = direction
        triangles[active, :turn, turn] = shares[active]
        triangles[active, turn, turn] = length[active]
        along[:, turn] = np.einsum("nd,nd->n", direction, left)
        left -= along[:, turn, None].astype(np.float32) * direction
        active &= np.linalg.norm(left, axis=1) > enough
    weights = np.linalg.solve(triangles, along[:, :, None])[:, :, 0]
    return places, weights


def _best_atoms(left: Array, atoms: Blocks, taken: Array) -> tuple[Array, Array]:
    """Per residual, place and values of the atom that points most along it and is not yet taken."""
    rows = np.arange(len(left))
    best = np.full(len(left), -1.0, np.float32)
    place = np.zeros(len(left), np.int64)
    chosen = np.zeros_like(left)
    first = 0
    for block in atoms():
        norms = np.sqrt(np.einsum("md,md->m", block, block))
        cosines = np.abs(left @ block.T) / np.where(norms > 0, norms, np.inf)
        row, turn = np.nonzero((taken >= first) & (taken < first + len(block)))
        cosines[row, taken[row, turn] - first] = -1.0
        here = cosines.argmax(axis=1)
        better = cosines[rows, here] > best
        best[better] = cosines[rows, here][better]
        place[better] = first + here[better]
        chosen[better] = block[here[better]]
        first += len(block)
    return place, chosen


def _orthogonal(atoms: Array, bases: Array) -> tuple[Array, Array]:
    """What of each atom is orthogonal to its basis, and its shares of the basis (float64).

    Twice, for once is not enough in float32 (Parlett 1980).
    """
    rest = atoms.copy()
    shares = np.zeros(bases.shape[:2])
    for _ in range(2):
        part = np.einsum("ntd,nd->nt", bases, rest)
        rest -= np.einsum("nt,ntd->nd", part, bases)
        shares += part
    return rest, shares
