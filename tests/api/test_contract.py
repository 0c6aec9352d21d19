"""Every operation that the OpenAPI document describes, called with what it allows and with what it does not.

Never a 5xx (a 503 that says when to come back is an answer), never a status or a content type that is not described,
and bodies as described. The service is a real one on a loopback port, with a cluster in memory.
"""

import asyncio
import threading
import time
from pathlib import Path

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig

from dpo_service.api.app import create_app
from dpo_service.cluster.fake import FakeCluster
from dpo_service.db.session import Database
from dpo_service.settings import Settings
from dpo_service.storage.store import Store
from tests.api.conftest import Api, opened, pairs, save_model

load_all_checks()
AS_DESCRIBED = [
    CHECKS.get_one(name)
    for name in ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
]
FEW = settings(max_examples=7, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


class Running:
    """The service in a thread with an event loop of its own."""

    def __init__(self, data_dir):
        self._data_dir = data_dir
        self._server = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while self._server is None or not self._server.started:
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    async def _serve(self):
        api = await opened(Api(self._data_dir))
        self._server = uvicorn.Server(uvicorn.Config(api.app, port=0, log_config=None, lifespan="off"))
        await self._server.serve()
        await api.database.close()

    def stop(self):
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    save_model(data_dir / "models" / "tiny")
    service = Running(data_dir)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def known(running):
    """Ids of things that exist: a file, and a job that has ended (so that a stream of it ends too)."""
    with httpx.Client(base_url=running.url, trust_env=False) as http:
        upload = {"file": ("pairs.jsonl", pairs())}
        file = http.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()["id"]
        body = {"model": "tiny", "training_file": file, "method": {"type": "dpo"}}
        job = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        http.post(f"/v1/fine_tuning/jobs/{job}/cancel").raise_for_status()
    return {"file_id": file, "job_id": job, "model_id": "tiny"}


def document():
    """The OpenAPI document; making it opens nothing."""
    settings_ = Settings(data_dir=Path("nowhere"))
    app = create_app(settings_, Database("sqlite+aiosqlite://"), Store(Path("nowhere")), FakeCluster())
    return app.openapi()


# A plan takes the body of a job: thousands of cases by its schema, which are tried there.
OF_A_JOB = {"include-path": "/v1/fine_tuning/jobs/plan", "phases": {"coverage": {"enabled": False}}}
schema = schemathesis.openapi.from_dict(document(), config=SchemathesisConfig.from_dict({"operations": [OF_A_JOB]}))


@schema.parametrize()
@FEW
def test_answers_as_described(case, running):
    check(case, running)


@schema.exclude(path_regex=r"^[^{]*$").exclude(method="DELETE").parametrize()
@FEW
def test_answers_about_things_that_exist(case, running, known):
    for name in set(case.path_parameters) & set(known):
        case.path_parameters[name] = known[name]
    check(case, running)


def check(case, running):
    response = case.call(base_url=running.url, timeout=20)
    assert response.status_code < 500 or (response.status_code == 503 and "retry-after" in response.headers)
    case.validate_response(response, checks=AS_DESCRIBED)
