"""What training minimises: a function of the model and a batch, in nats."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lexigraft.models.bits import POSITIONS, nats
from lexigraft.models.load import evaluating
from lexigraft.models.new_rows import GrownHead

# Logits that are held at once in training: 64 MiB of float32, however many rows there are.
LOGITS = 2**24
_ToLogits = Callable[[Tensor], Tensor]
_ToParts = Callable[[Tensor], list[Tensor]]
_PROBED = 8  # positions on which the model itself is asked what it makes of its head


class Objective(Protocol):
    """One objective of training."""

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The loss of one batch, and over how many targets it is summed.

        Args:
            model: the model as it is trained, perhaps wrapped; it must be called as a whole, so
                that what wraps it takes part.
            inputs: `input_ids`, `labels` (the *next* tokens, -100 where none counts) and
                `position_ids`, each (B, T) int64.

        Returns:
            The sum in nats, a scalar with a gradient, and the number of targets. The trainer
            divides by the targets of the whole step, over all batches and processes.
        """
        ...


class NextToken:
    """-log p of each next token: ordinary continued pretraining.

    The head and the softmax are computed for a few positions at a time, gradients included, so
    that the logits of a block, the peak of memory with large vocabularies, are never held at once
    (the way of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989). What
    a model does to the logits behind its head must be known for that: caps and scales are, and a
    model that does anything else is found out on a few tokens and trained in the plain way.
    """

    def __init__(self) -> None:
        self._chunked: bool | None = None

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
        """See `Objective.loss`."""
        targets = inputs["labels"]
        count = int(torch.count_nonzero(targets >= 0))
        if self._chunked is None:
            self._chunked = can_chunk(unwrapped(model), inputs["input_ids"])
        if not self._chunked:
            logits = _logits(model, inputs)
            return nats(logits.flatten(0, 1), targets.flatten()).sum(), count
        after = behind_head(unwrapped(model).config)

        def loss(head: Any, logits_of: _ToLogits, hidden: Tensor) -> Tensor:
            def parts_of(states: Tensor) -> list[Tensor]:
                parts = head.parts(states) if isinstance(head, GrownHead) else [logits_of(states)]
                return [after(part) for part in parts if part.shape[-1]]

            parameters = [p for p in head.parameters() if p.requires_grad]
            kept = targets >= 0
            size = max(1, LOGITS // len(head.weight))
            total: Tensor = _HeadLoss.apply(
                hidden[kept], targets[kept], parts_of, size, *parameters
            )
            return total

        return loss_at_head(model, inputs, loss), count


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]
    """The sum of -log p over all positions; its gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        parts_of: _ToParts,
        size: int,
        *parameters: Tensor,
    ) -> Tensor:
        """Hidden states (N, D) and targets (N,) -> a scalar, float32."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for begin in range(0, len(hidden), size):
            part = hidden[begin : begin + size].detach().requires_grad_()
            with torch.enable_grad():
                logits = parts_of(part)
            loss, gradients = _nats_in_place(logits, targets[begin : begin + size])
            of_part, *others = torch.autograd.grad(logits, [part, *parameters], gradients)
            to_hidden[begin : begin + size] = of_part
            for place, gradient in enumerate(others):
                sums[place] += gradient
            total += loss
        ctx.save_for_backward(
            to_hidden, *(s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))
        )
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that were made, times that of the scalar."""
        to_hidden, *sums = ctx.saved_tensors
        hidden = (to_hidden.float() * scale).to(to_hidden.dtype)
        return hidden, None, None, None, *(s * scale.to(s.dtype) for s in sums)


def _nats_in_place(parts: list[Tensor], targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """-log p of each target, summed, and its gradients, in the memory of the logits themselves.

    Args:
        parts: the logits (N, n) in pieces, one behind the other; of 32 bits, they are overwritten.
        targets: (N,) of all columns.

    Returns:
        A scalar, float32, and a gradient for each part, in its type.
    """
    total = torch.zeros((), dtype=torch.float32, device=targets.device)
    gradients = [part.detach().float() for part in parts]
    # On a CPU a few positions at a time, which then stay in the cache's reach.
    few = POSITIONS if targets.device.type == "cpu" else len(targets)
    for begin in range(0, len(targets), few):
        here = [found[begin : begin + few] for found in gradients]
        most = torch.stack([part.amax(-1) for part in here]).amax(0)[:, None]
        wanted, own, column = targets[begin : begin + few], torch.zeros_like(most), 0
        places = []
        for part in here:
            part.sub_(most)
            rows = torch.nonzero((wanted >= column) & (wanted < column + part.shape[1]))[:, 0]
            places.append((rows, wanted[rows] - column))
            own[rows, 0] = part[places[-1]]
            column += part.shape[1]
        mass = sum(part.exp_().sum(-1, keepdim=True) for part in here)
        total += (mass.log() - own).sum()
        for part, place in zip(here, places, strict=True):
            part.div_(mass)
            part[place] -= 1.0
    return total, [found.to(part.dtype) for found, part in zip(gradients, parts, strict=True)]


def unwrapped(model: Any) -> Any:
    """The model inside of what makes several processes train it."""
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        return model.module
    return model


def can_chunk(model: Any, ids: Tensor) -> bool:
    """Whether its head's output, and what is known to come behind it, are a model's logits.

    Args:
        model: a causal language model.
        ids: (B, T) int64 of its vocabulary; a few are enough.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def head(module: Any, logits_of: _ToLogits, hidden: Tensor) -> Tensor:
        logits = logits_of(hidden)
        seen.append((hidden, logits))
        return logits

    few = ids[:1, :_PROBED]
    with torch.no_grad(), evaluating(model), replaced_head(model, head):
        logits = model(input_ids=few, use_cache=False).logits
    if len(seen) != 1 or seen[0][0].shape[:2] != few.shape:
        return False
    found = behind_head(model.config)(seen[0][1])
    return found.shape == logits.shape and bool(
        torch.allclose(found.float(), logits.float(), rtol=1e-5, atol=1e-6)
    )


