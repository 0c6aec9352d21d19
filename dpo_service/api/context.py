"""Around every request: an id, a line in the metrics, and an answer even when the code fails.

Outermost of our middleware, so `x-request-id` is on every response and an unforeseen exception is a 500 in the one
shape of errors, with the id under which the log tells the rest.
"""

from __future__ import annotations

import logging
import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpo_service.api.problems import respond
from dpo_service.ids import random_suffix

log = logging.getLogger(__name__)


class RequestMetrics:
    """Counts and times by route template, never by path: ids would make a series each."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "route", "status")
        self.requests = Counter("dpo_http_requests_total", "Requests answered", labels, registry=registry)
        self.seconds = Histogram("dpo_http_request_seconds", "Time to the answer's end", labels[:2], registry=registry)

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.requests.labels(scope["method"], route, status).inc()
        self.seconds.labels(scope["method"], route).observe(seconds)


class RequestContext:
    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{random_suffix(24)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status, started = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499  # nobody is left to answer; what the request had begun was undone on the way out
        except Exception:
            log.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            if status:
                raise
            text = f"the service failed; its log tells more under request id {request_id}"
            await respond(500, text, code="internal_error")(scope, receive, send_with_id)
        finally:
            self._metrics.observe(scope, status, time.perf_counter() - started)
