"""A service that speaks the REST API from memory, over real HTTP, so that commands run whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from dpo_service.cli.app import run


def event(sequence: int, message: str = "", **data: object) -> dict:
    kind = "metrics" if data else "message"
    return {
        "id": f"ftevent-{sequence}",
        "object": "fine_tuning.job.event",
        "created_at": 1_700_000_000,
        "level": "info",
        "type": kind,
        "message": message,
        "data": data or None,
        "sequence": sequence,
    }


class FakeService:
    """State, and what was asked. `looks_until_end`: how often the job is asked for before it has ended."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, object]] = []
        self.files: dict[str, bytes] = {}
        self.events = [event(1, "Job created"), event(2, step=0, split="eval", **{"rewards/accuracies": 0.5})]
        self.events += [event(3, step=1, split="train", loss=0.7), event(4, step=2, split="train", loss=0.5)]
        self.final, self.error, self.looks_until_end = "succeeded", None, 2
        self.state: str | None = None
        self.stream_breaks, self.refuse_job = 0, False
        self.samples: list[dict] = []
        self.deployments: list[dict] = []
        self.deployment_states = ["starting", "running"]

    def job(self) -> dict:
        self.looks_until_end -= 1
        ended = self.looks_until_end <= 0
        return {
            "id": "ftjob-1",
            "status": self.final if ended else "running",
            "state": self.state or "running",
            "model": "base",
            "method": {"type": "dpo"},
            "created_at": 1_700_000_000,
            "fine_tuned_model": "ft:base::1" if ended and self.final == "succeeded" else None,
            "error": self.error if ended else None,
            "estimated_finish": None,
            "dataset": {"total_steps": 2},
            "progress": None,
        }

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, object]:
        parts = path.strip("/").split("/")
        match method, parts:
            case "GET", ["readyz"]:
                return 200, {"status": "ready", "parts": {"database": "ok", "storage": "ok", "cluster": "ok"}}
            case "POST", ["v1", "files"]:
                name = f"file-{len(self.files) + 1}"
                self.files[name] = body
                return 200, {"id": name, "bytes": len(body)}
            case "DELETE", ["v1", "files", name]:
                del self.files[name]
                return 200, {"id": name, "deleted": True}
            case "POST", ["v1", "fine_tuning", "jobs"] if self.refuse_job:
                return 400, {"error": {"message": "no such model", "code": "model_not_found", "param": "model"}}
            case "POST", ["v1", "fine_tuning", "jobs"]:
                return 200, self.job()
            case "GET", ["v1", "fine_tuning", "jobs"]:
                return 200, {"data": [self.job()], "has_more": False}
            case _, ["v1", "fine_tuning", "jobs", "ftjob-1", *rest]:
                return self._of_job(rest, query)
            case _, ["v1", "models" | "deployments" | "chat", *_]:
                return self._of_models(method, parts[1:], body)
        return 404, {"error": {"message": f"nothing is at {path}", "code": "not_found", "param": None}}

    def _of_job(self, rest: list[str], query: dict[str, list[str]]) -> tuple[int, object]:
        match rest:
            case ["samples"]:
                return 200, {"data": self.samples, "has_more": False}
            case ["logs"]:
                return 200, "step 1\nstep 2"
            case ["events"] if "stream" in query:
                broken, self.stream_breaks = self.stream_breaks > 0, self.stream_breaks - 1
                return 200, _server_sent(self.events[:2] if broken else self.events, whole=not broken)
            case ["events"]:
                return 200, {"data": list(reversed(self.events)), "has_more": False}
        return 200, self.job()

    def _of_models(self, method: str, parts: list[str], body: bytes) -> tuple[int, object]:
        match method, parts:
            case "GET", ["models"]:
                return 200, {"data": [{"id": "base", "object": "model", "created": 0, "owned_by": "user"}]}
            case "GET", ["deployments"]:
                return 200, {"data": self.deployments, "has_more": False}
            case "POST", ["deployments"]:
                self.deployments.append({"id": "dep-1", "status": "pending", **json.loads(body)})
                return 200, self.deployments[-1]
            case "GET", ["deployments", _]:
                state = self.deployment_states.pop(0)
                return 200, {**self.deployments[-1], "status": state, "message": "out of memory"}
            case "DELETE", ["deployments", name]:
                self.deployments = [d for d in self.deployments if d["id"] != name]
                return 200, {"id": name, "deleted": True}
            case "POST", ["chat", "completions"] if not json.loads(body).get("stream"):
                return 200, {"choices": [{"message": {"role": "assistant", "content": "Hello."}}]}
        words = [{"choices": [{"delta": {"content": word}}]} for word in (" Hel", "lo", ".")]
        return 200, _server_sent(words, whole=True)


def _server_sent(objects: list[dict], *, whole: bool) -> bytes:
    text = "".join(f"data: {json.dumps(item)}\n\n" for item in objects)
    return (text + ("data: [DONE]\n\n" if whole else "")).encode()


def _handler(service: FakeService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                service.requests.append((self.command, unquote(url.path), json.loads(body or b"null")))
            except ValueError:
                service.requests.append((self.command, unquote(url.path), body))
            status, answer = service.answer(self.command, unquote(url.path), parse_qs(url.query), body)
            payload = answer if isinstance(answer, bytes) else None
            payload = payload or (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Handler


@pytest.fixture
def service() -> Iterator[FakeService]:
    fake = FakeService()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def dpo(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command against the fake service; returns its exit code."""
    monkeypatch.setattr("time.sleep", lambda _: None)

    def command(*arguments: str) -> int:
        return run([*arguments, "--url", service.url])

    return command
