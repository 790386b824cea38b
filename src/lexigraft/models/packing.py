"""Documents as fixed blocks of tokens in which no document sees another.

Every token of every document is a target exactly once. Inputs and targets are kept apart (the
target of a position is the next token), so that a document cut at a block's end loses nothing:
the last token before the cut is the first input after it. Positions restart with each
document and each block; attention is cut where they restart (`position_ids` in transformers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the target that no loss counts, as everywhere in torch and transformers


@dataclass(frozen=True)
class Blocks:
    """Packed documents; `blocks[i]` is what a data loader collates.

    Attributes:
        inputs, targets, positions: each (B, T) int32.
        text_bytes: (B,) UTF-8 bytes of text consumed up to each block's end.
        tokens: (B,) targets consumed up to each block's end.
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    positions: NDArray[np.int32]
    text_bytes: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> dict[str, NDArray[np.int64]]:
        return {
            "input_ids": self.inputs[place].astype(np.int64),
            "labels": self.targets[place].astype(np.int64),
            "position_ids": self.positions[place].astype(np.int64),
        }


def pack(
    documents: Iterable[tuple[Sequence[int], int]],
    block_size: int,
    *,
    start: Sequence[int],
    end: int | None,
) -> Blocks:
    """Blocks of `block_size` positions out of (ids, UTF-8 bytes) of documents.

    Args:
        documents: in the order in which they are to be read.
        block_size: T, positions per block.
        start: what stands before each document (bos, else eos); only its last id predicts.
        end: what the model should predict after each document, or None.

    >>> blocks = pack([([5, 6], 2), ([7], 1)], 3, start=[1], end=2)
    >>> blocks.inputs.tolist(), blocks.targets.tolist(), blocks.positions.tolist()
    ([[1, 5, 6], [1, 7, 0]], [[5, 6, 2], [7, 2, -100]], [[0, 1, 2], [0, 1, 0]])
    """
    inputs: list[NDArray[np.int32]] = []
    targets: list[NDArray[np.int32]] = []
    ends, sizes = [0], [0]
    tail = [] if end is None else [end]
    for ids, size in documents:
        line = np.array([*start, *ids, *tail], dtype=np.int32)
        target = line[1:].copy()
        target[: len(start) - 1] = IGNORED
        inputs.append(line[:-1])
        targets.append(target)
        ends.append(ends[-1] + len(target))
        sizes.append(sizes[-1] + size)
    total = ends[-1]
    padded = -(-total // block_size) * block_size
    shape = (-1, block_size)
    flat_inputs = _joined(inputs, padded, 0)
    flat_targets = _joined(targets, padded, IGNORED)
    block_ends = np.minimum(np.arange(block_size, padded + 1, block_size), total)
    return Blocks(
        flat_inputs.reshape(shape),
        flat_targets.reshape(shape),
        _positions(np.array(ends), padded, block_size).reshape(shape),
        np.floor(np.interp(block_ends, ends, sizes) + 1e-6).astype(np.int64),
        (flat_targets.reshape(shape) != IGNORED).sum(axis=1).cumsum(),
    )


def repeated(blocks: Blocks, passes: int, seed: int) -> Blocks:
    """`blocks` read `passes` times: first in their order, then each time in another one."""
    random = np.random.default_rng(seed)
    orders = [np.arange(len(blocks)), *(random.permutation(len(blocks)) for _ in range(passes - 1))]
    order = np.concatenate(orders)
    return Blocks(
        blocks.inputs[order],
        blocks.targets[order],
        blocks.positions[order],
        np.diff(blocks.text_bytes, prepend=0)[order].cumsum(),
        np.diff(blocks.tokens, prepend=0)[order].cumsum(),
    )


def _joined(parts: list[NDArray[np.int32]], length: int, fill: int) -> NDArray[np.int32]:
    flat = np.full(length, fill, dtype=np.int32)
    if parts:
        joined = np.concatenate(parts)
        flat[: len(joined)] = joined
    return flat


def _positions(ends: NDArray[np.int64], length: int, block_size: int) -> NDArray[np.int32]:
    """Distance to the start of the document or of the block, whichever is nearer."""
    place = np.arange(length)
    document = ends[np.searchsorted(ends, place, side="right") - 1]
    block = place // block_size * block_size
    distance: NDArray[np.int32] = (place - np.maximum(document, block)).astype(np.int32)
    return distance


def collate(items: Sequence[dict[str, NDArray[np.int64]]]) -> dict[str, Any]:
    """Blocks stacked into a batch of torch tensors, each (B, T) int64.

    The labels are given as `shift_labels` too: from these Trainer counts the targets of a step.
    It would leave out the first of `labels`, taking them for inputs that are yet to be shifted,
    and divide the loss of a block with a single target by zero.
    """
    import torch

    batch = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}
    return {**batch, "shift_labels": batch["labels"]}
