"""What holds of a pause alone; test_wishes.py has what it shares with a cancellation."""

from __future__ import annotations

import pytest

from dpo_service import ids
from dpo_service.errors import Conflict
from dpo_service.jobs.cancel import cancel
from dpo_service.jobs.pause import pause, resume
from dpo_service.jobs.states import State
from dpo_service.storage import paths
from tests.unit.jobs.world import LONGEST_DELAY_S, World, progress_report


async def paused(world: World) -> str:
    """A job that was paused while it ran."""
    job_id = await world.running()
    await pause(world.database, job_id, clock=world.clock)
    await world.tick()
    world.stop(job_id)
    await world.tick()
    assert await world.state(job_id) is State.PAUSED
    return job_id


async def test_a_queued_job_is_paused_at_once_and_starts_when_it_is_resumed(world: World) -> None:
    job_id = await world.submit()
    job = await pause(world.database, job_id, clock=world.clock)
    assert (job.job_state, job.paused_at, job.finished_at) == (State.PAUSED, world.clock.now(), None)
    await world.tick(2)
    assert world.cluster.submissions == []
    job = await resume(world.database, job_id, clock=world.clock)
    assert (job.job_state, job.paused_at, job.pause_requested_at) == (State.QUEUED, None, None)
    await world.tick()
    assert world.submissions_of(job_id) == [ids.submission_id(job_id, 1)]


async def test_a_running_job_saves_pauses_and_goes_on_with_another_attempt(world: World) -> None:
    job_id = await world.running()
    await world.ingest(job_id, [progress_report(4, 100.0)])
    job = await pause(world.database, job_id, clock=world.clock)
    assert (job.job_state, job.paused_at) == (State.PAUSING, None)
    await world.tick()
    assert world.store.exists(paths.stop_flag(job_id, 1))
    world.stop(job_id)
    world.clock.advance(7)
    await world.tick()
    job = await world.job(job_id)
    assert (job.job_state, job.paused_at, job.progress["done"]) == (State.PAUSED, world.clock.now(), 4)
    assert world.cluster.stops == []
    await resume(world.database, job_id, clock=world.clock)
    await world.tick()
    world.cluster.start_running(ids.submission_id(job_id, 2))
    await world.tick()
    assert not world.store.exists(paths.stop_flag(job_id, 2))
    world.succeed(job_id, 2)
    await world.tick()
    assert await world.state(job_id) is State.SUCCEEDED
    moves = [event.to_state for event in await world.events(job_id) if event.to_state]
    assert moves[3:] == ["pausing", "paused", "queued", "submitting", "running", "succeeded"]


async def test_a_paused_job_holds_no_place_and_is_left_alone(world: World) -> None:
    world.current = world.reconciler(max_running_jobs=1)
    job_id = await paused(world)
    other = await world.submit()
    await world.tick()
    assert await world.state(other) is State.SUBMITTING
    world.clock.advance(10 * LONGEST_DELAY_S)
    assert await world.current.tick() == 1
    await resume(world.database, job_id, clock=world.clock)
    await world.tick()
    assert await world.state(job_id) is State.QUEUED
    world.succeed(other)
    await world.tick(2)
    assert await world.state(job_id) is State.SUBMITTING


async def test_pauses_are_no_failed_attempts(world: World) -> None:
    """Twice as many pauses as attempts may fail, and then as many failures as ever."""
    job_id = await world.submit()
    for attempt in range(1, 7):
        await world.tick()
        world.cluster.start_running(ids.submission_id(job_id, attempt))
        await pause(world.database, job_id, clock=world.clock)
        await world.tick()
        world.stop(job_id, attempt)
        await world.tick()
        await resume(world.database, job_id, clock=world.clock)
    for attempt in (7, 8, 9):
        assert await world.state(job_id) is State.QUEUED
        world.clock.advance(LONGEST_DELAY_S)
        await world.tick()
        world.die(job_id, attempt)
        await world.tick()
    assert await world.state(job_id) is State.FAILED
    assert "failed attempt 3 of 3" in (await world.events(job_id))[-1].message


async def test_a_failure_that_would_come_again_is_not_hidden_by_the_pause(world: World) -> None:
    job_id = await world.running()
    world.fail(job_id, error_code="non_finite_loss", retryable=False)
    await pause(world.database, job_id, clock=world.clock)
    await world.tick()
    job = await world.job(job_id)
    assert (job.job_state, job.error_code) == (State.FAILED, "non_finite_loss")


async def test_a_failure_that_may_not_come_again_is_told_and_paused(world: World) -> None:
    job_id = await world.running()
    world.fail(job_id)
    await pause(world.database, job_id, clock=world.clock)
    await world.tick()
    job, last = await world.job(job_id), (await world.events(job_id))[-1]
    assert (job.job_state, job.failures, job.error_code, job.not_before) == (State.PAUSED, 0, None, None)
    assert (last.level, "boom" in last.message) == ("warn", True)


async def test_a_job_that_waits_for_its_next_attempt_waits_no_longer_once_resumed(world: World) -> None:
    job_id = await world.running()
    world.die(job_id)
    await world.tick()
    assert (await pause(world.database, job_id, clock=world.clock)).job_state is State.PAUSED
    await resume(world.database, job_id, clock=world.clock)
    await world.tick()
    job = await world.job(job_id)
    assert (job.job_state, job.attempt, job.failures) == (State.SUBMITTING, 2, 1)


async def test_a_cancellation_overtakes_a_pause(world: World) -> None:
    job_id = await world.running()
    await pause(world.database, job_id, clock=world.clock)
    world.clock.advance(40)
    assert (await cancel(world.database, job_id, clock=world.clock)).job_state is State.CANCELLING
    with pytest.raises(Conflict, match="cannot be paused"):
        await pause(world.database, job_id)
    with pytest.raises(Conflict, match="cannot be resumed"):
        await resume(world.database, job_id)
    world.clock.advance(20)  # its grace began with the pause
    await world.tick(2)
    assert world.cluster.stops == [ids.submission_id(job_id, 1)]
    assert await world.state(job_id) is State.CANCELLED


async def test_a_paused_job_is_cancelled_at_once(world: World) -> None:
    job_id = await paused(world)
    job = await cancel(world.database, job_id, clock=world.clock)
    assert (job.job_state, job.finished_at, job.paused_at) == (State.CANCELLED, world.clock.now(), None)


async def test_asking_twice_is_asking_once(world: World) -> None:
    job_id = await world.running()
    first = await pause(world.database, job_id, clock=world.clock)
    world.clock.advance(5)
    assert (await pause(world.database, job_id, clock=world.clock)).pause_requested_at == first.pause_requested_at
    world.stop(job_id)
    await world.tick()
    since = (await world.job(job_id)).paused_at
    world.clock.advance(5)
    assert (await pause(world.database, job_id, clock=world.clock)).paused_at == since
    for _ in range(2):
        await resume(world.database, job_id, clock=world.clock)
    await world.tick()
    assert (await resume(world.database, job_id, clock=world.clock)).job_state is State.SUBMITTING
    asked = [event.to_state for event in await world.events(job_id) if event.actor == "user"]
    assert asked == ["queued", "pausing", "queued"]


async def test_a_pausing_job_cannot_be_resumed_before_it_has_paused(world: World) -> None:
    job_id = await world.running()
    await pause(world.database, job_id, clock=world.clock)
    with pytest.raises(Conflict, match="still pausing"):
        await resume(world.database, job_id)
    assert await world.state(job_id) is State.PAUSING
