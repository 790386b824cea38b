"""What training minimises: a function of the model and a batch, in nats."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lexigraft.models.bits import nats


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
    """-log p of each next token: ordinary continued pretraining."""

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
        """See `Objective.loss`."""
        targets = inputs["labels"].flatten()
        logits = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        ).logits
        return nats(logits.flatten(0, 1), targets).sum(), int(torch.count_nonzero(targets >= 0))
