"""AdamW and its schedule, as transformers' Trainer builds them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpo_service.specs.optim import LrSchedule, OptimSpec
from dpo_service.train.optimizers import CompactAdamW, OffloadedAdamW
from dpo_service.train.ranks import share_of, whole

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_optimizer(model: nn.Module, spec: OptimSpec, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW over what is trained; biases and norms are not decayed. `seed` is that of rounding, where there is any.

    It is torch's fused one: one pass over memory where the other makes a dozen (on the CPU 5 times as fast), and on a
    GPU it can skip a step without asking the host. Those that take less memory are in `optimizers.py`.
    """
    groups = _groups(model, spec.weight_decay)
    parameters = [parameter for group in groups for parameter in group["params"]]
    numbers: dict[str, Any] = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.eps}
    if spec.optimizer == "adamw_offload":
        return OffloadedAdamW(groups, **numbers)
    if spec.optimizer == "adamw_8bit" or any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return CompactAdamW(groups, eight_bit=spec.optimizer == "adamw_8bit", seed=seed, **numbers)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(groups, **numbers, fused=fused or None)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is decayed, then what is not."""
    in_norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in trained_parameters(model).items():
        spared = name in in_norms or _NO_DECAY.search(name.lower())
        (free if spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_steps(spec: OptimSpec, total_steps: int) -> int:
    return math.ceil(total_steps * spec.warmup_ratio)


def learning_rate(spec: OptimSpec, step: int, total_steps: int) -> float:
    """The learning rate of the step numbered `step` from 0. A function, so there is no schedule state to lose."""
    return spec.learning_rate * _factor(spec.lr_schedule, step, warmup_steps(spec, total_steps), total_steps)


def _factor(schedule: LrSchedule, step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / max(1, warmup)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their global norm is at most `max_norm`; returns the norm before, a scalar."""
    trained = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    norm = whole(norm)
    nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `{name}|exp_avg`, `{name}|exp_avg_sq`, `{name}|step`,
    and what else an optimizer keeps."""
    return {
        f"{name}|{slot}": value
        for name, parameter in trained_parameters(model).items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Put back what `optimizer_tensors` gave, where the parameters lie, or where the optimizer keeps its state (step
    counts on the CPU, unless it is fused)."""
    parameters = trained_parameters(model)
    fused = all(group.get("fused") for group in optimizer.param_groups)
    for key, value in tensors:
        name, slot = key.rsplit("|", 1)
        parameter = parameters[name]
        if slot == "step" and not fused:
            optimizer.state[parameter][slot] = value.clone()
        elif hasattr(optimizer, "home"):
            optimizer.state[parameter][slot] = value.to(optimizer.home, copy=True)
        else:
            optimizer.state[parameter][slot] = share_of(value, parameter)
