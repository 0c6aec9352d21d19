"""Errors on the wire: `{"error": {message, type, param, code}}`, whatever went wrong and wherever.

The tree in errors.py carries its own status and code; this module turns it, validation errors and the framework's own
refusals into that shape. `docs` gives routes the same for OpenAPI.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

from dpo_service.api.sentences import describe
from dpo_service.errors import DpoServiceError, StorageFull, Unavailable


class Problem(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ProblemBody(BaseModel):
    """What every response with an error status holds."""

    error: Problem


MEANING = {
    400: "The request cannot work; `param` names the field, `message` the mend",
    401: "No valid API key",
    404: "No such thing",
    409: "The state of the thing does not allow it",
    413: "Too large, or the disk is full",
    502: "The cluster refused or failed the request",
    503: "Not now; see Retry-After",
}


def docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for a route that may answer these (400 and 401 always may)."""
    # `content` too: a route that answers with text still says its errors in JSON.
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    return {
        status: {"model": ProblemBody, "description": MEANING[status], "content": content}
        for status in sorted({400, 401, *statuses})
    }


def respond(
    status: int,
    message: str,
    *,
    code: str | None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    problem = Problem(
        message=message,
        type=kind or ("invalid_request_error" if status < 500 else "server_error"),
        param=param,
        code=code,
    )
    extra = dict(headers or {})
    if status == 409:
        # The client library repeats a 409 unless told not to; a state conflict does not go away by asking again.
        extra.setdefault("x-should-retry", "false")
    return JSONResponse(ProblemBody(error=problem).model_dump(), status, headers=extra)


def from_error(error: DpoServiceError) -> JSONResponse:
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, Unavailable) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return respond(error.status, error.message, code=error.code, param=error.param, headers=headers)


def install(app: FastAPI) -> None:
    """Answer every kind of error in the one shape."""
    app.add_exception_handler(DpoServiceError, _ours)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(DBAPIError, _database)


async def _ours(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DpoServiceError)
    return from_error(error)


async def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    body_field = getattr(request.scope.get("route"), "body_field", None)
    model = body_field.field_info.annotation if body_field is not None else None
    param, message = describe(list(error.errors()), model)
    return respond(400, message, code="invalid_request", param=param)


async def _framework(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"unknown path {request.url.path!r}; see /openapi.json for the ones there are"
    if error.status_code == 405:
        message = f"{request.method} is not allowed on {request.url.path!r}"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return respond(error.status_code, message, code=code, headers=error.headers)


async def _database(_: Request, error: Exception) -> JSONResponse:
    """A database that is full or busy is the moment's fault; any other failure is ours."""
    text = str(getattr(error, "orig", error))
    if "disk is full" in text or "No space left" in text:
        return from_error(StorageFull("the disk that holds the database is full; free some space"))
    if "database is locked" in text or getattr(error, "connection_invalidated", False):
        return from_error(Unavailable("the database is busy or away; try again", retry_after=2))
    raise error
