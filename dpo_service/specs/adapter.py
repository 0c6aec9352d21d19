"""Low-rank adapters (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dpo_service.specs.base import Spec


class LoraSpec(Spec):
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter; None = every linear layer but the output head."""
