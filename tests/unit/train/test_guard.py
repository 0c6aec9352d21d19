"""A loss or gradient that is not finite stops a run, and no weight has moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpo_service.errors import NonFiniteLoss
from dpo_service.specs.optim import OptimSpec
from dpo_service.train.guard import Guard
from dpo_service.train.optim import build_optimizer

CPU = torch.device("cpu")
GOOD = torch.tensor(0.5)


def one_step(guard, net, optimizer, step, loss=GOOD, norm=GOOD):
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    guard.watch(step, loss, norm)
    optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient norm"])
@pytest.mark.parametrize("wait", [True, False])
def test_names_the_first_bad_step_and_moves_nothing_after_it(wait, what, value):
    """Without waiting the optimizer is what skips, as on a GPU: also the good step after the bad one."""
    net = nn.Linear(3, 3)
    optimizer = build_optimizer(net, OptimSpec(learning_rate=1e-2))
    guard = Guard(optimizer, CPU, wait=wait)
    one_step(guard, net, optimizer, 1)
    guard.check()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    bad = {"loss" if what == "loss" else "norm": torch.tensor(value)}
    with pytest.raises(NonFiniteLoss, match=rf"step 2: the {what} is {value}; the weights are as after step 1"):
        one_step(guard, net, optimizer, 2, **bad)
        one_step(guard, net, optimizer, 3)
        guard.check()
    assert all(torch.equal(now, then) for now, then in zip(net.parameters(), before, strict=True))
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


def test_on_the_cpu_it_looks_at_every_step():
    net = nn.Linear(3, 3)
    with pytest.raises(NonFiniteLoss):
        Guard(build_optimizer(net, OptimSpec(learning_rate=1e-2)), CPU).watch(1, GOOD, torch.tensor(float("nan")))
