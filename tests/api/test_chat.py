"""Chat is passed on to the replica that serves the model. A small server stands in for vLLM; the wire is real."""

import asyncio
import contextlib
import json
import socket

import httpx
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from dpo_service.cluster.port import AppState
from dpo_service.deployments.reconciler import DeploymentReconciler

CHAT = "/v1/chat/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


class Replica:
    """Answers like vLLM behind Serve; `say` chooses how, `bodies` is what it was asked."""

    def __init__(self):
        self.say = "answer"
        self.bodies, self.headers = [], []
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        paths = ("/{name}/v1/chat/completions", "/{name}/v1/completions")
        self.app = Starlette(routes=[Route(path, self.complete, methods=["POST"]) for path in paths])

    async def complete(self, request):
        self.bodies.append(await request.body())
        self.headers.append(dict(request.headers))
        return await getattr(self, self.say)(request)

    async def answer(self, request):
        message = {"role": "assistant", "content": "hi"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        body = {"id": "c", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]}
        headers = {"x-dpo-checkpoint": "d" * 64, "x-dpo-deployment": request.path_params["name"], "x-secret": "no"}
        return JSONResponse(body | {"system_fingerprint": "d" * 64}, headers=headers)

    async def stream(self, _request):
        async def chunks():
            try:
                yield _event("first")
                await self.go_on.wait()
                yield _event("second") + b"data: [DONE]\n\n"
            finally:
                self.left.set()

        return StreamingResponse(chunks(), media_type="text/event-stream", headers={"x-dpo-checkpoint": "d" * 64})

    async def think(self, request):
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        self.left.set()
        return PlainTextResponse("nobody hears")

    async def refuse(self, _request):
        error = {"message": "no chat template", "type": "BadRequestError", "param": None, "code": 400}
        return JSONResponse({"error": error}, 400, headers={"x-dpo-checkpoint": "d" * 64})

    async def no_route(self, _request):
        return PlainTextResponse("Path '/x' not found", 404)

    async def crash(self, _request):
        return PlainTextResponse("Internal Server Error", 500)


def _event(text):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@contextlib.asynccontextmanager
async def listening(app):
    """The app behind a real socket; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1))
        task = asyncio.create_task(server.serve(sockets=[taken]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@pytest.fixture
async def replica(api):
    made = Replica()
    async with listening(made.app) as url:
        api.cluster.serve_url = lambda name: f"{url}/{name}"
        yield made
        made.go_on.set()


@pytest.fixture
def reconciler(api):
    return DeploymentReconciler(api.database, api.store, api.cluster, api.settings, api.clock)


@pytest.fixture
async def deployed(api, reconciler):
    """`tiny`, served; the deployment's id."""
    name = (await api.http.post("/v1/deployments", json={"model": "tiny"})).json()["id"]
    await reconciler.tick()
    api.cluster.set_app(name, AppState.RUNNING)
    await reconciler.tick()
    return name


async def test_the_answer_comes_back_with_its_checkpoint(api, replica, deployed):
    raw = await api.sdk.chat.completions.with_raw_response.create(**HELLO)
    assert raw.parse().choices[0].message.content == "hi"
    assert raw.headers["x-dpo-checkpoint"] == "d" * 64
    assert raw.headers["x-dpo-deployment"] == deployed
    assert "x-secret" not in raw.headers
    assert raw.parse().system_fingerprint == "d" * 64


async def test_the_body_is_passed_on_as_it_is_and_keys_are_not(api, replica, deployed):
    body = b'{ "model" : "tiny", "prompt":"a", "made_up": [1.50, "\\u00e9"] }'
    headers = {"authorization": "Bearer secret", "content-type": "application/json"}
    answer = await api.http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 200
    assert replica.bodies == [body]
    assert "authorization" not in replica.headers[0]


async def test_a_stream_comes_chunk_by_chunk(api, replica, deployed):
    replica.say = "stream"
    async with listening(api.app) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as sdk:
        stream = await sdk.chat.completions.create(**HELLO, stream=True)
        chunks = aiter(stream)
        assert (await asyncio.wait_for(anext(chunks), 5)).choices[0].delta.content == "first"
        replica.go_on.set()  # only now may the second be sent: nothing waited for it
        assert [chunk.choices[0].delta.content async for chunk in chunks] == ["second"]
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["x-dpo-checkpoint"] == "d" * 64


async def test_a_client_that_leaves_a_stream_ends_it_at_the_replica(api, replica, deployed):
    replica.say = "stream"
    async with listening(api.app) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as answer:
            assert b"first" in await anext(answer.aiter_raw())
        await asyncio.wait_for(replica.left.wait(), 5)


async def test_a_client_that_leaves_before_the_answer_ends_it_at_the_replica(api, replica, deployed):
    replica.say = "think"
    async with listening(api.app) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=HELLO))
        while not replica.bodies:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait_for(replica.left.wait(), 5)


async def test_a_model_that_is_not_deployed_is_404_and_says_how_to(api):
    answer = await api.http.post(CHAT, json=HELLO)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert 'POST /v1/deployments {"model":"tiny"}' in error["message"]


async def test_until_it_is_up_it_is_503_with_retry_after(api, reconciler, replica):
    name = (await api.http.post("/v1/deployments", json={"model": "tiny"})).json()["id"]
    for _ in range(2):  # pending, starting
        answer = await api.http.post(CHAT, json=HELLO)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        await reconciler.tick()
    api.cluster.set_app(name, AppState.RUNNING)
    await reconciler.tick()
    assert (await api.http.post(CHAT, json=HELLO)).status_code == 200


async def test_a_failed_one_is_503_with_the_reason_and_not_retried(api, reconciler):
    name = (await api.http.post("/v1/deployments", json={"model": "tiny"})).json()["id"]
    await reconciler.tick()
    api.cluster.set_app(name, AppState.FAILED, "ValueError: no such rope type")
    await reconciler.tick()
    answer = await api.http.post(CHAT, json=HELLO)
    assert answer.status_code == 503
    assert "no such rope type" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


async def test_a_deleted_one_is_404_at_once(api, replica, deployed):
    await api.http.delete("/v1/deployments/tiny")
    assert (await api.http.post(CHAT, json=HELLO)).status_code == 404


async def test_the_engines_refusal_comes_in_openais_shape(api, replica, deployed):
    replica.say = "refuse"
    answer = await api.http.post(CHAT, json=HELLO)
    assert answer.status_code == 400
    wanted = {"message": "no chat template", "type": "invalid_request_error", "param": None, "code": None}
    assert answer.json()["error"] == wanted
    assert answer.headers["x-dpo-checkpoint"] == "d" * 64


@pytest.mark.parametrize(("say", "status"), [("no_route", 503), ("crash", 502)])
async def test_what_serve_says_comes_in_openais_shape(api, replica, deployed, say, status):
    replica.say = say
    answer = await api.http.post(CHAT, json=HELLO)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "server_error"
    assert ("retry-after" in answer.headers) == (status == 503)


async def test_nobody_there_is_503_with_retry_after(api, deployed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    api.cluster.serve_url = lambda name: f"http://127.0.0.1:{port}/{name}"
    answer = await api.http.post(CHAT, json=HELLO)
    assert answer.status_code == 503
    assert "retry-after" in answer.headers


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"model": 3}', b'{"model": ""}'])
async def test_a_body_without_a_model_is_400(api, body):
    answer = await api.http.post(CHAT, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
