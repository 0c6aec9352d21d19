"""/v1/chat/completions and /v1/completions: passed on, as they are, to the replica that serves the model.

    client ── body ──> [deployment by body.model] ── the same bytes ──> vLLM's own route ──> stream of bytes back

Nothing is buffered on the way back; a client that goes away closes the connection to the replica, which then stops
generating. Errors of whoever answers there (vLLM, Ray Serve, nobody) come out in the one shape of errors.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import orjson
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect

from dpo_service.api.deps import Services, ServicesDep
from dpo_service.api.problems import docs, from_error, respond
from dpo_service.deployments import repository
from dpo_service.deployments.tables import Deployment, DeploymentState
from dpo_service.errors import NotFound, Unavailable, UserError

# Generation may take minutes, and between two chunks too; only connecting has to be quick.
TIMEOUT = httpx.Timeout(None, connect=5.0)
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64)
RETRY_AFTER_S = 5
PASSED_BACK = ("content-type", "x-dpo-checkpoint", "x-dpo-deployment", "retry-after")


@contextlib.asynccontextmanager
async def _closing_the_client(app: FastAPI) -> AsyncIterator[None]:
    yield
    client: httpx.AsyncClient | None = getattr(app.state, "upstream", None)
    if client is not None:
        await client.aclose()


router = APIRouter(tags=["chat"], lifespan=_closing_the_client)
_BODY = {"required": True, "content": {"application/json": {"schema": {"type": "object", "required": ["model"]}}}}
_DOCS: dict[str, Any] = {
    "responses": docs(404, 502, 503),
    "response_class": Response,
    "openapi_extra": {"requestBody": _BODY},
}


@router.post("/v1/chat/completions", **_DOCS)
async def chat_completions(request: Request, services: ServicesDep) -> Response:
    """OpenAI's chat completions, as vLLM speaks them; `stream` too. The model must be deployed."""
    return await _proxy(request, services, "/v1/chat/completions")


@router.post("/v1/completions", **_DOCS)
async def completions(request: Request, services: ServicesDep) -> Response:
    """OpenAI's text completions, as vLLM speaks them; `stream` too. The model must be deployed."""
    return await _proxy(request, services, "/v1/completions")


async def _proxy(request: Request, services: Services, path: str) -> Response:
    body = await request.body()
    deployment = await _deployment(services, _model_of(body))
    if deployment.state == DeploymentState.FAILED:
        return _failed(deployment)
    if deployment.state != DeploymentState.RUNNING:
        raise Unavailable(_not_yet(deployment), retry_after=RETRY_AFTER_S, param="model")
    url = services.cluster.serve_url(deployment.id).rstrip("/") + path
    headers = {"content-type": "application/json", "x-request-id": str(request.scope["state"].get("request_id", ""))}
    upstream = _client(request.app).build_request("POST", url, content=body, headers=headers)
    try:
        answer = await _send_unless_gone(request, upstream)
    except httpx.TransportError as error:
        raise Unavailable(
            f"model {deployment.model!r} does not answer at the moment ({type(error).__name__}); try again",
            retry_after=RETRY_AFTER_S,
            param="model",
        ) from error
    if answer.status_code >= 400:
        return await _problem(answer, deployment)
    return StreamingResponse(_chunks(answer), answer.status_code, headers=_passed_back(answer))


def _model_of(body: bytes) -> str:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise UserError(f"the body is no valid JSON: {error}") from None
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, str) or not model:
        raise UserError("`model` is missing: give the name of a deployed model, see GET /v1/deployments", param="model")
    return model


async def _deployment(services: Services, model: str) -> Deployment:
    async with services.database.begin() as session:
        found = await repository.find_live(session, model)
    if found is None:
        shown = orjson.dumps({"model": model}).decode()
        raise NotFound(
            f"model {model!r} is not deployed; deploy it first: `dpo deploy {model}`, or POST /v1/deployments {shown}",
            param="model",
            code="model_not_found",
        )
    return found


def _not_yet(deployment: Deployment) -> str:
    said = f" ({deployment.message})" if deployment.message else ""
    return f"model {deployment.model!r} is not up yet, it is {deployment.state}{said}; try again in a few seconds"


def _failed(deployment: Deployment) -> Response:
    message = (
        f"model {deployment.model!r} could not be served: {deployment.message}. "
        "Mend the cause and POST /v1/deployments again"
    )
    # The client library repeats a 503 unless told not to.
    return respond(503, message, code="deployment_failed", param="model", headers={"x-should-retry": "false"})


def _client(app: FastAPI) -> httpx.AsyncClient:
    """One client for all requests, made at the first: it belongs to the event loop that serves them."""
    client = getattr(app.state, "upstream", None)
    if not isinstance(client, httpx.AsyncClient):
        # Proxies of the environment are for the outside, never for the cluster.
        client = app.state.upstream = httpx.AsyncClient(timeout=TIMEOUT, limits=LIMITS, trust_env=False)
    return client


async def _send_unless_gone(request: Request, upstream: httpx.Request) -> httpx.Response:
    """Send, and wait for the head of the answer, for as long as the client is there.

    Raises:
        ClientDisconnect: it went away; the connection to the replica is closed.
    """
    sending = asyncio.create_task(_client(request.app).send(upstream, stream=True))
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            raise ClientDisconnect
        return await sending
    finally:
        for task in (sending, leaving):
            task.cancel()
        # The one that was cancelled has to end before its connection goes back to the pool.
        await asyncio.gather(sending, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The bytes as they come. Starlette ends this generator when the client goes away."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


def _passed_back(answer: httpx.Response) -> dict[str, str]:
    headers = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers}
    if "content-encoding" in answer.headers:
        headers["content-encoding"] = answer.headers["content-encoding"]
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        # Reverse proxies in front of the service must not collect the stream either.
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return headers


async def _problem(answer: httpx.Response, deployment: Deployment) -> Response:
    try:
        text = await answer.aread()
    finally:
        await answer.aclose()
    error = _error_of(text)
    if error is None and answer.status_code in (404, 503):
        # Serve's own words, not vLLM's: its proxy knows no replica of the model just now.
        message = f"model {deployment.model!r} has no replica that answers at the moment; try again"
        return from_error(Unavailable(message, retry_after=RETRY_AFTER_S, param="model"))
    if error is None:
        return respond(502, f"model {deployment.model!r} failed to answer", code="upstream_error", param="model")
    param, code = error.get("param"), error.get("code")
    return respond(
        answer.status_code,
        str(error.get("message") or "the model's engine refused the request"),
        # vLLM repeats the HTTP status as the code; OpenAI's codes are words.
        code=code if isinstance(code, str) and not code.isdigit() else None,
        param=param if isinstance(param, str) else None,
        headers=_problem_headers(answer),
    )


def _problem_headers(answer: httpx.Response) -> Mapping[str, str]:
    return {name: value for name, value in _passed_back(answer).items() if name.startswith(("x-dpo-", "retry-"))}


def _error_of(text: bytes) -> dict[str, Any] | None:
    """The `error` object of vLLM's answer; None when something else answered."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    error = document.get("error") if isinstance(document, dict) else None
    return error if isinstance(error, dict) else None
