"""What all specs share: frozen, and an unknown field is an error."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict

AUTO: Literal["auto"] = "auto"
T = TypeVar("T")
Auto: TypeAlias = T | Literal["auto"]
"""A value, or `"auto"`: the service decides when the job is accepted, and the job then shows what it decided."""


class Spec(BaseModel):
    """Says what was asked for. Immutable; a misspelt option is refused, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def chosen_or(value: Auto[T], default: T) -> T:
    """`value`, or `default` where the user left it to us."""
    return default if value == AUTO else value
