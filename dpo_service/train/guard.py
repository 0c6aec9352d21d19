"""What stops a run whose loss or gradient is not finite, before the optimizer moves a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpo_service.errors import NonFiniteLoss


class Guard:
    """Watches every step of `optimizer`.

    torch's fused optimizers skip a step on the device where `found_inf` says so; there the host looks (`check`) only
    when it waits for the device anyway, and from the first bad step on no weight moves. With others, and on the CPU,
    where looking costs nothing, it looks at every step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, *, wait: bool | None = None) -> None:
        """`wait`: look at every step; None = decided as above."""
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self._optimizer = optimizer
        self._wait = (device.type == "cpu" or not fused) if wait is None else wait
        self._first_4 = torch.zeros(4, dtype=torch.float64, device=device)
        """Of the first bad step: 1, its number, loss and gradient norm. Zeros = none yet."""

    def watch(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Between gradients and optimizer. `step` counts from 1; `loss` and `norm` are scalars over all ranks.

        Raises:
            NonFiniteLoss: as `check`, where the host looks at every step.
        """
        here = torch.full_like(loss, step, dtype=torch.float64)
        now_4 = torch.stack([torch.ones_like(here), here, loss.double(), norm.double()])
        first_bad = ~(loss.isfinite() & norm.isfinite()) & (self._first_4[0] == 0)
        self._first_4 = torch.where(first_bad, now_4, self._first_4)
        if self._wait:
            self.check()
        else:
            self._optimizer.found_inf = self._first_4[0].float()  # type: ignore[attr-defined]

    def check(self) -> None:
        """Raises NonFiniteLoss if a step was bad; the weights are as before it. Waits for the device."""
        bad, step, loss, norm = self._first_4.tolist()
        if not bad:
            return
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        raise NonFiniteLoss(
            f"step {step:.0f}: the {what} is {value}; the weights are as after step {step - 1:.0f}. "
            "Lower learning_rate, or train with precision float32"
        )
