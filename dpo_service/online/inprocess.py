"""A curator on a thread of this process, as a trainer's rank sees it: for runs without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar

from dpo_service.online.curator import Curator
from dpo_service.online.evaluation import Evaluation
from dpo_service.online.port import Weights
from dpo_service.online.steps import StepPairs

T = TypeVar("T")


class InProcessCurator:
    """A `CuratorClient` for one rank; `with` ends the curator and the thread."""

    def __init__(self, make: Callable[[], Curator], samplers: Sequence[Any] = ()) -> None:
        """`make` is called in the thread's event loop, to which the curator then belongs. `samplers` are its samplers
        as a trainer reaches them that sends them weights."""
        self._samplers = samplers
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="curator", daemon=True)
        self._thread.start()
        self._curator = self._do(_made(make))

    def start(self, step: int, weights: Weights | None, counters: Mapping[str, Any]) -> None:
        self._do(self._curator.start(step, weights, counters))

    def join(self, rank: int) -> None:
        """One rank, in the same process."""

    def samplers(self) -> Sequence[Any]:
        return self._samplers

    def pairs(self, step: int, sent: int = 0) -> StepPairs | None:
        return self._do(self._curator.pairs(step, sent))

    def published(self, weights: Weights, lent: bool = False) -> None:
        self._do(self._curator.published(weights, lent))

    def evaluate(self, step: int) -> Evaluation:
        return self._do(self._curator.evaluate(step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._do(self._curator.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _made(make: Callable[[], Curator]) -> Curator:
    return make()
