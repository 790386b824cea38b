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

from lexigraft.errors import RefusalError
from lexigraft.models.shards import local, whole


class RowAdamW(torch.optim.AdamW):  # type: ignore[misc]
    """AdamW; groups with `shared` hold matrices whose rows share one second moment.

    `shared` is the shape of each of them, (N, D), and the state `exp_avg` (N, D) and `exp_avg_sq`
    (D,). Such groups have no weight decay. A matrix may be a DTensor, or, if it is alone in its
    group, flat and cut into equal parts, one for each process in order, the last one padded with
    what has no gradient (as DeepSpeed's ZeRO does).
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
        count, width = group["shared"]
        columns = _columns(rows, count, width)
        squares = _column_sums(rows.grad.square(), columns, width) / count
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(rows)
            state["exp_avg_sq"] = torch.zeros_like(squares)
        first, second = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(rows.grad, 1 - first)
        state["exp_avg_sq"].lerp_(squares, 1 - second)
        steps = float(state["step"])
        size = (state["exp_avg_sq"] / (1 - second**steps)).sqrt_().add_(group["eps"])
        moved = local(state["exp_avg"]) / (size if columns is None else size[columns])
        local(rows).sub_(moved, alpha=float(group["lr"]) / (1 - first**steps))


def _columns(rows: Tensor, count: int, width: int) -> Tensor | None:
    """Of each number of this process's part of a flat matrix its column; None of a matrix."""
    if rows.ndim > 1:
        return None
    processes = torch.distributed.get_world_size()
    if not 0 <= len(rows) * processes - count * width < 2 * processes:
        raise RefusalError(
            f"parts of {len(rows):,} of {count:,} x {width:,} numbers in {processes} processes",
            needed="new rows that are cut into equal parts, one for each process (ZeRO-2 or 3)",
            fix="leave MiCS and other groups of processes out of DeepSpeed's configuration",
        )
    begin = torch.distributed.get_rank() * len(rows)
    return torch.arange(begin, begin + len(rows), device=rows.device) % width


def _column_sums(values: Tensor, columns: Tensor | None, width: int) -> Tensor:
    """(N, D) or a part of it -> (D,), the same in every process that holds some of the rows."""
    if columns is None:
        return whole(values.sum(0))
    total = values.new_zeros(width).index_add_(0, columns, values)
    torch.distributed.all_reduce(total)
    return total
