"""`--objective distill`: new rows learn from the model's own reading of the same text.

A grafted model can read a text in two ways: in base ids, as it always has, and in new ones. The
first reading is the teacher of the second; weights are the same, only new rows differ and move (in
mode `lora` LoRA in the first layers too, without which the teacher reads). Two things are asked of
a row, and each has a cheap teacher:

- as an *input*, that the hidden state at the end of its token be the one that the teacher has at
  the end of the token's spelling (token distillation: Dobler, Elliott and de Melo 2025, arXiv
  2505.20133). It is compared after the first quarter of the layers, where a model has put the
  pieces of a word together (Kaplan et al. 2024, arXiv 2410.05864), so that three quarters of the
  body need no backward pass, and no student's forward pass either;
- as an *output*, that the token be likely where it comes next and unlikely elsewhere: the loss of
  the next token on the teacher's last hidden states. Old rows do not move, so their part of the
  softmax is one number per position, which the teacher's pass leaves behind; for the new rows it
  is a convex problem (multinomial logistic regression).

What the teacher leaves behind depends on the text alone, so it is kept for later passes over it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexigraft.console import note
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.models.evidence import NewTokens
from lexigraft.models.load import context_limit, evaluating, text_part
from lexigraft.models.objectives import (
    LOGITS,
    behind_head,
    can_chunk,
    loss_at_head,
    replaced_head,
    unwrapped,
)
from lexigraft.models.packing import IGNORED, Blocks, collate

# The share of the layers after which hidden states are compared.
DEPTH = 0.25
# Blocks from which the spread of hidden states is taken.
_SAMPLED = 4
# Bytes of the teacher's readings that are kept for later passes.
KEPT = 2**30


@dataclass(frozen=True)
class Reading:
    """What the teacher made of one block.

    Attributes:
        early: (P, D) its hidden state after the compared layer, at the end of each input.
        last: (P, D) what its head is given there.
        log_old: (P,) log of the sum of exp over the logits of the old rows.
        own: (P,) the logit of the next token where that is an old one, else 0.
    """

    early: Tensor
    last: Tensor
    log_old: Tensor
    own: Tensor

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


class Distill:
    """The objective `distill`, where new rows train, and perhaps LoRA in the `first_layers`."""

    def __init__(self, model: Any, new: NewTokens, blocks: Blocks) -> None:
        """
        Args:
            model: the model, its new rows already parameters of their own.
            new: the new tokens and how base ids spell them.
            blocks: all that will be read; the spread of hidden states is taken from the first.

        Raises:
            RefusalError: the spelling of a new token is unknown, or the model does something to
                its logits that is unknown, or has no stack of layers.
            LexigraftError: a block is too long for the model's context when spelled in base ids.
        """
        unknown = len(new.ids) - len(new.pieces)
        if unknown:
            raise RefusalError(
                f"{unknown:,} new tokens whose spelling in base ids no file tells",
                needed="new_tokens.jsonl, as `lexigraft learn` writes it",
                fix="use --objective lm",
            )
        ids = collate([blocks[0]])["input_ids"]
        if not can_chunk(model, ids.to(model.get_input_embeddings().weight.device)):
            raise RefusalError(
                f"{type(model).__name__} changes its logits in a way that is not known",
                needed="a head whose output, capped or scaled as the config says, is the logits",
                fix="use --objective lm",
            )
        self._new = new
        self._limit = context_limit(model)
        self._stack = stack_of_layers(text_part(model))
        self._first = first_layers(model)
        self._kept: dict[bytes, Reading] = {}
        self._room = KEPT
        self._spread = self._spread_of(model, blocks)

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The loss of the next token on the teacher's states, plus the squared distance of states.

        The distance is a mean over dimensions, each in units of its own spread, summed over
        targets, as the nats are.
        """
        inner = unwrapped(model)
        counted = inputs["labels"] != IGNORED
        teacher = self._readings(inner, inputs)

        def loss(head: Any, _: Any, hidden: Tensor) -> Tensor:
            early = states[0][counted]
            wanted = torch.cat([reading.early for reading in teacher]).to(early.device)
            distance = ((early.float() - wanted.float()) / self._spread).square().mean(-1).sum()
            return distance + self._head_nats(inner, head, teacher, inputs["labels"][counted])

        # Without dropout: both readings are to differ in their tokens alone.
        with evaluating(inner), self._first_layers() as states:
            return loss_at_head(model, inputs, loss), int(counted.sum())

    def _head_nats(self, inner: Any, head: Any, teacher: list[Reading], targets: Tensor) -> Tensor:
        """-log p of the targets under the new rows, on the teacher's last states, summed."""
        rows = head.rows
        bias = None if head.inner.bias is None else head.inner.bias[head.ids]
        behind = behind_head(inner.config)
        place = rows.device
        last, log_old, own = (
            torch.cat([getattr(reading, name) for reading in teacher]).to(place)
            for name in ("last", "log_old", "own")
        )
        new = behind(F.linear(last.to(rows.dtype), rows, bias))
        at = head.places[targets]
        mine = torch.where(at >= 0, new.gather(1, at.clamp(min=0)[:, None])[:, 0], own)
        return (torch.logaddexp(log_old, new.logsumexp(-1)) - mine).sum()

    def _readings(self, inner: Any, inputs: dict[str, Tensor]) -> list[Reading]:
        columns = (inputs[name] for name in ("input_ids", "labels", "position_ids"))
        return [self._reading(inner, *row) for row in zip(*columns, strict=True)]

    def _reading(self, inner: Any, ids: Tensor, targets: Tensor, positions: Tensor) -> Reading:
        """The teacher's reading of one block, kept from an earlier pass if there was one."""
        key = ids.cpu().numpy().tobytes() + targets.cpu().numpy().tobytes()
        if key not in self._kept:
            reading = self._read(inner, ids, targets, positions)
            if reading.size > self._room:
                return reading
            self._room -= reading.size
            self._kept[key] = reading
            if self._room < reading.size:
                note("the teacher's readings fill their memory: the rest is read in each pass")
        return self._kept[key]

    def _read(self, inner: Any, ids: Tensor, targets: Tensor, positions: Tensor) -> Reading:
        spelled, places, ends = self._spelled(ids.tolist(), positions.tolist())
        if max(places) >= self._limit:
            raise LexigraftError(
                f"a block of {max(places) + 1:,} positions when it is spelled in base ids",
                needed=f"at most {self._limit:,}, the model's positions",
                fix="use a smaller --block-size",
            )
        counted = targets != IGNORED
        kept = torch.tensor(ends, device=ids.device)[counted]
        found: list[Tensor] = []

        def head(module: Any, logits_of: Any, hidden: Tensor) -> Tensor:
            last = hidden[0, kept]
            found.extend((last, *_old_part(inner, module, logits_of, last, targets[counted])))
            return hidden[..., :1]

        with (
            torch.no_grad(),
            evaluating(inner),
            inner.disable_adapter() if hasattr(inner, "peft_config") else contextlib.nullcontext(),
            self._watched() as states,
            replaced_head(inner, head),
        ):
            inner(
                input_ids=torch.tensor([spelled], device=ids.device),
                position_ids=torch.tensor([places], device=ids.device),
                use_cache=False,
            )
        return Reading(*(t.cpu() for t in (states[0][0, kept], *found)))

    def _spelled(
        self, ids: list[int], positions: list[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """A block in base ids: ids, positions, and where each input of the block ends."""
        spelled: list[int] = []
        places: list[int] = []
        ends: list[int] = []
        for token, position in zip(ids, positions, strict=True):
            begin = 0 if position == 0 else places[-1] + 1
            pieces = self._new.pieces.get(token, [token])
            spelled += pieces
            places += range(begin, begin + len(pieces))
            ends.append(len(spelled) - 1)
        return spelled, places, ends

    def _spread_of(self, model: Any, blocks: Blocks) -> Tensor:
        """(D,) the standard deviation of each dimension of the compared states."""
        place = model.get_input_embeddings().weight.device
        batch = collate([blocks[row] for row in range(min(_SAMPLED, len(blocks)))])
        inputs = {name: column.to(place) for name, column in batch.items()}
        states = torch.cat([reading.early for reading in self._readings(model, inputs)])
        # The first position of a document holds a state of its own kind (an attention sink).
        later = batch["position_ids"][batch["labels"] != IGNORED] > 0
        spread = states[later].float().std(0)
        return (spread + 1e-3 * spread.mean()).to(place)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """While it lasts, what comes out of the compared layer is put into the list."""
        states: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        handle = self._first[-1].register_forward_hook(keep)
        try:
            yield states
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _first_layers(self) -> Iterator[list[Tensor]]:
        """The same, while the model ends after that layer."""
        owner, name = self._stack
        layers = getattr(owner, name)
        with self._watched() as states:
            setattr(owner, name, self._first)
            try:
                yield states
            finally:
                setattr(owner, name, layers)


def _old_part(
    model: Any, head: Any, logits_of: Any, last: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """What old rows make of states (P, D): `log_old` and `own` of a `Reading`."""
    behind = behind_head(model.config)
    size = max(1, LOGITS // len(head.weight))
    sums, own = [], []
    for part, wanted in zip(last.split(size), targets.split(size), strict=True):
        logits = behind(logits_of(part)).float()
        is_new = head.places[wanted] >= 0
        mine = logits.gather(1, wanted[:, None])[:, 0]
        own.append(mine.masked_fill(is_new, 0.0))
        logits[:, head.ids] = -torch.inf
        sums.append(logits.logsumexp(-1))
    return torch.cat(sums), torch.cat(own)


def first_layers(model: Any) -> nn.ModuleList:
    """The layers behind the last of which hidden states are compared.

    Raises:
        RefusalError: the model has no stack of layers.
    """
    layers = list(getattr(*stack_of_layers(text_part(model))))
    return nn.ModuleList(layers[: max(1, round(DEPTH * len(layers)))])


def stack_of_layers(model: Any) -> tuple[nn.Module, str]:
    """The module and attribute that hold the list of the model's layers, its longest one.

    Args:
        model: what of a model reads text.

    Raises:
        RefusalError: there is none.
    """
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    outer = {
        path: module
        for path, module in lists.items()
        if not any(path.startswith(other + ".") for other in lists if other != path)
    }
    if not outer:
        raise RefusalError(
            f"{type(model).__name__} has no list of layers",
            needed="a stack of layers, whose first quarter can be run alone",
            fix="use --objective lm",
        )
    path = max(outer, key=lambda name: len(outer[name]))
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
