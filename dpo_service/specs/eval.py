"""Evaluation on the validation split."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dpo_service.specs.base import Spec


class EvalSpec(Spec):
    split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training file held out for validation when there is no validation file."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Evaluate every so many steps as well as at the end."""


class CheckpointSpec(Spec):
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Save every so many steps; None = about ten times a run. The last step is always saved."""
    keep_last: Annotated[int, Field(ge=1)] = 3
