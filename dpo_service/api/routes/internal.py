"""Where running jobs report. Not for users: every attempt has its own token, which admits its reports only."""

from __future__ import annotations

from fastapi import APIRouter, Request

from dpo_service.api.auth import bearer
from dpo_service.api.deps import ServicesDep
from dpo_service.api.problems import docs
from dpo_service.api.schemas.common import Wire
from dpo_service.jobs import repository
from dpo_service.reports import Report

router = APIRouter(prefix="/internal", tags=["internal"])


class Ingested(Wire):
    new: int
    """How many of the reports were not known yet."""


@router.post("/attempts/{submission_id}/reports", responses=docs(404, 409))
async def post_reports(submission_id: str, reports: list[Report], request: Request, services: ServicesDep) -> Ingested:
    """Each report counts once, however often it is sent. 409: a newer attempt has taken this one's place."""
    token = bearer(request.headers)
    async with services.database.begin() as session:
        await repository.authenticate(session, submission_id, token)
        new = await repository.ingest(session, submission_id, reports)
    return Ingested(new=new)
