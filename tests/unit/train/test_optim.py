"""AdamW, schedules and clipping equal transformers' and torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpo_service.specs.optim import OptimSpec
from dpo_service.train.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    warmup_steps,
)
from dpo_service.train.policy import load_model


@pytest.mark.parametrize("total", [1, 7, 20])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_schedule_equals_transformers(schedule, theirs, ratio, total):
    from transformers import get_scheduler

    spec = OptimSpec(learning_rate=0.5, lr_schedule=schedule, warmup_ratio=ratio)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(theirs, optimizer, warmup_steps(spec, total), total)
    for step in range(total):
        assert learning_rate(spec, step, total) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_decay_spares_what_transformers_spares(model_dir):
    from transformers import Trainer

    model = load_model(model_dir)
    decayed = Trainer.get_decay_parameter_names(None, model)
    groups = build_optimizer(model, OptimSpec(learning_rate=1e-3, weight_decay=0.1)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[parameter] for parameter in groups[0]["params"]} == set(decayed) & set(names.values())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(names)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.odd = nn.LayerNorm(3)


def test_layer_norms_are_spared_by_type():
    groups = build_optimizer(Net(), OptimSpec(learning_rate=1e-3, weight_decay=0.1)).param_groups
    assert [len(group["params"]) for group in groups] == [1, 3]


def test_clipping_equals_torch():
    ours, theirs = Net(), Net()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    norm = clip_gradients(ours.parameters(), 0.5)
    assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_optimizer_state_goes_to_tensors_and_back():
    net = Net()
    optimizer = build_optimizer(net, OptimSpec(learning_rate=1e-2))
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = optimizer_tensors(optimizer, net)
    again = build_optimizer(net, OptimSpec(learning_rate=1e-2))
    load_optimizer_tensors(again, net, tensors.items())
    for parameter in net.parameters():
        assert all(
            torch.equal(again.state[parameter][slot], value) for slot, value in optimizer.state[parameter].items()
        )
