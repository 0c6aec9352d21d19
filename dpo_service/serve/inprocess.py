"""vLLM's engine core on a thread of the replica, for CPUs. vLLM runs it in a process of its own, which has to import
everything a second time: 7 s and 0.5 GB more for each model, and a second process to watch over.

    event loop: AsyncLLM ── add, abort, anything ──> one worker thread: EngineCore, steps while there is work
                    ^                                                        │
                    └──────────────────────── outputs <──────────────────────┘

The thread does one thing at a time, so the core needs no locks: a request added during a step waits for its end. While
there is work it is one step ahead, so that it does not stand still while the loop reads what the last one made. On
GPUs the process of its own is worth its price, since Python's work must not hold up the device; vLLM's way is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
NOTHING_DONE_S = 0.001
"""Pause after a step that could do nothing yet (a grammar is being compiled), so that it does not spin."""


class ThreadedCore:
    """What AsyncLLM calls `engine_core`. Made, called and ended on its own thread.

    Source: vllm.v1.engine.core_client, EngineCoreClient (the interface) and InprocClient (the core in this process).
    """

    def __init__(self, make_client: Callable[[], Any]) -> None:
        """`make_client` makes an InprocClient."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine-core")
        self._client = self._pool.submit(make_client).result()
        self._work = asyncio.Event()
        self._ahead: Future[tuple[EngineCoreOutputs, bool]] | None = None
        """The next step, where it is under way before anyone has asked for it."""
        self._ended = False
        self.resources = SimpleNamespace(engine_dead=False)

    async def add_request_async(self, request: Any) -> None:
        await self._call(self._client.add_request, request)
        self._work.set()

    async def get_output_async(self) -> EngineCoreOutputs:
        """The outputs of the next step; waits while there is nothing to do."""
        await self._work.wait()
        step, self._ahead = self._ahead or self._pool.submit(self._step), None
        outputs, more = await asyncio.wrap_future(step)
        if more:
            self._ahead = self._pool.submit(self._step)
        else:
            # A request added meanwhile sets it again: its turn in the event loop comes after this one.
            self._work.clear()
        return outputs

    def _step(self) -> tuple[EngineCoreOutputs, bool]:
        outputs = self._client.get_output()
        more = bool(self._client.engine_core.scheduler.has_requests())
        if more and not outputs.outputs:
            time.sleep(NOTHING_DONE_S)
        return outputs, more

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Every other `…_async` of the interface: the method of that name, on the thread."""
        method = getattr(self._client, name.removesuffix("_async")) if name.endswith("_async") else None
        if method is None:
            raise AttributeError(name)
        return lambda *args, **kwargs: self._call(method, *args, **kwargs)

    def dp_engines_running(self) -> bool:
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        """End the core, after the step it is in. Again is fine."""
        if self._ended:
            return
        self._ended = True
        self._pool.submit(self._client.shutdown).result(timeout)
        self._pool.shutdown(wait=False)

    async def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return await asyncio.wrap_future(self._pool.submit(function, *args, **kwargs))


def async_llm(engine_args: Any) -> AsyncLLM:
    """AsyncLLM whose core runs in this process."""
    from vllm.v1.engine.async_llm import AsyncLLM

    with _threaded_cores():
        return AsyncLLM.from_engine_args(engine_args)


@contextmanager
def _threaded_cores() -> Iterator[None]:
    """AsyncLLM's constructor takes no client: it asks this function for one."""
    from vllm.v1.engine.core_client import EngineCoreClient, InprocClient

    original = EngineCoreClient.make_async_mp_client

    def make(vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any) -> ThreadedCore:
        return ThreadedCore(lambda: InprocClient(vllm_config, executor_class, log_stats))

    EngineCoreClient.make_async_mp_client = staticmethod(make)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = staticmethod(original)
