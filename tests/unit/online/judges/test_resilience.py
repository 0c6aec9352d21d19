"""The breaker by its own clock."""

import asyncio

import pytest

from dpo_service.errors import JudgeCallFailed, JudgeError
from dpo_service.online.judges.resilience import Breaker, Limit, Retry


class Line:
    """Something to call that is up or down."""

    def __init__(self):
        self.up = False
        self.calls = 0
        self.reason = "server_error"
        self.passing = True

    async def __call__(self, question):
        self.calls += 1
        await asyncio.sleep(0)
        if not self.up:
            raise JudgeCallFailed("down", reason=self.reason, passing=self.passing)
        return question


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def line():
    return Line()


@pytest.fixture
def breaker(line, clock):
    return Breaker(line, failures=3, seconds=30.0, now=clock)


async def fails(call, reason):
    with pytest.raises(JudgeCallFailed) as failed:
        await call("q")
    assert failed.value.reason == reason
    return failed.value


async def test_it_opens_after_failures_in_a_row_and_then_asks_nothing(breaker, line, clock):
    for _ in range(3):
        await fails(breaker, "server_error")
    clock.now += 10
    refused = await fails(breaker, "breaker_open")
    assert (line.calls, refused.retry_after, refused.passing) == (3, 20.0, True)


async def test_a_success_between_failures_keeps_it_closed(breaker, line):
    for _ in range(5):
        line.up = False
        await fails(breaker, "server_error")
        await fails(breaker, "server_error")
        line.up = True
        assert await breaker("q") == "q"
    assert not breaker.is_open


async def test_after_the_pause_one_call_tries_and_closes_it(breaker, line, clock):
    for _ in range(3):
        await fails(breaker, "server_error")
    clock.now += 30
    line.up = True
    tried = asyncio.gather(*(breaker("q") for _ in range(4)), return_exceptions=True)
    results = await tried
    assert [isinstance(result, JudgeCallFailed) for result in results] == [False, True, True, True]
    assert line.calls == 4
    assert not breaker.is_open
    assert await breaker("q") == "q"


async def test_a_trial_that_fails_opens_it_again(breaker, line, clock):
    for _ in range(3):
        await fails(breaker, "server_error")
    clock.now += 30
    await fails(breaker, "server_error")
    await fails(breaker, "breaker_open")
    clock.now += 30
    line.up = True
    assert await breaker("q") == "q"


async def test_a_trial_that_is_cancelled_leaves_the_next_one_to_try(line, clock):
    held = asyncio.Event()

    async def hold(question):
        await held.wait()
        return await line(question)

    breaker = Breaker(hold, failures=1, seconds=30.0, now=clock)
    held.set()
    await fails(breaker, "server_error")
    clock.now += 30
    held.clear()
    trial = asyncio.create_task(breaker("q"))
    await asyncio.sleep(0)
    trial.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trial
    held.set()
    line.up = True
    assert await breaker("q") == "q"


@pytest.mark.parametrize(("reason", "passing"), [("rate_limited", True), ("refused", False)])
async def test_an_endpoint_that_answers_is_there(breaker, line, reason, passing):
    line.reason, line.passing = reason, passing
    for _ in range(10):
        await fails(breaker, reason)
    assert line.calls == 10


async def test_retry_waits_as_long_as_the_breaker_is_open(breaker, line, clock):
    naps = []

    async def nap(seconds):
        naps.append(seconds)
        clock.now += seconds
        line.up = clock.now >= 130

    assert await Retry(breaker, attempts=5, sleep=nap)("q") == "q"
    assert line.calls == 4
    assert 25 < naps[-1] < 33


async def test_what_cannot_pass_is_raised_as_it_is():
    async def never(question):
        raise JudgeError("wrong key")

    with pytest.raises(JudgeError, match="wrong key"):
        await Retry(never, attempts=5)("q")


async def test_a_place_is_free_again_after_a_failure(line):
    limit = Limit(line, 1)
    for _ in range(3):
        await fails(limit, "server_error")
    line.up = True
    assert await limit("q") == "q"
