"""A language model behind OpenAI's chat completions, over HTTP."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from dpo_service.errors import InvalidSpec, JudgeCallFailed, JudgeError
from dpo_service.hosts import is_loopback
from dpo_service.online.judges.chat import ChatRequest, Completion
from dpo_service.online.judges.port import Usage
from dpo_service.online.judges.resilience import RATE_LIMITED
from dpo_service.specs.judge import EndpointSpec

_PASSING = (408, 409, 425)
_SHOWN = 300
"""Characters of an endpoint's own words in our message."""


class Endpoint:
    """`complete` is the endpoint as a function. It neither waits nor asks again: see `resilience`."""

    def __init__(self, spec: EndpointSpec, environ: Mapping[str, str] = os.environ) -> None:
        """
        Raises:
            InvalidSpec: the variable that should hold the key is not set.
        """
        self._spec = spec
        self._key = key = _key(spec, environ)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=spec.limits.concurrency),
            # A proxy of the environment leads elsewhere than to this machine.
            trust_env=not is_loopback(httpx.URL(spec.base_url).host),
        )

    async def complete(self, request: ChatRequest) -> Completion:
        """
        Raises:
            JudgeCallFailed: no connection, an error of the endpoint's, or a reply that is no chat completion.
            JudgeError: the key, the address or the model is wrong.
        """
        try:
            answer = await self._client.post(f"{self._spec.base_url}/chat/completions", json=self._body(request))
        except httpx.RequestError as error:
            raise JudgeCallFailed(
                f"no reply from {self._spec.base_url}: {error!r}", reason="connection", passing=True
            ) from None
        if answer.status_code != 200:
            raise self._problem(answer)
        return _completion(answer)

    async def close(self) -> None:
        await self._client.aclose()

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._spec.model,
            "messages": [{"role": said.role, "content": said.content} for said in request.messages],
            self._spec.limit_name: request.max_tokens,
        }
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.json_schema is not None and self._spec.structured == "json_schema":
            schema = {"name": "verdict", "strict": True, "schema": request.json_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.json_schema is not None and self._spec.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def _problem(self, answer: httpx.Response) -> JudgeError:
        status = answer.status_code
        words = answer.text.replace(self._key, "***") if self._key else answer.text
        said = f"{self._spec.base_url} answered {status}: {words[:_SHOWN]}"
        if status in (401, 403):
            name = self._spec.api_key_env or "none; set endpoint.api_key_env"
            return JudgeError(f"the judge's endpoint refuses the key (variable {name}). {said}")
        if status in (404, 405) or 300 <= status < 400:
            return JudgeError(f"the judge's endpoint has no such model or address; see endpoint.base_url. {said}")
        if status == 429:
            return JudgeCallFailed(said, reason=RATE_LIMITED, passing=True, retry_after=_retry_after(answer))
        if status >= 500 or status in _PASSING:
            return JudgeCallFailed(said, reason="server_error", passing=True, retry_after=_retry_after(answer))
        return JudgeCallFailed(said, reason="refused", passing=False)


def _key(spec: EndpointSpec, environ: Mapping[str, str]) -> str | None:
    if spec.api_key_env is None:
        return None
    key = environ.get(spec.api_key_env)
    if not key:
        raise InvalidSpec(
            f"the variable {spec.api_key_env} is not set where the job runs; set it there to the endpoint's key",
            param="judge.endpoint.api_key_env",
        )
    return key


def _completion(answer: httpx.Response) -> Completion:
    try:
        document = answer.json()
        text = document["choices"][0]["message"]["content"]
        usage = document.get("usage") or {}
        spent = Usage(1, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise JudgeCallFailed(f"the reply is no chat completion: {error!r}", reason="malformed", passing=True) from None
    if not isinstance(text, str):
        raise JudgeCallFailed("the model said nothing, or refused", reason="refused", passing=False)
    return Completion(text, spent)


def _retry_after(answer: httpx.Response) -> float | None:
    """The header in seconds: it holds seconds or a date (RFC 9110, section 10.2.3)."""
    value = answer.headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None
