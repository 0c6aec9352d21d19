"""A level-triggered loop: tick, wait, tick again. What a reconciler is built on.

run ──> tick ──> wait until reconcile_every_s is over, or wake(), or the stop ──┐
         ^                                                                     │
         └─────────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod

logger = logging.getLogger(__name__)


class Ticker(ABC):
    """Looks at the world again and again; an error ends a tick, never the loop."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._wake = asyncio.Event()

    @abstractmethod
    async def tick(self) -> object:
        """Look once and do what follows from it."""

    def wake(self) -> None:
        """Tick now. To be called in the event loop that runs `run`."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Tick until `stop` is set."""
        while not stop.is_set():
            self._wake.clear()
            try:
                await self.tick()
            except Exception:
                logger.exception("a tick of %s failed; the next one tries again", type(self).__name__)
            await self._pause(stop)

    async def _pause(self, stop: asyncio.Event) -> None:
        waiters = [asyncio.create_task(event.wait()) for event in (stop, self._wake)]
        try:
            await asyncio.wait(waiters, timeout=self._every_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiters:
                waiter.cancel()
