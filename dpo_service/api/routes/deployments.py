"""/v1/deployments: which models are served. Every answer comes at once; `status` tells how far the cluster has got."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from dpo_service.api.deps import ServicesDep
from dpo_service.api.problems import docs
from dpo_service.api.schemas.common import After, Deleted
from dpo_service.api.schemas.deployments import CreateDeployment, DeploymentList, DeploymentObject, on_the_wire
from dpo_service.deployments import repository, service

router = APIRouter(prefix="/v1/deployments", tags=["deployments"])


@router.post("", status_code=201, responses={200: {"model": DeploymentObject}, **docs(409, 503)})
async def create_deployment(body: CreateDeployment, services: ServicesDep, response: Response) -> DeploymentObject:
    """Serve a model: 201 when it is new, 200 with the same deployment when it is served already."""
    row, created = await service.create(
        body.model,
        body.engine,
        database=services.database,
        store=services.store,
        settings=services.settings,
        cluster=services.cluster,
        clock=services.clock,
    )
    if created:
        services.on_change()
    else:
        response.status_code = 200
    return on_the_wire(row)


@router.get("", responses=docs())
async def list_deployments(
    services: ServicesDep, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> DeploymentList:
    """Newest first."""
    async with services.database.begin() as session:
        rows, more = await repository.page(session, after, limit)
    return DeploymentList(data=[on_the_wire(row) for row in rows], has_more=more)


@router.get("/{deployment_id:path}", responses=docs(404))
async def retrieve_deployment(deployment_id: str, services: ServicesDep) -> DeploymentObject:
    """By its id, or by the name of its model."""
    async with services.database.begin() as session:
        return on_the_wire(await repository.get(session, deployment_id))


@router.delete("/{deployment_id:path}", responses=docs(404))
async def delete_deployment(deployment_id: str, services: ServicesDep) -> Deleted:
    """Stop serving a model, named by the deployment's id or the model's name. The model itself stays."""
    row = await service.delete(deployment_id, database=services.database, clock=services.clock)
    services.on_change()
    return Deleted(id=row.id, object="deployment")
