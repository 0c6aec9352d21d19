"""/v1/models: what jobs made, the user's own directories, and what is deployed."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from dpo_service.api import usage
from dpo_service.api.deps import Services, ServicesDep
from dpo_service.api.problems import docs
from dpo_service.api.schemas.common import Deleted
from dpo_service.api.schemas.models import ModelList, ModelObject
from dpo_service.clock import unix
from dpo_service.errors import Conflict, NotFound
from dpo_service.registry import models
from dpo_service.registry.tables import PublishedModel

router = APIRouter(prefix="/v1/models", tags=["models"])
USER = "user"


@router.get("", responses=docs())
async def list_models(services: ServicesDep) -> ModelList:
    """Newest first: published models, directories under <data-dir>/models, and models deployed from elsewhere."""
    async with services.database.begin() as session:
        published = await models.list_published(session)
        deployed = await usage.deployments(session)
    found = {row.id: _published(row, deployed.get(row.id)) for row in published}
    for model in await _local(services, deployed):
        found.setdefault(model.id, model)
    for name, state in deployed.items():
        found.setdefault(name, ModelObject(id=name, created=0, owned_by=USER, deployment=state))
    return ModelList(data=sorted(found.values(), key=lambda model: (model.created, model.id), reverse=True))


@router.get("/{model_id:path}", responses=docs(404))
async def retrieve_model(model_id: str, services: ServicesDep) -> ModelObject:
    async with services.database.begin() as session:
        row = await session.get(PublishedModel, model_id)
        deployed = await usage.deployments(session)
    if row is not None:
        return _published(row, deployed.get(model_id))
    for model in await _local(services, deployed):
        if model.id == model_id:
            return model
    if model_id in deployed:
        return ModelObject(id=model_id, created=0, owned_by=USER, deployment=deployed[model_id])
    raise _unknown(model_id)


@router.delete("/{model_id:path}", responses=docs(404, 409))
async def delete_model(model_id: str, services: ServicesDep) -> Deleted:
    """Forget a published model; its checkpoint's files stay with its job. The user's directories are never deleted."""
    local = await asyncio.to_thread(models.local_models, services.store)
    async with services.database.begin() as session:
        if model_id in local and await session.get(PublishedModel, model_id) is None:
            raise Conflict(f"model {model_id!r} is your own directory {local[model_id]}; remove it there")
        row = await session.get(PublishedModel, model_id)
        if row is None:
            raise _unknown(model_id)
        if model_id in await usage.deployments(session):
            raise Conflict(f"model {model_id!r} is deployed; DELETE /v1/deployments/{model_id} first")
        users = await usage.jobs_using_model(session, model_id)
        if users:
            raise Conflict(f"model {model_id!r} is the base of {', '.join(users)}; cancel that job, or let it end")
        await models.delete(session, model_id)
    return Deleted(id=model_id, object="model")


def _published(row: PublishedModel, deployment: str | None) -> ModelObject:
    return ModelObject(
        id=row.id,
        created=unix(row.created_at),
        owned_by=row.owned_by,
        base=row.base,
        job_id=row.job_id,
        step=row.step,
        digest=row.digest,
        deployment=deployment,
    )


async def _local(services: Services, deployed: dict[str, str]) -> list[ModelObject]:
    def look() -> list[ModelObject]:
        return [
            ModelObject(
                id=name,
                created=int((directory / "config.json").stat().st_mtime),
                owned_by=USER,
                deployment=deployed.get(name),
            )
            for name, directory in models.local_models(services.store).items()
        ]

    return await asyncio.to_thread(look)


def _unknown(model_id: str) -> NotFound:
    return NotFound(f"there is no model {model_id!r}; see GET /v1/models", param="model", code="model_not_found")
