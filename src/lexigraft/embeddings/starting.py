"""New rows of a vocabulary tensor on disk, block by block: what graft and merge share.

Memory does not grow with the vocabulary: per block the rows of its own pieces are read, and what
`gaussian` and `donor` need beside them is said there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lexigraft.checkpoints.architectures import Role
from lexigraft.checkpoints.growth import NewRows
from lexigraft.checkpoints.header import Tensor, numpy_dtype
from lexigraft.checkpoints.rows import by_row, read_ids
from lexigraft.checkpoints.survey import Survey, require_finite
from lexigraft.embeddings.choice import Choice, method
from lexigraft.embeddings.methods import Array, Pieces, Spelled, Weights, told_apart_by
from lexigraft.embeddings.spelling import characters_of, spell
from lexigraft.embeddings.spread import spread_of
from lexigraft.errors import LexigraftError
from lexigraft.families import Family, TokenMap, new_ids

if TYPE_CHECKING:
    from lexigraft.embeddings.donor import Donor, Sums


@dataclass(frozen=True)
class Start:
    """How the new rows of all vocabulary tensors of one graft start.

    Attributes:
        choice: the method of each role.
        ids: the new ids, ascending.
        tokens: V, the base's tokens (max id + 1).
        pieces: per new id, base ids.
        characters: per new token, how many characters each of its pieces holds.
        tied: the head is the input embedding.
        seed: of methods that draw. A tied pair and stored copies get equal rows.
        copies: new id -> base ids that it is copied from.
        donor: where other rows come from.
    """

    choice: Choice
    ids: Sequence[int]
    tokens: int
    pieces: Pieces
    characters: Weights
    tied: bool = False
    seed: int = 0
    copies: Mapping[int, Sequence[int]] | None = None
    donor: Donor | None = None

    @classmethod
    def of(
        cls,
        choice: Choice,
        base: Family,
        extended: TokenMap,
        *,
        tied: bool = False,
        seed: int = 0,
        copies: Mapping[int, Sequence[int]] | None = None,
        donor: Donor | None = None,
    ) -> Start:
        """The start of the ids that mean nothing in `base`, `vacant` ones and those behind it."""
        tokens = base.map.tokens
        ids = new_ids(base, extended)
        pieces = spell(base, extended, ids)
        widths = characters_of(base, pieces)
        return cls(choice, ids, tokens, pieces, widths, tied, seed, copies, donor)

    def rows(self, tensor: Tensor, role: Role, known: Callable[[], Survey]) -> NewRows:
        """New rows of `tensor`, for `checkpoints.growth.grown`.

        Args:
            tensor: the base's; only the rows of the pieces are read (`gaussian`: all).
            role: what it is.
            known: gives its survey; called when a block is made.

        Shapes: (start, stop) -> (stop - start, D), in the type of the tensor.

        Raises:
            LexigraftError: now, if a method of the user's own cannot be imported; when a block is
                made, if rows hold NaN or infinity, or are all alike where they should differ.
        """
        name = self.choice.of(role)
        function = method(name)
        view = by_row(tensor)
        kind = np.float64 if tensor.dtype == "F64" else np.float32

        @cache
        def sums() -> Sums:
            assert self.donor is not None
            return self.donor.sums("embed" if self.tied else role, known().untrained)

        @cache
        def spread() -> Array:
            return spread_of(tensor, self.tokens, known())

        def rows(start: int, stop: int) -> Array:
            require_finite(tensor, known())
            ids = self.ids[start:stop]
            pieces = [list(spelt) for spelt in self.pieces[start:stop]]
            weights: Weights = [[] for _ in pieces]
            if name == "copy":
                copies = self.copies or {}
                pieces = [
                    list(copies.get(token_id, spelt))
                    for token_id, spelt in zip(ids, pieces, strict=True)
                ]
            if name == "donor":
                weights = sums().weights[start:stop]
                mixed = sums().pieces[start:stop]
                pieces = [list(m or own) for m, own in zip(mixed, pieces, strict=True)]
            used, local = _local(pieces)
            spelled = Spelled(
                read_ids(view, used).astype(kind),
                local,
                known().mean.astype(kind),
                ids,
                self.seed,
                role,
                self.tied,
                self.characters[start:stop],
                weights,
                spread,
            )
            result = function(spelled)
            _require_different(tensor, name, spelled, result)
            return _stored(tensor, name, spelled.ids, result)

        return rows


def _local(pieces: Pieces) -> tuple[list[int], list[list[int]]]:
    """The ids in `pieces`, ascending, and `pieces` as places among them."""
    flat = np.array([place for spelt in pieces for place in spelt], np.int64)
    ids, places = np.unique(flat, return_inverse=True)
    ends = np.cumsum([len(spelt) for spelt in pieces])
    return ids.tolist(), [part.tolist() for part in np.split(places, ends[:-1])]


def _require_different(tensor: Tensor, name: str, spelled: Spelled, rows: Array) -> None:
    """A bias may be zero everywhere; rows of a table that are all alike make no difference."""
    if rows.ndim < 2 or len(set(told_apart_by(name, spelled))) < 2 or (rows != rows[0]).any():
        return
    raise LexigraftError(
        f"{tensor.name}: --init {name} gives the {len(rows):,} new tokens "
        f"{_ids(spelled.ids)} the same row",
        needed="different rows for tokens that are spelled differently",
        fix=f"look at {tensor.name} of the base (is it all alike?)"
        + (f" and at what {name} returns" if ":" in name else "")
        + ", or take --init mean-all",
    )


def _stored(tensor: Tensor, name: str, ids: Sequence[int], rows: Array) -> Array:
    with np.errstate(over="ignore"):  # found below, by name
        stored = rows.astype(numpy_dtype(tensor.dtype))
    finite = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    if not finite.all():
        bad = [ids[int(row)] for row in np.flatnonzero(~finite)]
        raise LexigraftError(
            f"{tensor.name}: --init {name} gives NaN or infinity (in {tensor.dtype}) for "
            f"{len(bad):,} new tokens, the first of id {bad[0]}",
            needed=f"finite numbers within the range of {tensor.dtype}",
            fix="graft with --init mean",
        )
    return stored


def _ids(ids: Sequence[int]) -> str:
    return f"{ids[0]}-{ids[-1]}"
