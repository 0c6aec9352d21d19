"""Low-rank adapters: LoRA (arXiv:2106.09685), DoRA (2402.09353), and QLoRA (2305.14314)."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpo_service.specs.base import Spec

CHOOSES = re.compile(r"(^|[._])(router|gate|coefs)$|(^|\.)indexer\.")
"""Path of a layer that weighs or chooses (of sparse attention: the keys), and gets no adapter by default."""


class LoraSpec(Spec):
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter; None = every linear layer but the output head."""
    dora: bool = False
    """Train the length of each row of a weight too, apart from its direction."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: the frozen base in 4 bits (QLoRA), on a GPU with bitsandbytes."""

    @model_validator(mode="after")
    def _dora_drops_nothing(self) -> Self:
        if self.dora and self.dropout > 0:
            raise ValueError("dora takes no dropout: its lengths are those of whole weights; set dropout to 0")
        return self
