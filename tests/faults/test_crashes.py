"""The reconciler dies between any two of its effects; another one goes on. Nothing is done twice, nothing is stuck."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from dpo_service import ids
from dpo_service.cluster.port import JobObservation
from dpo_service.jobs.cancel import cancel
from dpo_service.jobs.context import Point
from dpo_service.jobs.pause import pause, resume
from dpo_service.jobs.states import TERMINAL, State
from tests.unit.jobs.world import LONGEST_DELAY_S, World, metrics_report

ENDINGS = ["succeed", "fail", "die", "cancel", "pause and succeed", "pause and cancel"]
TICKS = 30


class Crash(BaseException):
    """The process is gone. No handler in the code may catch it."""


def dies_at(point: Point, visit: int) -> Callable[[Point], None]:
    """A process that dies at the given visit of `point` (from 1), and does nothing any more after that."""
    visits, dead = 0, False

    def reached(here: Point) -> None:
        nonlocal visits, dead
        visits += here is point
        dead = dead or visits >= visit
        if dead:
            raise Crash(here)

    return reached


async def tick(world: World) -> None:
    """One tick; a crash is followed by a new process, which finds the lease of the dead one run out."""
    try:
        await world.current.tick()
    except Crash:
        world.current = world.reconciler()
        await world.expire_leases()


async def drive(world: World, job_id: str, ending: str) -> None:
    """Play the cluster's and the user's part until the job has ended."""
    for _ in range(TICKS):
        await tick(world)
        job = await world.job(job_id)
        if job.job_state in TERMINAL:
            return
        submission_id = ids.submission_id(job_id, job.attempt)
        if job.job_state is State.SUBMITTING and submission_id in world.submissions_of(job_id):
            world.cluster.start_running(submission_id)
        if job.job_state is State.RUNNING:
            world.spool(job_id, [metrics_report(step) for step in range(3)], job.attempt)
            await act(world, job_id, job.attempt, ending)
        if job.job_state is State.PAUSED:
            await after_the_pause(world, job_id, ending)
        world.clock.advance(LONGEST_DELAY_S)
    raise AssertionError(f"the job is stuck in {await world.state(job_id)}")


async def act(world: World, job_id: str, attempt: int, ending: str) -> None:
    if ending == "cancel" or (ending.startswith("pause") and attempt == 1):
        await (cancel if ending == "cancel" else pause)(world.database, job_id, clock=world.clock)
        await tick(world)
        world.stop(job_id, attempt)
    else:
        ending = ending.removeprefix("pause and ")
        {"succeed": world.succeed, "fail": world.fail, "die": world.die}[ending](job_id, attempt)


async def after_the_pause(world: World, job_id: str, ending: str) -> None:
    wish = cancel if ending == "pause and cancel" else resume
    await wish(world.database, job_id, clock=world.clock)


@pytest.mark.parametrize("visit", [1, 2])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("point", Point)
async def test_a_crash_anywhere_is_survived(world: World, point: Point, ending: str, visit: int) -> None:
    world.current = world.reconciler(reached=dies_at(point, visit))
    job_id = await world.submit()
    await drive(world, job_id, ending)
    job = await world.job(job_id)
    expected = {"succeed": State.SUCCEEDED, "cancel": State.CANCELLED}.get(ending.split()[-1], State.FAILED)
    assert job.job_state is expected
    attempts = range(1, job.attempt + 1)
    assert world.submissions_of(job_id) == [ids.submission_id(job_id, n) for n in attempts]
    assert job.attempt == {"fail": 3, "die": 3, "pause and succeed": 2}.get(ending, 1)
    assert job.failures == (2 if ending in ("fail", "die") else 0)
    events = await world.events(job_id)
    assert [event.key for event in events if event.type == "metrics"] == [f"metrics:train:{n}" for n in range(3)]
    ends = [event.to_state for event in events if event.to_state in {state.value for state in TERMINAL}]
    assert ends == [expected.value]
    assert [event.to_state for event in events].count("paused") == ending.startswith("pause")


@pytest.mark.parametrize("ending", ["cancel", "pause and succeed"])
@pytest.mark.parametrize("point", Point)
async def test_every_point_is_passed(world: World, point: Point, ending: str) -> None:
    """Else the test above would prove nothing at that point."""
    passed: list[Point] = []
    world.current = world.reconciler(reached=passed.append)
    await drive(world, await world.submit(), ending)
    assert point in passed


async def test_a_process_that_wakes_up_late_changes_nothing(world: World) -> None:
    """It has seen the first attempt gone, and stalls; meanwhile another process is at the second."""
    job_id = await world.running()
    world.die(job_id)
    observe, successor = world.cluster.observe, world.reconciler()

    async def stall(submission_id: str) -> JobObservation:
        world.cluster.observe = observe
        seen = await observe(submission_id)
        await world.expire_leases()
        await successor.tick()
        world.clock.advance(LONGEST_DELAY_S)
        await successor.tick()
        world.cluster.start_running(ids.submission_id(job_id, 2))
        await successor.tick()
        return seen

    world.cluster.observe = stall
    await world.tick()
    events = [event.to_state for event in await world.events(job_id) if event.to_state]
    assert events == ["queued", "submitting", "running", "queued", "submitting", "running"]
    job = await world.job(job_id)
    assert (job.job_state, job.attempt, job.not_before) == (State.RUNNING, 2, None)


@pytest.mark.parametrize("order", ["cancel first", "finish first", "between observation and verdict"])
@pytest.mark.parametrize("ending", ["succeed", "fail", "fail for good", "die"])
async def test_cancel_and_finish_race_to_one_end(world: World, order: str, ending: str) -> None:
    job_id = await world.running()
    for_good = partial(world.fail, retryable=False)
    finish = {"succeed": world.succeed, "fail": world.fail, "fail for good": for_good, "die": world.die}[ending]
    if order == "between observation and verdict":
        finish(job_id)
        original = world.cluster.observe

        async def observe(submission_id: str) -> JobObservation:
            seen = await original(submission_id)
            await cancel(world.database, job_id, clock=world.clock)
            return seen

        world.cluster.observe = observe
        await world.tick()
        world.cluster.observe = original
    elif order == "cancel first":
        await cancel(world.database, job_id, clock=world.clock)
        finish(job_id)
    else:
        finish(job_id)
        await cancel(world.database, job_id, clock=world.clock)
    await world.tick(2)
    job = await world.job(job_id)
    assert job.job_state is (State.SUCCEEDED if ending == "succeed" else State.CANCELLED)
    assert (job.error_code, job.not_before) == (None, None)
    ends = [e for e in await world.events(job_id) if e.to_state in {state.value for state in TERMINAL}]
    assert len(ends) == 1
