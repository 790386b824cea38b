"""The optimizer of training: AdamW, in which the new rows of a matrix share their second moment.

Adam divides each number's gradient by its own usual size (Kingma & Ba 2014, arXiv 1412.6980). A
row of a rare token has a gradient in few steps, so that its usual size is small and the few steps
are large: a token seen five times moves per occurrence some ten times as far as one seen in every
step, by what is mostly noise. With one second moment per column, the mean over the rows, an
occurrence counts the same for every token. One moment for many parameters is the idea of Adam-mini
(Zhang et al. 2024, arXiv 2406.16793), which keeps rows of embeddings apart, though; shared by
column as in Adafactor's factors (Shazeer & Stern 2018, arXiv 1804.04235), without the rows' factor.
What it gave: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RowAdamW(torch.optim.AdamW):  # type: ignore[misc]
    """AdamW; groups with `shared=True` hold matrices whose rows share one second moment.

    Of such a parameter (N, D) the state is `exp_avg` (N, D) and `exp_avg_sq` (D,). Such groups
    have no weight decay.
    """

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of all groups; see `torch.optim.Optimizer.step`."""
        gradients = {}
        for group in self.param_groups:
            if not group.get("shared"):
                continue
            for rows in group["params"]:
                if rows.grad is not None:
                    self._move(rows, group)
                    gradients[rows] = rows.grad
                    rows.grad = None  # what AdamW itself does not see, it leaves alone
        result = super().step(closure)
        for rows, gradient in gradients.items():
            rows.grad = gradient
        return result

    def _move(self, rows: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[rows]
        squares = _column_means(rows.grad.square())
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(rows)
            state["exp_avg_sq"] = torch.zeros_like(squares)
        first, second = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(rows.grad, 1 - first)
        state["exp_avg_sq"].lerp_(squares, 1 - second)
        count = float(state["step"])
        size = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
        moved = _local(state["exp_avg"]) / size
        _local(rows).sub_(moved, alpha=float(group["lr"]) / (1 - first**count))


def _column_means(values: Tensor) -> Tensor:
    """(N, D) -> (D,), the same in every process that holds some of the rows."""
    total = values.sum(0)
    return (total.full_tensor() if hasattr(total, "full_tensor") else total) / len(values)


def _local(values: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded."""
    part: Tensor = values.to_local() if hasattr(values, "to_local") else values
    return part
