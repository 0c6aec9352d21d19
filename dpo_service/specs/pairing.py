"""Which answers of a judged prompt become a pair."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpo_service.specs.base import Spec


class LengthControl(Spec):
    """Keeps a pair from teaching that longer is better; lengths are those in tokens."""

    penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off a score for every token of the answer, before anything is chosen."""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Answers whose scores are as near to the best (or the worst) are as good (or bad): of these, the two whose lengths
    are nearest to each other become the pair."""

    @model_validator(mode="after")
    def _controls_something(self) -> Self:
        if self.penalty == 0 and self.tolerance == 0:
            raise ValueError("length control without penalty and tolerance changes nothing; set one, or leave it out")
        return self


class PairingSpec(Spec):
    choose: Literal["best_worst", "all_pairs", "best_random"] = "best_worst"
    """The best against the worst; every two whose scores differ enough; the best against a random lesser one."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """The scores of a pair differ by more than this."""
    length: LengthControl | None = None
    cut_off: Literal["rejected_only", "any", "dropped"] = "rejected_only"
    """Where an answer that was cut off can stand: a chosen one would teach to never end."""

    @model_validator(mode="after")
    def _tolerance_has_a_use(self) -> Self:
        if self.length is not None and self.length.tolerance and self.choose != "best_worst":
            raise ValueError(f"length.tolerance is for best_worst; {self.choose} takes length.penalty only")
        return self
