"""The optimizer and its schedule, every number decided."""

from __future__ import annotations

from typing import Literal

from dpo_service.specs.base import Spec

OptimizerName = Literal["adamw", "adamw_8bit", "adamw_offload"]
LrSchedule = Literal["linear", "cosine", "constant"]


class OptimSpec(Spec):
    """AdamW. The learning rate rises linearly over `warmup_ratio` of the steps, then follows `lr_schedule` to zero."""

    optimizer: OptimizerName = "adamw"
    """`adamw_8bit` keeps the moments in 8 bits, `adamw_offload` in the host's memory and moves the weights there."""
    learning_rate: float
    lr_schedule: LrSchedule = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
