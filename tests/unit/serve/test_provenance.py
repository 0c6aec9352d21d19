"""What answers is known by its bytes, and every answer says it."""

import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from dpo_service.checkpoint.format import CheckpointFacts, digest_of, publish
from dpo_service.errors import CheckpointError
from dpo_service.serve.provenance import NamesItsCheckpoint, identify
from dpo_service.storage.store import Store


def fill(directory):
    (directory / "model").mkdir()
    (directory / "model" / "model.safetensors").write_bytes(b"weights")
    (directory / "model" / "config.json").write_text(json.dumps({"hidden_size": 64}))


@pytest.fixture
def checkpoint(tmp_path):
    facts = CheckpointFacts(job_id="ftjob-1", step=1, epoch=1.0, base_model="m", base_digest="b")
    store = Store(tmp_path)
    manifest = publish(store, facts, fill)
    return manifest, next(tmp_path.rglob("model.safetensors")).parent


def test_an_unpublished_model_is_known_by_its_digest(checkpoint):
    _, directory = checkpoint
    assert identify(directory, None) == digest_of(directory)


def test_a_published_one_by_the_digest_it_was_published_under(checkpoint):
    manifest, directory = checkpoint
    for digest in (manifest.digest, manifest.model_digest):
        assert identify(directory, digest) == digest


def test_a_changed_file_is_refused(checkpoint):
    manifest, directory = checkpoint
    (directory / "model.safetensors").write_bytes(b"weightz")
    for digest in (manifest.digest, manifest.model_digest):
        with pytest.raises(CheckpointError, match="not the one that was published"):
            identify(directory, digest)


def test_another_checkpoints_digest_is_refused(checkpoint):
    _, directory = checkpoint
    with pytest.raises(CheckpointError):
        identify(directory, "f" * 64)


async def test_every_response_carries_the_headers():
    async def whole(_request):
        return JSONResponse({}, 400)

    async def stream(_request):
        return StreamingResponse(iter([b"a", b"b"]))

    inner = Starlette(routes=[Route("/whole", whole), Route("/stream", stream)])
    app = NamesItsCheckpoint(inner, [("x-dpo-checkpoint", "abc")])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        for path in ("/whole", "/stream", "/nowhere"):
            assert (await client.get(path)).headers["x-dpo-checkpoint"] == "abc"


async def test_the_lifespan_is_passed_through():
    seen = []

    async def inner(scope, receive, send):
        seen.append((scope["type"], send))

    async def send(_message):
        return None

    await NamesItsCheckpoint(inner, [])({"type": "lifespan"}, None, send)
    assert seen == [("lifespan", send)]
