"""What all wire models share. They are the contract with clients, and never rows of a table."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    """An object on the wire. Extra fields are a mistake of ours."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Deleted(Wire):
    id: str
    object: str
    deleted: Literal[True] = True


After = Annotated[str | None, Query(max_length=256, description="The id of the last entry you have")]
