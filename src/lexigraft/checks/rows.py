"""What the new rows of a vocabulary tensor look like beside the old ones; no model is run.

Read from the file that was written, so that a fault of any step before it shows. Letters: N new
rows, D width, S old rows in the sample, E examples.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.checkpoints.header import Tensor, numpy_dtype
from lexigraft.checkpoints.rows import by_row, ids_in_blocks, lengths, read_ids
from lexigraft.errors import LexigraftError

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

# Old values that norms and neighbours are taken from: about 10 ms of work, whatever the model.
SAMPLE_VALUES = 2**22
# The sample is cut into so many stretches, spread evenly: tokens are ordered by frequency.
STRETCHES = 256
EXAMPLES = 3
NEAREST = 3
# How much of a file is mapped at a time, while old rows are looked through for equal ones.
_WINDOW_BYTES = 16 * 2**20
_KEY_BYTES = 8
_PART_VALUES = 2**17  # what is widened stays in the processor's cache


@dataclass(frozen=True)
class Neighbour:
    """An old row near a new one."""

    id: int
    text: str
    cosine: float


@dataclass(frozen=True)
class Example:
    """A new token and the old rows that point its way, the nearest first."""

    id: int
    text: str
    nearest: tuple[Neighbour, ...]

    def line(self) -> str:
        """What a person reads."""
        near = ", ".join(f"{n.text!r} {n.cosine:.2f}" for n in self.nearest)
        return f"nearest old rows of {self.text!r} (cosine): {near}"


@dataclass(frozen=True)
class RowStatistics:
    """The new rows of one vocabulary tensor.

    Attributes:
        tensor: its name.
        rows: how many new rows.
        norms: 5% quantile, median and 95% quantile of their Euclidean lengths.
        old_norms: the same of the old rows in the sample.
        old_rows: how many old rows there are that tokens use.
        sampled: how many of them `old_norms` and the neighbours are taken from.
        equal_new: new rows that another new row equals.
        equal_old: new rows that an old row equals (all old rows are looked at).
        examples: some new tokens with their neighbours, by cosine, among the sampled old rows and
            the pieces that spelled them.
    """

    tensor: str
    rows: int
    norms: tuple[float, float, float]
    old_norms: tuple[float, float, float]
    old_rows: int
    sampled: int
    equal_new: int
    equal_old: int
    examples: tuple[Example, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """What a person reads."""
        among = "" if self.sampled == self.old_rows else f"; {self.sampled:,} sampled"
        alike = [
            f"{count:,} equal {what}"
            for count, what in ((self.equal_new, "another new row"), (self.equal_old, "an old row"))
            if count
        ]
        return (
            f"{self.tensor}: norms of new rows {_span(self.norms)}), of old rows "
            f"{_span(self.old_norms)}{among}); {', '.join(alike) or 'no new row equals another'}"
        )


def _span(norms: tuple[float, float, float]) -> str:
    low, median, high = (f"{norm:.3g}" for norm in norms)
    return f"{median} (90% in {low} to {high}"


def row_statistics(
    tensor: Tensor,
    ids: Sequence[int],
    pieces: Sequence[Sequence[int]],
    old: Ids,
    text: Callable[[int], str],
) -> RowStatistics | None:
    """Hold the new rows of a vocabulary tensor on disk against its old ones.

    Memory is constant: rows are read in blocks, and of old rows a sample. None for a bias, whose
    rows are single numbers: there only the test for finite values is made.

    Args:
        tensor: the grown tensor.
        ids: the ids of the N new rows, ascending.
        pieces: per new row the ids that spelled it; [] for an id without a token.
        old: the ids of old rows that tokens use, ascending.
        text: what an id stands for.

    Raises:
        LexigraftError: a new row holds NaN or infinity, or the file became shorter.
    """
    view = by_row(tensor)
    norms, hashes, keys = _new_rows(view, ids, text)
    if len(view.shape) == 1 or not len(pieces):
        return None
    counts = Counter(hashes)
    sample = _spread(old, SAMPLE_VALUES * numpy_dtype(view.dtype).itemsize // view.row_bytes)
    chosen = _chosen(pieces)
    examples, old_norms = _neighbours(
        view, [ids[place] for place in chosen], [pieces[p] for p in chosen], sample, text
    )
    return RowStatistics(
        tensor.name,
        len(pieces),
        _quantiles(norms),
        _quantiles(old_norms),
        len(old),
        len(sample),
        sum(count for count in counts.values() if count > 1),
        _equal_old(view, old, counts, keys),
        tuple(examples),
    )


def _new_rows(
    tensor: Tensor, ids: Sequence[int], text: Callable[[int], str]
) -> tuple[Array, list[int], Array]:
    """Length, hash and first bytes of each new row."""
    norms, hashes, keys = [], [], []
    for some, rows in ids_in_blocks(tensor, np.asarray(ids, np.int64)):
        flat = rows.reshape(len(rows), -1)
        sizes = lengths(flat.astype(np.float32))
        bad = np.flatnonzero(~np.isfinite(sizes))
        if bad.size:
            _refuse(tensor, int(some[bad[0]]), text)
        norms.append(sizes)
        hashes += [hash(row.tobytes()) for row in flat]
        keys.append(_keys(flat.view(np.uint8)))
    return _joined(norms, np.float32), hashes, _joined(keys, np.uint64)


def _joined(parts: list[Array], kind: Any) -> Array:
    return np.concatenate(parts) if parts else np.empty(0, kind)


def _refuse(tensor: Tensor, row: int, text: Callable[[int], str]) -> None:
    raise LexigraftError(
        f"{tensor.name}: the new row {row} of {text(row)!r} holds NaN or infinity",
        needed="finite numbers in every new row",
        fix="choose another --init, or look for such rows in the base: its own may be damaged",
    )


def _keys(data: Array) -> Array:
    """The first bytes of each row as one number."""
    keys = np.zeros((len(data), _KEY_BYTES), np.uint8)
    width = min(_KEY_BYTES, data.shape[1])
    keys[:, :width] = data[:, :width]
    return keys.view(np.uint64)[:, 0]


def _spread(ids: Ids, count: int) -> Ids:
    """About `count` of `ids`, in stretches that are spread evenly; all if there are no more.

    >>> _spread(np.arange(10_000), 512)[:4].tolist()
    [0, 1, 39, 40]
    """
    if len(ids) <= count:
        return ids
    length = max(1, count // STRETCHES)
    stretches = max(1, count // length)
    starts = np.arange(stretches) * len(ids) // stretches
    return ids[(starts[:, None] + np.arange(length)).ravel()]


def _chosen(pieces: Sequence[Sequence[int]]) -> list[int]:
    """Places of the examples, from the first new token to the last, ids without one left out."""
    used = [place for place, spelt in enumerate(pieces) if len(spelt)]
    return sorted({used[i * (len(used) - 1) // (EXAMPLES - 1)] for i in range(EXAMPLES) if used})


def _neighbours(
    tensor: Tensor,
    new: Sequence[int],
    spelt: Sequence[Sequence[int]],
    sample: Ids,
    text: Callable[[int], str],
) -> tuple[list[Example], Array]:
    """The examples `new`, and the lengths of the sampled rows."""
    rows = read_ids(tensor, new).astype(np.float32)
    heads = rows / np.maximum(lengths(rows), np.finfo(np.float32).tiny)[:, None]
    sizes, cosines = _against(tensor, sample, heads)
    others = {piece for ids in spelt for piece in ids} - set(sample.tolist())
    own = np.array(sorted(others), np.int64)
    _, of_pieces = _against(tensor, own, heads)
    ids, cosines = np.concatenate([sample, own]), np.concatenate([cosines, of_pieces])
    examples = []
    for token, near in zip(new, cosines.T, strict=True):
        best = np.argsort(-near, kind="stable")[:NEAREST]
        found = (Neighbour(int(ids[i]), text(int(ids[i])), round(float(near[i]), 4)) for i in best)
        examples.append(Example(token, text(token), tuple(found)))
    return examples, sizes


def _against(tensor: Tensor, ids: Ids, heads: Array) -> tuple[Array, Array]:
    """Lengths (S,) of rows `ids`, and their cosines (S, E) with unit vectors (E, D)."""
    sizes, cosines = [], []
    step = max(1, _PART_VALUES // max(1, heads.shape[1]))
    for _, block in ids_in_blocks(tensor, ids, step=step):
        rows = block.astype(np.float32)
        size = lengths(rows)
        sizes.append(size)
        # einsum: a product this narrow takes BLAS longer to hand to its threads than to compute.
        products = np.einsum("ij,kj->ik", rows, heads)
        cosines.append(products / np.maximum(size, np.finfo(np.float32).tiny)[:, None])
    if not sizes:
        return np.empty(0, np.float32), np.empty((0, len(heads)), np.float32)
    return np.concatenate(sizes), np.concatenate(cosines)


def _equal_old(tensor: Tensor, old: Ids, hashes: Counter[int], keys: Array) -> int:
    """How many new rows equal an old one: whole rows are compared where the first bytes agree."""
    wanted, found = np.unique(keys), set()
    for start, window in _windows(tensor, int(old[-1]) + 1 if len(old) else 0):
        own = _keys(window)
        nearest = wanted[np.minimum(np.searchsorted(wanted, own), len(wanted) - 1)]
        for place in np.flatnonzero(nearest == own):
            found.add((start + int(place), hash(window[place].tobytes())))
    used = np.zeros(int(old[-1]) + 1 if len(old) else 0, bool)
    used[old] = True
    return sum(hashes[value] for value in {value for row, value in found if used[row]})


def _windows(tensor: Tensor, rows: int) -> Iterator[tuple[int, Array]]:
    """(first row, bytes (n, row bytes)) of stretches of the file, each mapped and let go."""
    step = max(1, _WINDOW_BYTES // max(1, tensor.row_bytes))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        begin = tensor.begin + start * tensor.row_bytes
        shape = (count, tensor.row_bytes)
        yield start, np.memmap(tensor.path, np.uint8, "r", begin, shape)


def _quantiles(norms: Array) -> tuple[float, float, float]:
    if not norms.size:
        return (0.0, 0.0, 0.0)
    low, median, high = np.quantile(norms, [0.05, 0.5, 0.95]).tolist()
    return (round(low, 6), round(median, 6), round(high, 6))
