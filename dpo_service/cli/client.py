"""The REST API as the commands use it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from dpo_service.cli.exits import CliError, ExitCode, Refused
from dpo_service.hosts import is_loopback

Json = dict[str, Any]
SERVICE_FILE = "service.json"
DEFAULT_URL = "http://127.0.0.1:8000"
LONG_S = 600
"""Patience with one answer: a large file is checked row by row before it is accepted."""
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


def default_data_dir() -> Path:
    return Path(os.environ.get("DPO_DATA_DIR") or Path.home() / ".dpo")


def find_url(url: str | None, data_dir: Path | None) -> str:
    """The service's address: --url, DPO_URL, what `dpo up` left in the data directory, else the default."""
    given = url or (None if data_dir else os.environ.get("DPO_URL"))
    if given:
        return given.rstrip("/").removesuffix("/v1")
    try:
        return str(json.loads(((data_dir or default_data_dir()) / SERVICE_FILE).read_text())["url"]).rstrip("/")
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_URL


class Service:
    """Calls the service; every failure is a `CliError` with its exit code."""

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url
        key = api_key or os.environ.get("DPO_API_KEY") or "none"
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(LONG_S, connect=5),
            trust_env=not is_loopback(httpx.URL(url).host),
            transport=transport,
        )

    def get(self, path: str, **params: str | int) -> Json:
        return self._call("GET", path, params=params)

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, params: Mapping[str, str | int] | None = None
    ) -> Json:
        return self._call("POST", path, json=dict(body or {}), params=dict(params or {}))

    def delete(self, path: str) -> Json:
        return self._call("DELETE", path)

    def text(self, path: str) -> str:
        with self._reaching():
            response = self._http.get(path)
        _raise_for(response)
        return response.text

    def upload(self, path: Path) -> Json:
        """Upload a training file, streamed from disk."""
        try:
            file = path.open("rb")
        except OSError as error:
            raise CliError(f"cannot read {path}: {error.strerror}", ExitCode.USAGE) from None
        with file:
            upload = {"file": (path.name, file)}
            return self._call("POST", "/v1/files", files=upload, data={"purpose": "fine-tune"})

    def pages(self, path: str, **params: str | int) -> Iterator[Json]:
        """Every object of a list, page by page."""
        after: dict[str, str] = {}
        while True:
            page = self.get(path, **params, **after)
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            after = {"after": page["data"][-1]["id"]}

    def stream(self, method: str, path: str, body: Json | None = None, **params: str | int) -> Iterator[Json]:
        """The JSON payloads of a server-sent event stream, until it ends or says [DONE]."""
        with (
            self._reaching(),
            self._http.stream(
                method, path, json=body, params=params, timeout=httpx.Timeout(None, connect=5)
            ) as response,
        ):
            if response.is_error:
                response.read()
            _raise_for(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                payload = line[5:].strip()
                if payload == "[DONE]":
                    return
                yield _object(payload)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the service says it is ready."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._call("GET", "/readyz")
                return
            except CliError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _call(self, method: str, path: str, **options: Any) -> Json:
        with self._reaching():
            response = self._http.request(method, path, **options)
        _raise_for(response)
        return _object(response.content or b"{}")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            what = "did not answer in time" if isinstance(error, httpx.ReadTimeout) else "cannot be reached"
            raise CliError(
                f"the service at {self.url} {what}; start it with `dpo up`, or name another with --url or DPO_URL",
                ExitCode.UNREACHABLE,
            ) from error


def _object(payload: str | bytes) -> Json:
    try:
        value = json.loads(payload)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CliError("what answers there is not this service (no JSON object came back)", ExitCode.UNREACHABLE)
    return value


def _raise_for(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        error = response.json()["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code, param = f"HTTP {response.status_code}: {response.text[:200]}", None, None
    raise Refused(message, status=response.status_code, error_code=code, param=param)


def job_path(job_id: str) -> str:
    return f"/v1/fine_tuning/jobs/{quote(job_id, safe='')}"


def deployment_path(deployment: str) -> str:
    return f"/v1/deployments/{quote(deployment, safe='')}"
