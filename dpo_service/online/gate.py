"""Who may be at the engine. Answers come and go, up to a limit; weights change when no answer is inside.

    sample ── enter ──> [ waiting, in order ] ──> [ inside <= limit ] ── leave ──>
    sync   ── closed ──> lets nobody in any more, waits until nobody is inside, changes the weights, opens again

So a sync waits for the answers that have a slot and not for everything that was asked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        """`limit` answers at once; one request may take more, and then it is alone."""
        self._limit = limit
        self._inside = 0
        self._open = True
        self._one_change = asyncio.Lock()
        self._empty = asyncio.Event()
        self._empty.set()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def inside(self, size: int) -> AsyncIterator[None]:
        """Within, `size` slots are ours and the weights do not change."""
        await self._enter(size)
        try:
            yield
        finally:
            self._leave(size)

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Within, nobody is inside."""
        async with self._one_change:
            self._open = False
            try:
                await self._empty.wait()
                yield
            finally:
                self._open = True
                self._admit()

    async def _enter(self, size: int) -> None:
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, admitted))
        self._admit()
        try:
            await admitted
        except asyncio.CancelledError:
            if not admitted.cancelled():  # it was let in before it heard that nobody waits for it any more
                self._leave(size)
            raise

    def _leave(self, size: int) -> None:
        self._inside -= size
        if self._inside == 0:
            self._empty.set()
        self._admit()

    def _admit(self) -> None:
        while self._open and self._waiting:
            size, admitted = self._waiting[0]
            if self._inside and self._inside + size > self._limit and not admitted.done():
                return
            self._waiting.popleft()
            if not admitted.done():
                self._inside += size
                self._empty.clear()
                admitted.set_result(None)
