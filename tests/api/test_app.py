"""What is around every request: ids, keys, limits, errors of every kind, health and metrics."""

import subprocess
import sys

import pytest
from sqlalchemy.exc import OperationalError

from tests.api.conftest import Api, closed, opened


@pytest.fixture
async def guarded(tmp_path):
    """The same service on an address that others reach."""
    made = await opened(Api(tmp_path, host="0.0.0.0", api_keys=("sk-one", "sk-two")))
    yield made
    await closed(made)


async def test_every_answer_has_a_request_id(api):
    seen = set()
    for path in ("/livez", "/v1/models", "/v1/nowhere", "/v1/files/file-none"):
        seen.add((await api.http.get(path)).headers["x-request-id"])
    assert len(seen) == 4


async def test_unknown_path_and_method_have_the_shape_of_errors(api):
    unknown = await api.http.get("/v2/x")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
    wrong = await api.http.put("/v1/files")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"]


async def test_unforeseen_error_is_a_500_that_tells_no_internals(api, monkeypatch, caplog):
    async def fail(*_, **__):
        raise RuntimeError("the password is 123")

    monkeypatch.setattr("dpo_service.jobs.repository.list_jobs", fail)
    response = await api.http.get("/v1/fine_tuning/jobs")
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "server_error"
    assert response.headers["x-request-id"] in error["message"]
    assert "123" not in response.text
    assert response.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [("database or disk is full", 413, "storage_full"), ("database is locked", 503, "unavailable")],
)
async def test_database_that_is_full_or_busy(api, monkeypatch, said, status, code):
    async def fail(*_, **__):
        raise OperationalError("INSERT", {}, Exception(said))

    monkeypatch.setattr("dpo_service.jobs.repository.list_jobs", fail)
    response = await api.http.get("/v1/fine_tuning/jobs")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_body_over_the_limit_is_413_announced_or_not(api, monkeypatch):
    async def chunks():
        for _ in range(20):
            yield b" " * (1 << 20)

    for content in (b" " * (17 << 20), chunks()):
        headers = {"content-type": "application/json"}
        response = await api.http.post("/v1/fine_tuning/jobs", content=content, headers=headers)
        assert response.status_code == 413


async def test_loopback_without_keys_admits_any_key_and_none(api):
    for headers in ({}, {"authorization": "Bearer whatever"}):
        assert (await api.http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "[::1"},
        {"host": ""},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
)
async def test_without_keys_a_page_from_elsewhere_is_refused(api, headers):
    response = await api.http.get("/v1/models", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
    assert "DPO_API_KEYS" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers", [{"host": "127.0.0.1:9000"}, {"host": "[::1]:8000"}, {"origin": "http://localhost:3000"}]
)
async def test_this_machines_own_names_are_admitted(api, headers):
    assert (await api.http.get("/v1/models", headers=headers)).status_code == 200


async def test_with_keys_any_name_will_do(guarded):
    headers = {"host": "dpo.example", "origin": "https://ui.example", "authorization": "Bearer sk-one"}
    assert (await guarded.http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer sk-on", 401),
        ("Basic sk-one", 401),
        ("Bearer ", 401),
        ("Bearer sk-one", 200),
        ("bearer sk-two", 200),
    ],
)
async def test_keys(guarded, header, status):
    headers = {"authorization": header} if header else {}
    response = await guarded.http.get("/v1/models", headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/v1/files", "/v1/fine_tuning/jobs", "/v1/models", "/v1/uploads", "/metrics", "/docs2"]
)
async def test_without_a_key_nothing_is_read(guarded, path):
    async def never():
        raise AssertionError("the body was read")
        yield b""

    assert (await guarded.http.post(path, content=never())).status_code == 401


@pytest.mark.parametrize("path", ["/livez", "/openapi.json"])
async def test_open_without_a_key(guarded, path):
    assert (await guarded.http.get(path)).status_code == 200


async def test_metrics_are_open_on_loopback_even_with_keys(tmp_path):
    api = await opened(Api(tmp_path, api_keys=("sk-one",)))
    assert (await api.http.get("/metrics")).status_code == 200
    assert (await api.http.get("/v1/models")).status_code == 401
    await closed(api)


async def test_readyz_says_which_part_is_away(api, monkeypatch):
    ready = await api.http.get("/readyz")
    assert ready.json() == {"status": "ready", "parts": {"database": "ok", "storage": "ok", "cluster": "ok"}}

    async def down():
        raise OSError("host db.internal is away")

    api.cluster.unreachable = True
    monkeypatch.setattr(api.database, "ping", down)
    response = await api.http.get("/readyz")
    assert response.status_code == 503
    parts = response.json()["parts"]
    assert parts["storage"] == "ok"
    assert "cannot be reached" in parts["cluster"]
    assert parts["database"] == "OSError"
    assert (await api.http.get("/livez")).status_code == 200


async def test_readyz_notices_storage_that_cannot_be_written(api, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("dpo_service.storage.store.Store.write", refuse)
    response = await api.http.get("/readyz")
    assert (response.status_code, response.json()["parts"]["storage"]) == (503, "PermissionError")


async def test_metrics_count_requests_by_route_and_jobs_by_state(api):
    await api.job((await api.upload()).id)
    await api.http.get("/v1/fine_tuning/jobs/ftjob-none")
    text = (await api.http.get("/metrics")).text
    assert 'dpo_jobs{state="queued"} 1.0' in text
    assert 'dpo_http_requests_total{method="GET",route="/v1/fine_tuning/jobs/{job_id}",status="404"} 1.0' in text


def test_importing_the_api_loads_nothing_heavy():
    code = (
        "import sys, dpo_service.api.app; "
        "print([m for m in ('torch', 'transformers', 'vllm', 'peft', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
