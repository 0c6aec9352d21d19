"""Bodies are bounded before they are read. Files are streamed and have a limit of their own (multipart.py)."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpo_service.api.problems import from_error
from dpo_service.errors import TooLarge

MAX_BODY = 16 << 20
STREAMED = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")


class BodyLimit:
    """ASGI middleware: at most MAX_BODY bytes, by Content-Length where there is one and by counting in any case."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or STREAMED.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            await from_error(self._refusal())(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

    def _counting(self, receive: Receive) -> Receive:
        seen = 0

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                # The framework turns any other exception met while it reads a body into a 400.
                raise HTTPException(413, self._refusal().message)
            return message

        return receive_counted

    def _refusal(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self._limit:,} bytes; large data go to POST /v1/files")
