"""New rows share their second moment: `pytest tests/test_row_optimizer.py`."""

from __future__ import annotations

import copy

import pytest
import torch

from lexigraft.models.row_optimizer import RowAdamW

RATE, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8


def setup(rows=5, width=3):
    torch.manual_seed(0)
    new, body = torch.nn.Parameter(torch.randn(rows, width)), torch.nn.Parameter(torch.randn(4, 2))
    optimizer = RowAdamW(
        [{"params": [new], "lr": RATE, "shared": (rows, width)}, {"params": [body], "weight_decay": 0.1}],
        lr=RATE, weight_decay=0.0,
    )  # fmt: skip
    return new, body, optimizer


def gradients(step, new, body):
    torch.manual_seed(step)
    new.grad, body.grad = torch.randn_like(new), torch.randn_like(body)
    new.grad[1] *= 0.0 if step else 1.0  # a rare token, seen in the first step only
    new.grad[4] = 0.0  # one that is never seen


def test_rows_move_by_their_own_mean_and_the_size_that_all_rows_have():
    new, body, optimizer = setup()
    before, other = new.detach().clone(), body.detach().clone().requires_grad_()
    plain = torch.optim.AdamW([other], lr=RATE, weight_decay=0.1)
    wanted, mean, square = before.clone(), torch.zeros_like(before), torch.zeros(before.shape[1])
    for step in range(6):
        gradients(step, new, body)
        other.grad = body.grad.clone()
        gradient = new.grad.clone()
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * (gradient**2).mean(0)
        size = (square / (1 - BETAS[1] ** (step + 1))).sqrt() + EPS
        wanted -= RATE * mean / (1 - BETAS[0] ** (step + 1)) / size
        optimizer.step()
        plain.step()
        assert torch.equal(new.grad, gradient)  # for whoever looks at it afterwards
    torch.testing.assert_close(new.detach(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(body, other)  # every other group is AdamW's
    assert torch.equal(new[4], before[4])
    assert optimizer.state[new]["exp_avg_sq"].shape == (before.shape[1],)


@pytest.mark.parametrize("steps", [1, 4])
def test_what_was_saved_goes_on_to_the_same_bits(steps):
    new, body, optimizer = setup()
    for step in range(steps):
        gradients(step, new, body)
        optimizer.step()
    again, again_body, resumed = setup()
    with torch.no_grad():
        again.copy_(new)
        again_body.copy_(body)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(steps, steps + 3):
        for a, b, c in ((new, body, optimizer), (again, again_body, resumed)):
            gradients(step, a, b)
            c.step()
    assert torch.equal(new, again) and torch.equal(body, again_body)