def loss_at_head(
    model: Any, inputs: dict[str, Tensor], loss: Callable[[Any, _ToLogits, Tensor], Tensor]
) -> Tensor:
    """What `loss(head, its forward, hidden states)` gives where a model would compute logits.

    Args:
        model: perhaps wrapped; it is called as a whole.
        inputs: see `Objective.loss`.
        loss: returns a scalar.
    """
    found: list[Tensor] = []

    def head(module: Any, logits_of: _ToLogits, hidden: Tensor) -> Tensor:
        found.append(loss(module, logits_of, hidden))
        # No view: what cuts a model into shards warns of those.
        return found[0].reshape(1, 1, 1).repeat(*hidden.shape[:2], 1)

    with replaced_head(unwrapped(model), head):
        outputs = _logits(model, inputs)
    # Wrappers look for what needs a gradient in the outputs: the loss must reach it there too.
    return found[0] + 0.0 * outputs.sum()


@contextlib.contextmanager
def replaced_head(
    model: Any, forward: Callable[[Any, _ToLogits, Tensor], Tensor]
) -> Iterator[None]:
    """While it lasts, the head computes `forward(head, its own forward, hidden states)`."""
    head = model.get_output_embeddings()
    head.forward = partial(forward, head, head.forward)
    try:
        yield
    finally:
        del head.forward  # the one of the class comes back


def behind_head(config: Any) -> _ToLogits:
    """What a model does to the output of its head, by its config.

    `final_logit_softcapping` is Gemma's, `logit_scale` Cohere's, `logits_scaling` Granite's.
    """
    text = config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)
    times = getattr(text, "logit_scale", None) or 1.0
    over = getattr(text, "logits_scaling", None) or 1.0

    def behind(logits: Tensor) -> Tensor:
        logits = logits * times if times != 1 else logits
        logits = logits / over if over != 1 else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return behind


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
    ).logits
    return logits
