"""Documents as fixed blocks of tokens in which no document sees another.

Every token of every document is a target exactly once. Inputs and targets are kept apart (the
target of a position is the next token), so that a document cut at a block's end loses nothing:
the last token before the cut is the first input after it. Positions restart with each
document and each block; attention is cut where they restart (`position_ids` in transformers).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Types of models that cut attention where positions restart (transformers 5 makes the mask from
# `position_ids`). Others, BLOOM, OPT, MPT, BioGPT and all with a recurrent state among them, let
# the documents of a block see each other and do not say so; what is not known to keep them apart
# is not trusted.
_KEEPS_APART = """
    apertus arcee bitnet codegen cohere cohere2 ctrl deepseek_v2 deepseek_v3 diffllama doge
    ernie4_5 ernie4_5_moe exaone4 falcon gemma gemma2 gemma3 gemma3_text gemma4_text glm glm4
    glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite granitemoe
    helium hunyuan_v1_dense idefics3 internvl jais2 jetmoe llama llama4_text llava llava_next
    llava_onevision ministral ministral3 mistral mistral3 mixtral nemotron olmo olmo2 olmo3
    olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 smolvlm
    solar_open stablelm starcoder2 vaultgemma
"""
KEEPS_APART = frozenset(_KEEPS_APART.split())
IGNORED = -100  # the target that no loss counts, as everywhere in torch and transformers
_COLUMNS = ("inputs.bin", "targets.bin", "positions.bin")
_WAITING = 2**18  # positions that are gathered before they are written


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
    apart: bool = False,
    folder: Path | None = None,
) -> Blocks:
    """Blocks of `block_size` positions out of (ids, UTF-8 bytes) of documents.

    Args:
        documents: in the order in which they are to be read.
        block_size: T, positions per block.
        start: what stands before each document (bos, else eos); only its last id predicts.
        end: what the model should predict after each document, or None.
        apart: begin a new block with each document, for models that would let documents in one
            block see each other (types outside `KEEPS_APART`).
        folder: where the blocks are kept, in files that are mapped into memory; without it they
            are in memory.

    >>> blocks = pack([([5, 6], 2), ([7], 1)], 3, start=[1], end=2)
    >>> blocks.inputs.tolist(), blocks.targets.tolist(), blocks.positions.tolist()
    ([[1, 5, 6], [1, 7, 0]], [[5, 6, 2], [7, 2, -100]], [[0, 1, 2], [0, 1, 0]])
    """
    columns = _Columns(block_size, folder)
    # Two numbers for each document, however many there are.
    ends, sizes = array("q", [0]), array("q", [0])
    tail = [] if end is None else [end]
    for ids, size in documents:
        line = np.array([*start, *ids, *tail], dtype=np.int32)
        target = line[1:].copy()
        target[: len(start) - 1] = IGNORED
        columns.add(line[:-1], target)
        filled = columns.fill() if apart else 0
        ends.append(ends[-1] + len(target) + filled)
        sizes.append(sizes[-1] + size)
    inputs, targets, positions = columns.finish()
    block_ends = np.minimum(np.arange(1, len(inputs) + 1) * block_size, ends[-1])
    blocks = Blocks(
        inputs,
        targets,
        positions,
        np.floor(np.interp(block_ends, ends, sizes) + 1e-6).astype(np.int64),
        columns.counted(),
    )
    if folder is not None:
        np.save(folder / "text_bytes.npy", blocks.text_bytes)
        np.save(folder / "tokens.npy", blocks.tokens)
    return blocks


def packed(folder: Path, block_size: int) -> Blocks:
    """The blocks that `pack` left in `folder`."""
    inputs, targets, positions = (_mapped(folder / name, block_size) for name in _COLUMNS)
    return Blocks(
        inputs,
        targets,
        positions,
        np.load(folder / "text_bytes.npy", allow_pickle=False),
        np.load(folder / "tokens.npy", allow_pickle=False),
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


class _Columns:
    """Inputs, targets and positions as they grow, in memory or in files.

    A position is the distance to the start of the document or of the block, whichever is nearer.
    """

    def __init__(self, block_size: int, folder: Path | None) -> None:
        self._block_size, self._folder = block_size, folder
        self._parts: list[NDArray[np.int32]] = []  # each (3, n)
        self._length = self._waiting = 0
        self._counts: list[NDArray[np.int64]] = []  # targets of each block that is whole
        self._rest = np.zeros((3, 0), dtype=np.int32)
        self._whole: list[NDArray[np.int32]] = []
        if folder is not None:
            for name in _COLUMNS:
                (folder / name).write_bytes(b"")

    def add(self, inputs: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        """One document."""
        place = np.arange(self._length, self._length + len(inputs))
        begin = np.maximum(self._length, place // self._block_size * self._block_size)
        part = np.stack([inputs, targets, (place - begin).astype(np.int32)])
        self._parts.append(part)
        self._length += len(inputs)
        self._waiting += len(inputs)
        if self._waiting >= _WAITING:
            self._flush()

    def _flush(self) -> None:
        """Move all whole blocks on."""
        joined = np.concatenate([self._rest, *self._parts], axis=1)
        blocks = joined.shape[1] // self._block_size
        whole, self._rest = np.split(joined, [blocks * self._block_size], axis=1)
        self._parts, self._waiting = [], 0
        self._counts.append((whole[1].reshape(-1, self._block_size) != IGNORED).sum(axis=1))
        if self._folder is None:
            self._whole.append(whole)
            return
        for name, column in zip(_COLUMNS, whole, strict=True):
            with (self._folder / name).open("ab") as stream:
                stream.write(column.tobytes())

    def fill(self) -> int:
        """Fill up the last block; returns with how many positions."""
        missing = -self._length % self._block_size
        self.add(np.zeros(missing, np.int32), np.full(missing, IGNORED, np.int32))
        return missing

    def finish(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """The columns, each (B, T), the last block filled up."""
        self.fill()
        self._flush()
        if self._folder is not None:
            first, second, third = (
                _mapped(self._folder / name, self._block_size) for name in _COLUMNS
            )
        else:
            joined = np.concatenate(self._whole, axis=1)
            first, second, third = joined.reshape(3, -1, self._block_size)
        return first, second, third

    def counted(self) -> NDArray[np.int64]:
        """Targets up to each block's end."""
        return np.concatenate(self._counts).cumsum()


def _mapped(path: Path, block_size: int) -> NDArray[np.int32]:
    if not path.stat().st_size:  # which cannot be mapped
        return np.zeros((0, block_size), dtype=np.int32)
    flat = np.memmap(path, dtype=np.int32, mode="r")
    return flat.reshape(-1, block_size)


def collate(items: Sequence[dict[str, NDArray[np.int64]]]) -> dict[str, Any]:
    """Blocks stacked into a batch of torch tensors, each (B, T) int64.

    The labels are given as `shift_labels` too: from these Trainer counts the targets of a step.
    It would leave out the first of `labels`, taking them for inputs that are yet to be shifted,
    and divide the loss of a block with a single target by zero.
    """
    import torch

    batch = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}
    return {**batch, "shift_labels": batch["labels"]}
