"""`--donor MODEL`: rows for new tokens that another model has as one token.

What the new token is to the donor's other tokens, it should be to the base's: its donor row is
written as a sum of donor rows of tokens that both models have (orthogonal matching pursuit, 64 of
them), and the same sum of the base's rows is the new row, embedding and head each in their own
space. Source: Goddard & Fernandes Neto 2025, *Training-Free Tokenizer Transplantation via
Orthogonal Matching Pursuit* (arXiv 2506.06607); mergekit's tokensurgeon.

Tokens are equal where their text is, whatever the family: ` angina`, as bytes. The donor's rows
are read from disk, a block at a time, once for each of the 64 atoms and each group of tokens;
memory is bounded by the group (some 200 MB), not by the donor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft import families
from lexigraft.checkpoints.architectures import Role, vocabulary_of
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.config import refuse_quantised
from lexigraft.checkpoints.fit import require_floats
from lexigraft.checkpoints.header import Tensor
from lexigraft.checkpoints.rows import block_rows, read_ids, read_rows, widened
from lexigraft.checkpoints.survey import require_finite, survey
from lexigraft.embeddings.methods import Weights
from lexigraft.embeddings.pursuit import matching_pursuit
from lexigraft.errors import LexigraftError
from lexigraft.families import Family, TokenMap, new_ids
from lexigraft.families.sentencepiece_model import BYTE_PIECES
from lexigraft.files import require_folder

ATOMS = 64

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sums:
    """Per new token, base ids and their weights; both empty where the donor lacks the token."""

    pieces: Sequence[Sequence[int]]
    weights: Weights


@dataclass(frozen=True)
class Donor:
    """A donor beside a base.

    Attributes:
        folder: the donor's.
        token_map: its tokens.
        tensors: its table of each role; without a head of its own the embedding is both.
        shared: donor id -> base id of the tokens that both have, ascending.
        wanted: per new token its donor id, None where the donor has it not as one token.
    """

    folder: Path
    token_map: TokenMap
    tensors: Mapping[str, Tensor]
    shared: Mapping[int, int]
    wanted: Sequence[int | None]

    @classmethod
    def open(cls, folder: Path, base: Family, extended: Family) -> Donor:
        """Match the tokens of the donor in `folder` with the base's and with the new ones.

        Raises:
            RefusalError: its tokenizer or weights are of a kind that is not supported.
            LexigraftError: no such model, too few tokens in common, or none of the new ones.
        """
        family = families.load(require_folder(folder, "the donor of --donor"))
        donor_ids, base_ids = _by_text(family), _by_text(base)
        pairs = {i: base_ids[text] for text, i in donor_ids.items() if text in base_ids}
        new = new_ids(base, extended.map)
        texts = {token_id: text for text, token_id in _by_text(extended).items()}
        wanted = [donor_ids.get(texts[i]) if i in texts else None for i in new]
        tensors = _tables(folder, family.map)
        words = sum(len(text) > 1 and text in base_ids for text in donor_ids)
        if words < ATOMS:
            raise LexigraftError(
                f"--donor {folder} and the base share {words:,} tokens of two bytes or more",
                needed=f"{ATOMS} or more: each new row is a sum of {ATOMS} rows",
                fix="take a donor whose tokenizer is of the same language, or leave --donor out",
            )
        if not any(token_id is not None for token_id in wanted):
            raise LexigraftError(
                f"--donor {folder} has none of the {len(new):,} new tokens as one token",
                needed="a donor that knows the words of your field",
                fix="leave --donor out: rows then start as --init auto says",
            )
        return cls(folder, family.map, tensors, dict(sorted(pairs.items())), wanted)

    @property
    def known(self) -> int:
        """How many new tokens the donor has."""
        return sum(token_id is not None for token_id in self.wanted)

    def sums(self, role: Role, base_untrained: Ids) -> Sums:
        """The new tokens as sums of base rows, by the donor's rows of the same role.

        A bias has no direction that could be matched: no token is found there.

        Args:
            role: of the base's tensor.
            base_untrained: base ids whose rows were never trained: they mean nothing.

        Raises:
            LexigraftError: the donor's rows hold NaN or infinity.
        """
        if role == "bias":
            none: list[list[int]] = [[] for _ in self.wanted]
            return Sums(none, [[] for _ in none])
        tensor = self.tensors[role]
        known = survey(tensor, self.token_map.tokens)
        require_finite(tensor, known)
        lost, useless = set(known.untrained.tolist()), set(base_untrained.tolist())
        shared = {d: b for d, b in self.shared.items() if d not in lost and b not in useless}
        donor_ids = np.fromiter(shared.keys(), np.int64)
        base_ids = np.fromiter(shared.values(), np.int64)
        found = {row: i for row, i in enumerate(self.wanted) if i is not None and i not in lost}
        ids, again = np.unique(np.fromiter(found.values(), np.int64), return_inverse=True)
        vectors = widened(read_ids(tensor, ids.tolist()))[again].astype(np.float32)
        places, weights = matching_pursuit(
            vectors, partial(_atoms, tensor, donor_ids), min(ATOMS, len(donor_ids))
        )
        pieces_of: list[list[int]] = [[] for _ in self.wanted]
        weights_of: list[list[float]] = [[] for _ in self.wanted]
        for row, place, weight in zip(found, places, weights, strict=True):
            used = weight != 0
            pieces_of[row] = base_ids[place[used]].tolist()
            weights_of[row] = weight[used].tolist()
        return Sums(pieces_of, weights_of)


def _by_text(family: Family) -> dict[bytes, int]:
    """The bytes of each token that stands for text -> its id.

    A token of WordPiece that begins a word has the space before it that others write out. Of
    several tokens with one text, such as `A` and the byte `<0x41>`, the one that is written as the
    text counts, and of those the lowest.
    """
    found: dict[bytes, int] = {}
    word_pieces = family.name == "WordPiece"
    for token_id, text in sorted(family.map.texts.items(), reverse=True):
        if token_id in family.map.special:
            continue
        data = family.token_bytes(token_id)
        if word_pieces and data == text.encode() and token_id not in family.map.added:
            data = b" " + data
        if data and not (text in BYTE_PIECES and data in found):
            found[data] = token_id
    return found


def _tables(folder: Path, token_map: TokenMap) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    refuse_quantised(checkpoint)
    vocabulary = vocabulary_of(checkpoint)
    require_floats(checkpoint, vocabulary)
    if vocabulary.rows < token_map.tokens:
        raise LexigraftError(
            f"--donor {folder} has {vocabulary.rows:,} rows for {token_map.tokens:,} tokens",
            needed="a row for every token",
            fix=f"lexigraft check {folder}",
        )
    head = (*vocabulary.heads, vocabulary.embeds[0])[0]
    return {
        "embed": checkpoint.tensors[vocabulary.embeds[0]],
        "head": checkpoint.tensors[head],
    }


def _atoms(tensor: Tensor, ids: Ids) -> Iterator[Array]:
    """Rows `ids` (ascending) in float32, in blocks that are read in one piece."""
    step = block_rows(tensor)
    for start in range(0, int(ids[-1]) + 1, step):
        first, last = np.searchsorted(ids, (start, start + step))
        if first < last:
            rows = read_rows(tensor, start, int(ids[last - 1]) + 1)[ids[first:last] - start]
            yield rows.astype(np.float32)
