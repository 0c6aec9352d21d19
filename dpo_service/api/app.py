"""The application: routes, and what is around every request. Made by a function; nothing here is global.

request ──> context (id, metrics, last resort) ──> authentication ──> body limit ──> routes
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from dpo_service.api import problems
from dpo_service.api.auth import Authentication
from dpo_service.api.context import RequestContext, RequestMetrics
from dpo_service.api.deps import Services
from dpo_service.api.limits import BodyLimit
from dpo_service.api.routes import chat, deployments, files, health, internal, jobs, models, uploads
from dpo_service.clock import Clock, SystemClock
from dpo_service.cluster.port import Cluster
from dpo_service.db.session import Database
from dpo_service.settings import Settings
from dpo_service.storage.store import Store

USER_ROUTERS = (files.router, uploads.router, jobs.router, models.router, deployments.router, chat.router)


def create_app(
    settings: Settings,
    database: Database,
    store: Store,
    cluster: Cluster,
    *,
    on_change: Callable[[], None] | None = None,
    clock: Clock | None = None,
) -> FastAPI:
    """The API over these parts. It starts and ends none of them; `on_change` wakes the reconcilers."""
    app = FastAPI(
        title="dpo_service",
        version=version("dpo-service"),
        description="Preference training as a service: the OpenAI fine-tuning API, with extensions.",
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.services = Services(
        settings, database, store, cluster, clock or SystemClock(), on_change or (lambda: None)
    )
    app.state.metrics = health.MetricsRegistry()
    problems.install(app)
    app.include_router(health.router)
    app.include_router(internal.router)
    # Says in OpenAPI what Authentication does.
    key = HTTPBearer(auto_error=False, scheme_name="api_key", description="A key of DPO_API_KEYS")
    for router in USER_ROUTERS:
        app.include_router(router, dependencies=[Security(key)])
    # The last one added is the outermost.
    app.add_middleware(BodyLimit)
    app.add_middleware(Authentication, settings=settings)
    app.add_middleware(RequestContext, metrics=RequestMetrics(app.state.metrics.registry))
    return app
