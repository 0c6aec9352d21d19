"""A reference that follows the policy (TR-DPO, arXiv:2404.09656).

    theta_ref <- alpha * theta + (1 - alpha) * theta_ref      every `every_steps` steps; alpha 1 is the hard update

With LoRA, theta is the adapter: a copy of its weights takes the place of the trained ones while the reference computes,
over the base that both share. A fresh adapter adds nothing, so the reference begins as the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_service.specs.method import RefreshSpec
from dpo_service.train.batch import MicroBatch
from dpo_service.train.optim import trained_parameters
from dpo_service.train.policy import base_of, load_model
from dpo_service.train.reference import LiveReference, ReferenceLogps


class MovingReference:
    """A live reference with weights of its own, by their names in the policy."""

    def __init__(
        self, policy: Any, model_dir: Path, refresh: RefreshSpec, precision: str, ld_alpha: float = 1.0
    ) -> None:
        self._policy, self._spec = policy, refresh
        parameters = trained_parameters(policy)
        if base_of(policy) is policy:
            device = next(iter(parameters.values())).device
            model = load_model(model_dir, device, precision).requires_grad_(False)
            own: dict[str, Tensor] = dict(model.named_parameters())
            self.weights = {name: own[name] for name in parameters}
            self._live = LiveReference(model, precision, ld_alpha)
        else:
            self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            self._live = LiveReference(policy, precision, ld_alpha, within=partial(_wearing, policy, self.weights))

    def __call__(self, batch: MicroBatch) -> ReferenceLogps:
        return self._live(batch)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Follow the policy if it is time; `step` counts from 1."""
        if step % self._spec.every_steps == 0:
            for name, parameter in trained_parameters(self._policy).items():
                self.weights[name].lerp_(parameter.to(self.weights[name].dtype), self._spec.alpha)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(weights[name])


@contextmanager
def _wearing(policy: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the policy computes with `weights` and without dropout. To be left before a backward pass."""
    parameters = trained_parameters(policy)
    own = {name: parameter.data for name, parameter in parameters.items()}
    dropping = [module for module in policy.modules() if isinstance(module, nn.Dropout) and module.training]
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        for module in dropping:
            module.eval()
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
        for module in dropping:
            module.train()
