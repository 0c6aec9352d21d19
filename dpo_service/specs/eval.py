"""Evaluation on the validation split, and which checkpoints stay."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpo_service.specs.base import Spec
from dpo_service.specs.method import RowKind

Better = Literal["lower", "higher"]
LOSS = "eval_loss"
HELD_OUT = "valid/"
"""What the metrics of held-out prompts begin with, which the policy answers itself."""
REWARD = f"{HELD_OUT}reward"
_OF_KIND: dict[RowKind, dict[str, Better]] = {
    "pairs": {LOSS: "lower", "eval_rewards/accuracies": "higher", "eval_rewards/margins": "higher"},
    "answers": {LOSS: "lower", "eval_mean_token_accuracy": "higher"},
    "unpaired": {LOSS: "lower"},
    "prompts": {REWARD: "higher"},
    "demonstrations": {},
}


def ranking_metrics(rows: RowKind) -> dict[str, Better]:
    """The metrics of the validation split by which checkpoints can be ranked, the default first, and which way. Of
    demonstrations none: their answers are not judged."""
    return _OF_KIND[rows]


class EvalSpec(Spec):
    split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training file held out for validation when there is no validation file. Where answers are sampled,
    of its prompts: the policy answers them, and the judge scores that."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Evaluate every so many steps as well as at the end."""


class CheckpointSpec(Spec):
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Save every so many steps; None = about ten times a run. The last step is always saved."""
    keep_last: Annotated[int, Field(ge=1)] = 3
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Keep as many more, the best by `metric`; every checkpoint is then evaluated."""
    metric: str | None = None
    """One of the validation split's, as `eval_rewards/accuracies`; None = `eval_loss`, or where answers are sampled
    `valid/reward`."""
    publish: Literal["last", "best"] = "last"
    """Which checkpoint becomes the job's model when it has ended."""

    @model_validator(mode="after")
    def _best_is_kept(self) -> Self:
        for name, given in (("metric", self.metric is not None), ("publish best", self.publish == "best")):
            if given and self.keep_best == 0:
                raise ValueError(f"checkpoint.{name} needs the best checkpoints to be kept; set checkpoint.keep_best")
        return self


class BestSpec(Spec):
    """The `keep` best checkpoints stay."""

    keep: int
    metric: str
    better: Better
    publish: bool
    """The best of them becomes the job's model."""
