from __future__ import annotations

import pytest

from dpo_service import ids
from dpo_service.errors import Conflict, NotFound
from dpo_service.jobs.cancel import cancel
from dpo_service.jobs.states import State
from dpo_service.storage import paths
from tests.unit.jobs.world import World


async def test_a_queued_job_ends_at_once_and_never_starts(world: World) -> None:
    job_id = await world.submit()
    job = await cancel(world.database, job_id, clock=world.clock)
    assert job.job_state is State.CANCELLED
    assert job.finished_at == world.clock.now()
    await world.tick(2)
    assert world.cluster.submissions == []


async def test_a_running_job_is_asked_first_and_forced_after_the_grace(world: World) -> None:
    job_id = await world.running()
    world.cluster.stubborn = True
    await cancel(world.database, job_id, clock=world.clock)
    await world.tick()
    assert world.store.exists(paths.stop_flag(job_id, 1))
    world.clock.advance(59)
    await world.tick()
    assert world.cluster.stops == []
    world.clock.advance(1)
    await world.tick(2)
    assert world.cluster.stops == [ids.submission_id(job_id, 1)]
    world.clock.advance(60)
    await world.tick()
    assert len(world.cluster.stops) == 2
    world.die(job_id)
    await world.tick()
    assert await world.state(job_id) is State.CANCELLED


async def test_a_job_that_saves_and_ends_within_the_grace_is_not_forced(world: World) -> None:
    job_id = await world.running()
    await cancel(world.database, job_id, clock=world.clock)
    await world.tick()
    world.stop(job_id)
    await world.tick()
    assert await world.state(job_id) is State.CANCELLED
    assert world.cluster.stops == []


async def test_an_attempt_that_has_not_begun_is_stopped_at_once(world: World) -> None:
    job_id = await world.submit()
    await world.tick()
    await cancel(world.database, job_id, clock=world.clock)
    await world.tick(2)
    assert world.cluster.stops == [ids.submission_id(job_id, 1)]
    assert await world.state(job_id) is State.CANCELLED


async def test_a_job_that_succeeded_in_the_race_stays_succeeded(world: World) -> None:
    job_id = await world.running()
    world.succeed(job_id)
    await cancel(world.database, job_id, clock=world.clock)
    await world.tick()
    job = await world.job(job_id)
    assert (job.job_state, job.fine_tuned_model is not None) == (State.SUCCEEDED, True)


@pytest.mark.parametrize("retryable", [True, False])
async def test_a_job_that_failed_in_the_race_is_cancelled(world: World, retryable: bool) -> None:
    job_id = await world.running()
    world.fail(job_id, retryable=retryable)
    await cancel(world.database, job_id, clock=world.clock)
    await world.tick()
    job = await world.job(job_id)
    assert (job.job_state, job.error_code) == (State.CANCELLED, None)


async def test_a_job_that_waits_for_its_next_attempt_ends_at_once(world: World) -> None:
    job_id = await world.running()
    world.die(job_id)
    await world.tick()
    assert (await cancel(world.database, job_id, clock=world.clock)).job_state is State.CANCELLED


async def test_asking_twice_is_asking_once(world: World) -> None:
    job_id = await world.running()
    first = await cancel(world.database, job_id, clock=world.clock)
    world.clock.advance(5)
    second = await cancel(world.database, job_id, clock=world.clock)
    assert first.cancel_requested_at == second.cancel_requested_at
    assert sum(event.to_state == "cancelling" for event in await world.events(job_id)) == 1


async def test_an_ended_job_refuses(world: World) -> None:
    job_id = await world.running()
    world.succeed(job_id)
    await world.tick()
    with pytest.raises(Conflict, match="succeeded already"):
        await cancel(world.database, job_id)
    assert await world.state(job_id) is State.SUCCEEDED


async def test_an_unknown_job_is_not_found(world: World) -> None:
    with pytest.raises(NotFound, match="ftjob-none"):
        await cancel(world.database, "ftjob-none")


async def test_blindness_does_not_end_a_cancelled_job(world: World) -> None:
    job_id = await world.running()
    await cancel(world.database, job_id, clock=world.clock)
    world.cluster.unreachable = True
    world.clock.advance(600)
    await world.tick(3)
    assert await world.state(job_id) is State.CANCELLING
