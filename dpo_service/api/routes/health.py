"""Is it alive, can it work, what does it do: /livez touches nothing, /readyz touches every part, /metrics counts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from dpo_service.api.deps import Services, ServicesDep
from dpo_service.api.schemas.common import Wire
from dpo_service.errors import DpoServiceError
from dpo_service.jobs import repository
from dpo_service.storage.store import Store

router = APIRouter(tags=["health"])
CHECK_TIMEOUT_S = 5.0
PROBE_BYTES = 4096


class Alive(Wire):
    status: str = "ok"


class Readiness(Wire):
    """`parts`: each part's answer, "ok" or what is wrong."""

    status: str
    parts: dict[str, str]


class MetricsRegistry:
    """What this application counts; one an application, so that two in a process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.jobs = Gauge("dpo_jobs", "Jobs by state", ("state",), registry=self.registry)


def metrics_registry(request: Request) -> MetricsRegistry:
    found = request.app.state.metrics
    assert isinstance(found, MetricsRegistry)
    return found


@router.get("/livez")
async def livez() -> Alive:
    return Alive()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "A part does not answer"}})
async def readyz(services: ServicesDep, response: Response) -> Readiness:
    """503 unless database, storage and cluster answer."""
    names = ("database", "storage", "cluster")
    answers = await asyncio.gather(
        _answer(services.database.ping()),
        _answer(asyncio.to_thread(_probe_storage, services.store)),
        _answer(services.cluster.capacity()),
    )
    ready = all(answer == "ok" for answer in answers)
    if not ready:
        response.status_code = 503
        response.headers["retry-after"] = "5"
    return Readiness(status="ready" if ready else "not ready", parts=dict(zip(names, answers, strict=True)))


@router.get("/metrics", response_class=Response, responses={401: {"description": "No valid API key"}})
async def metrics(services: ServicesDep, found: Annotated[MetricsRegistry, Depends(metrics_registry)]) -> Response:
    """In Prometheus' text format."""
    await _count_jobs(services, found)
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)


async def _count_jobs(services: Services, found: MetricsRegistry) -> None:
    async with services.database.begin() as session:
        counts = await repository.count_by_state(session)
    for state, count in counts.items():
        found.jobs.labels(state.value).set(count)


async def _answer(check: Awaitable[Any]) -> str:
    """ "ok", or what is wrong, within the time a probe may take."""
    try:
        await asyncio.wait_for(check, CHECK_TIMEOUT_S)
    except TimeoutError:
        return f"no answer in {CHECK_TIMEOUT_S:.0f} s"
    except Exception as error:
        # Whoever probes need not have a key: our own sentences are for users, foreign ones may name hosts and paths.
        return error.message if isinstance(error, DpoServiceError) else type(error).__name__
    return "ok"


def _probe_storage(store: Store) -> None:
    store.require_room(PROBE_BYTES)
    store.write(".probe", b"\0" * PROBE_BYTES)
    store.delete(".probe")
