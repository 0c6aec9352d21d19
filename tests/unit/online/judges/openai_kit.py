"""A real server on the loopback that speaks OpenAI's chat completions and answers as a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from dpo_service.online.judges.port import Answer, JudgeRequest

PAIR = JudgeRequest("Which is the better word?", (Answer("good"), Answer("bad")))

Reply = str | Response | float
"""What the model says, or a whole HTTP response, or so many seconds of silence before it says "late"."""


def chat(text: Any, **usage: int) -> dict[str, Any]:
    usage = usage or {"prompt_tokens": 100, "completion_tokens": 10}
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}], "usage": usage}


def status(code: int, **headers: str) -> Response:
    return JSONResponse({"error": {"message": f"status {code}"}}, code, headers)


def shown(body: dict[str, Any]) -> list[str]:
    """The answers that a request shows, in order."""
    lines = body["messages"][1]["content"].split("\n")
    return [lines[at + 1] for at, line in enumerate(lines) if line.startswith("[Answer")]


def prefers_good(body: dict[str, Any]) -> str:
    """The longer answer's letter: "good" against "bad"."""
    one, other = shown(body)
    winner = "tie" if len(one) == len(other) else "A" if len(one) > len(other) else "B"
    return f'{{"reason": "longer", "winner": "{winner}"}}'


class Server:
    """`bodies` are the requests it got. `answer` is asked for each reply, by the request's body."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self.at_once = self.most_at_once = 0

    def script(self, *replies: Reply) -> None:
        """These, one after the other; the last one stays."""
        left = list(replies)
        self.answer = lambda body: left.pop(0) if len(left) > 1 else left[0]

    async def __call__(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            reply = self.answer(body)
            if isinstance(reply, float):
                await asyncio.sleep(reply)
                reply = "late"
            return reply if isinstance(reply, Response) else JSONResponse(chat(reply))
        finally:
            self.at_once -= 1


@contextlib.asynccontextmanager
async def serving(answer: Callable[[dict[str, Any]], Reply] = prefers_good) -> AsyncIterator[Server]:
    server, app = Server(answer), FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await server(request)

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        running = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        task = asyncio.create_task(running.serve(sockets=[listening]))
        try:
            yield server
        finally:
            running.should_exit = True
            await task


@contextlib.contextmanager
def serving_on_a_thread(answer: Callable[[dict[str, Any]], Reply] = prefers_good) -> Iterator[Server]:
    """For tests that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    served = serving(answer)
    try:
        yield asyncio.run_coroutine_threadsafe(served.__aenter__(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(served.__aexit__(None, None, None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
