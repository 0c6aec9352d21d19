"""Deployments on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from dpo_service.api.schemas.common import Wire
from dpo_service.clock import unix
from dpo_service.deployments.tables import Deployment
from dpo_service.specs.base import Spec
from dpo_service.specs.serve import EngineRequest


class CreateDeployment(Spec):
    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    """As for a job: a published id, a directory under <data-dir>/models, a path in an allowed root, a hub id."""
    engine: EngineRequest = Field(default_factory=EngineRequest)


class DeploymentObject(Wire):
    id: str
    object: Literal["deployment"] = "deployment"
    model: str
    """The name to give in `model` when chatting."""
    status: str
    """pending | starting | running | failed | deleting"""
    message: str
    """What is going on, or why it failed."""
    checkpoint: str | None
    """Digest of a published model; answers name theirs in the header x-dpo-checkpoint in any case."""
    engine: dict[str, Any]
    created_at: int
    updated_at: int


class DeploymentList(Wire):
    object: Literal["list"] = "list"
    data: list[DeploymentObject]
    has_more: bool = False


def on_the_wire(row: Deployment) -> DeploymentObject:
    return DeploymentObject(
        id=row.id,
        model=row.model,
        status=row.state,
        message=row.message,
        checkpoint=row.digest,
        engine=row.engine,
        created_at=unix(row.created_at),
        updated_at=unix(row.updated_at),
    )
