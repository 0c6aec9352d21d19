"""Who may ask. A Bearer key from the settings; on a loopback address without keys, any key or none, but by this
machine's own names only: a web page from elsewhere can make its visitor's browser ask, and under a name of its own
(DNS rebinding) even read the answers.

    /livez /readyz          open
    /metrics                open on loopback, else a key
    /internal/…             the attempt's own token, checked by the route
    /openapi.json /docs     open
    everything else         a key

Checked before a byte of the body is read.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dpo_service.api.problems import from_error
from dpo_service.errors import Forbidden, Unauthorized
from dpo_service.hosts import is_loopback
from dpo_service.settings import Settings

OPEN = ("/livez", "/readyz", "/openapi.json", "/docs", "/internal/")


class Authentication:
    """ASGI middleware. `scope["state"]["caller"]` says who asked, for idempotency keys."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self._on_loopback = settings.on_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if not self._keys and (foreign := foreign_name(headers)) is not None:
                await from_error(_not_from(foreign))(scope, receive, send)
                return
            token = bearer(headers)
            if not self._admits(scope["path"], token):
                await from_error(_refusal(token))(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = token if self._keys else ""
        await self._app(scope, receive, send)

    def _admits(self, path: str, token: str) -> bool:
        if any(path == open_ or (path.startswith(open_) and open_.endswith("/")) for open_ in OPEN):
            return True
        if not self._keys or (path == "/metrics" and self._on_loopback):
            return True
        # Every key is compared, whole, whatever the first one said: the time tells nothing.
        return sum(hmac.compare_digest(token.encode(), key) for key in self._keys) > 0


def bearer(headers: Headers) -> str:
    """The token of `Authorization: Bearer …`, or ""."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def foreign_name(headers: Headers) -> str | None:
    """By which name, not this machine's, it is asked (`Host`) or a page that asks was loaded (`Origin`)."""
    asked = [f"//{host}" for host in headers.getlist("host")] + headers.getlist("origin")
    return next((name for name in asked if not is_loopback(_hostname(name))), None)


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _not_from(name: str) -> Forbidden:
    return Forbidden(
        f"this service has no API keys, so it answers requests to 127.0.0.1 or localhost only, and this one comes from "
        f"or goes to {name.removeprefix('//')!r}; set DPO_API_KEYS to use other names"
    )


def _refusal(token: str) -> Unauthorized:
    if token:
        return Unauthorized("this API key is not one of the service's (DPO_API_KEYS)")
    return Unauthorized("no API key was sent; send the header Authorization: Bearer <key>")
