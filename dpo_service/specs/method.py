"""A method is one choice on each of three independent axes: pair source x loss x reference.

`METHODS` is that table as data. What a user writes (`method: {type: dpo, dpo: {hyperparameters: ...}}`) names a row;
what the training step gets is a `LossSpec` and a `ReferenceSpec`, and never the name of the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpo_service.specs.base import AUTO, Auto, Spec

RowKind = Literal["pairs", "answers"]
"""What a training file must hold: preference pairs, or prompts with one answer each."""


@dataclass(frozen=True)
class MethodRow:
    """One row of the table of methods."""

    pairs: Literal["dataset"]
    rows: RowKind
    loss: str
    reference: Literal["initial", "none"]
    paper: str
    learning_rate: float
    """Default peak learning rate; a `learning_rate_multiplier` multiplies it."""


METHODS: dict[str, MethodRow] = {
    "dpo": MethodRow("dataset", "pairs", "sigmoid", "initial", "arXiv:2305.18290", 5e-6),
    "supervised": MethodRow("dataset", "answers", "sft", "none", "next-token cross-entropy", 2e-5),
}


class SupervisedHyperparameters(Spec):
    batch_size: Auto[Annotated[int, Field(ge=1, le=256)]] = AUTO
    """Rows a step, over all workers."""
    learning_rate_multiplier: Auto[Annotated[float, Field(gt=0)]] = AUTO
    n_epochs: Auto[Annotated[int, Field(ge=1, le=50)]] = AUTO


class DpoHyperparameters(SupervisedHyperparameters):
    beta: Auto[Annotated[float, Field(gt=0, le=2)]] = AUTO
    """Strength of the pull towards the reference (arXiv:2305.18290, eq. 7)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped labels (conservative DPO)."""


class DpoMethod(Spec):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class SupervisedMethod(Spec):
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class MethodSpec(Spec):
    """The method as the user names it. The block under the method's own name holds its hyperparameters."""

    type: Literal["dpo", "supervised"]
    dpo: DpoMethod | None = None
    supervised: SupervisedMethod | None = None

    @model_validator(mode="after")
    def _block_matches_type(self) -> Self:
        stray = [name for name in METHODS if name != self.type and getattr(self, name) is not None]
        if stray:
            raise ValueError(f"method.{stray[0]} is set but method.type is {self.type!r}; remove one of the two")
        return self

    @property
    def row(self) -> MethodRow:
        return METHODS[self.type]

    @property
    def hyperparameters(self) -> SupervisedHyperparameters:
        """The hyperparameters of the named method (a `DpoHyperparameters` for the paired ones)."""
        block = getattr(self, self.type)
        defaults = DpoMethod() if self.type == "dpo" else SupervisedMethod()
        return (block or defaults).hyperparameters


class LossSpec(Spec):
    """The loss, every number decided."""

    name: Literal["sigmoid", "sft"]
    beta: float = 0.1
    label_smoothing: float = 0.0


class ReferenceSpec(Spec):
    """Which policy the loss measures against, and how its log-probabilities are had.

    `cached` computes them once, before training, as part of the dataset; `live` keeps a frozen copy beside the policy;
    `none` is for losses without a reference. `model` is always the initial policy: pinned by `digest` at the start.
    """

    mode: Literal["cached", "live", "none"]
