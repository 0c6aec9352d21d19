"""What stands around every call that can fail: a limit, a timeout, a breaker, and asking again.

    Retry ──> Breaker ──> Limit ──> Timeout ──> the call

A call that waits to be asked again holds no place in the limit. While the breaker is open every call is told for how
long, and Retry waits as long: an endpoint that is away is left alone, and nobody sleeps by guess. Each wraps any
function of one argument, so a judge can be wrapped as well as a call to an endpoint.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from dpo_service.clock import monotonic
from dpo_service.errors import JudgeCallFailed
from dpo_service.specs.judge import LimitsSpec

Q = TypeVar("Q")
R = TypeVar("R")

RATE_LIMITED = "rate_limited"
FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0


class Timeout(Generic[Q, R]):
    def __init__(self, call: Callable[[Q], Awaitable[R]], seconds: float) -> None:
        self._call = call
        self._seconds = seconds

    async def __call__(self, question: Q) -> R:
        try:
            async with asyncio.timeout(self._seconds):
                return await self._call(question)
        except TimeoutError:
            raise JudgeCallFailed(f"no reply within {self._seconds:g} s", reason="timeout", passing=True) from None


class Limit(Generic[Q, R]):
    """At most so many calls at once; the others wait for a place."""

    def __init__(self, call: Callable[[Q], Awaitable[R]], places: int) -> None:
        self._call = call
        self._places = asyncio.Semaphore(places)

    async def __call__(self, question: Q) -> R:
        async with self._places:
            return await self._call(question)


class Breaker(Generic[Q, R]):
    """closed -- `failures` in a row --> open -- `seconds` --> half open: one call -- succeeds --> closed, else open.

    Only what passes counts: an endpoint that refuses a request, or asks for patience (429), is there.
    """

    def __init__(
        self,
        call: Callable[[Q], Awaitable[R]],
        failures: int,
        seconds: float,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self._call = call
        self._allowed = failures
        self._seconds = seconds
        self._now = now
        self._failures = 0
        self._open_until = 0.0
        self._trying = False

    @property
    def is_open(self) -> bool:
        return self._failures >= self._allowed

    async def __call__(self, question: Q) -> R:
        first = self._enter()
        try:
            reply = await self._call(question)
        except JudgeCallFailed as error:
            self._note(failed=error.passing and error.reason != RATE_LIMITED)
            raise
        finally:
            if first:
                self._trying = False
        self._note(failed=False)
        return reply

    def _enter(self) -> bool:
        """Whether this call is the first after a pause.

        Raises:
            JudgeCallFailed: it is not this call's turn.
        """
        if not self.is_open:
            return False
        left = self._open_until - self._now()
        if left > 0 or self._trying:
            raise JudgeCallFailed(
                "the endpoint failed too often and is left alone for a while",
                reason="breaker_open",
                passing=True,
                retry_after=max(left, FIRST_WAIT),
            )
        self._trying = True
        return True

    def _note(self, *, failed: bool) -> None:
        self._failures = self._failures + 1 if failed else 0
        if self.is_open:
            self._open_until = self._now() + self._seconds


class Retry(Generic[Q, R]):
    """Asks again what may pass: after what the endpoint says (Retry-After), else after 0.5 s, 1, 2, ... with jitter."""

    def __init__(
        self,
        call: Callable[[Q], Awaitable[R]],
        attempts: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._call = call
        self._attempts = attempts
        self._sleep = sleep
        self._rng = rng or random.Random()

    async def __call__(self, question: Q) -> R:
        for attempt in range(1, self._attempts):
            try:
                return await self._call(question)
            except JudgeCallFailed as error:
                if not error.passing or (error.retry_after or 0.0) > LONGEST_WAIT:
                    raise
                await self._sleep(self._wait(attempt, error.retry_after))
        return await self._call(question)

    def _wait(self, attempt: int, told: float | None) -> float:
        """Seconds. Jitter is added to what the endpoint says, so that not all come back at that moment."""
        own: float = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * self._rng.uniform(0.5, 1.0)
        return own if told is None else told + own * 0.25


def protected(
    call: Callable[[Q], Awaitable[R]],
    limits: LimitsSpec,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Callable[[Q], Awaitable[R]]:
    """`call` within all of `limits`."""
    inner = Limit(Timeout(call, limits.timeout_seconds), limits.concurrency)
    return Retry(Breaker(inner, limits.breaker_failures, limits.breaker_seconds), limits.attempts, sleep)
