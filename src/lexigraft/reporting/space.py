"""Where new rows lie among old ones: their lengths, and a map of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.architectures import vocabulary_of
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.rows import by_row, lengths, read_ids, widened
from lexigraft.families.segments import Extension

SAMPLE = 2000  # rows of each kind whose lengths are shown
MAPPED = 400  # rows of each kind on the map
BINS = 24

Ids = npt.NDArray[np.int64]


def row_space(folder: Path, extension: Extension, *, seed: int) -> dict[str, Any]:
    """Lengths of new and old rows per vocabulary table, and the map of the first table.

    Args:
        folder: a model with the tokenizer of `extension`.
        seed: decides which rows are looked at, where there are more than can be shown.

    Returns:
        `lengths`: per tensor its `name`, the `edges` of bins and the shares of `old` and `new`
        rows in each; `map`: `old` and `new`, lists of [x, y, id, text], and `explained`, the
        share of the rows' variance along each axis.

    Raises:
        LexigraftError: the weights cannot be read.
    """
    checkpoint = Checkpoint.open(folder)
    vocabulary = vocabulary_of(checkpoint)
    names = [*vocabulary.embeds[:1], *vocabulary.heads[:1]]
    tensors = [by_row(checkpoint.tensor(name)) for name in names]
    random = np.random.default_rng(seed)
    known = extension.family.map
    old = _some([i for i in known.texts if i not in extension.ids], SAMPLE, random)
    new = _some([i for i in extension.ids if i in known.texts], SAMPLE, random)
    return {
        "lengths": [_lengths(tensor, old, new) for tensor in tensors],
        "map": _map(tensors[0], old[:MAPPED], new[:MAPPED], extension),
    }


def usual_length(lengths: Mapping[str, Any], kind: Literal["old", "new"]) -> float:
    """About how long most rows of a kind are: where the fullest bin of `lengths` begins."""
    shares = lengths[kind]
    edge: float = lengths["edges"][max(range(len(shares)), key=shares.__getitem__)]
    return edge


def _some(ids: list[int], most: int, random: np.random.Generator) -> Ids:
    """At most `most` of `ids`, in a random order."""
    return random.permutation(np.sort(np.array(ids, np.int64)))[:most]


def _rows(tensor: Tensor, ids: Ids) -> npt.NDArray[Any]:
    """Rows (len(ids), D) of a table, in the order of the ids."""
    order = np.argsort(ids)
    found = widened(read_ids(tensor, ids[order].tolist()))
    return found[np.argsort(order)]


def _lengths(tensor: Tensor, old: Ids, new: Ids) -> dict[str, Any]:
    found = [lengths(_rows(tensor, ids)) for ids in (old, new)]
    edges = np.histogram_bin_edges(np.concatenate(found), BINS)
    shares = [np.histogram(some, edges)[0] / max(1, len(some)) for some in found]
    return {
        "name": tensor.name,
        "edges": np.round(edges, 5).tolist(),
        "old": np.round(shares[0], 5).tolist(),
        "new": np.round(shares[1], 5).tolist(),
    }


def _map(tensor: Tensor, old: Ids, new: Ids, extension: Extension) -> dict[str, Any]:
    """Principal components of old and new rows together (Pearson 1901), the first two."""
    ids = np.concatenate([old, new])
    rows = _rows(tensor, ids).astype(np.float64)
    rows -= rows.mean(axis=0)
    # The eigenvectors of the (n, n) products are the coordinates: n is small, D need not be.
    values, vectors = np.linalg.eigh(rows @ rows.T)
    places = vectors[:, -2:][:, ::-1] * np.sqrt(np.maximum(values[-2:][::-1], 0))
    places *= np.sign(_largest(places))  # an eigenvector's sign is arbitrary
    points = [
        [round(float(x), 4), round(float(y), 4), int(i), extension.piece(int(i)).text]
        for (x, y), i in zip(places, ids, strict=True)
    ]
    total = max(float(values.sum()), 1e-12)
    return {
        "old": points[: len(old)],
        "new": points[len(old) :],
        "explained": [round(float(value) / total, 4) for value in values[-2:][::-1]],
    }


def _largest(places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The entry of each column that is farthest from zero."""
    found: npt.NDArray[np.float64] = places[np.abs(places).argmax(axis=0), range(places.shape[1])]
    return found
