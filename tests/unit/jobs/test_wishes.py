"""What holds of a pause as of a cancellation: they stop an attempt alike, and differ in what the job becomes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from dpo_service import ids
from dpo_service.errors import Conflict, NotFound
from dpo_service.jobs.cancel import cancel
from dpo_service.jobs.pause import pause, resume
from dpo_service.jobs.states import State
from dpo_service.jobs.tables import Job
from dpo_service.storage import paths
from tests.unit.jobs.world import World


@dataclass(frozen=True)
class Wish:
    ask: Callable[..., Awaitable[Job]]
    stopping: State
    stopped: State


STOPS = pytest.mark.parametrize(
    "wish",
    [Wish(cancel, State.CANCELLING, State.CANCELLED), Wish(pause, State.PAUSING, State.PAUSED)],
    ids=["cancel", "pause"],
)


@STOPS
async def test_a_queued_job_stops_at_once_and_is_not_started(world: World, wish: Wish) -> None:
    job_id = await world.submit()
    job = await wish.ask(world.database, job_id, clock=world.clock)
    assert job.job_state is wish.stopped
    await world.tick(2)
    assert world.cluster.submissions == []


@STOPS
async def test_a_job_that_waits_for_its_next_attempt_stops_at_once(world: World, wish: Wish) -> None:
    job_id = await world.running()
    world.die(job_id)
    await world.tick()
    assert (await wish.ask(world.database, job_id, clock=world.clock)).job_state is wish.stopped


@STOPS
async def test_a_job_that_saves_and_ends_within_the_grace_is_not_forced(world: World, wish: Wish) -> None:
    job_id = await world.running()
    assert (await wish.ask(world.database, job_id, clock=world.clock)).job_state is wish.stopping
    await world.tick()
    assert world.store.exists(paths.stop_flag(job_id, 1))
    world.stop(job_id)
    world.clock.advance(59)
    await world.tick()
    assert await world.state(job_id) is wish.stopped
    assert world.cluster.stops == []


@STOPS
async def test_one_that_does_not_stop_is_forced_after_the_grace_and_again(world: World, wish: Wish) -> None:
    job_id = await world.running()
    world.cluster.stubborn = True
    await wish.ask(world.database, job_id, clock=world.clock)
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
    job = await world.job(job_id)
    assert (job.job_state, job.failures, job.error_code) == (wish.stopped, 0, None)


@STOPS
async def test_an_attempt_that_has_not_begun_is_stopped_at_once(world: World, wish: Wish) -> None:
    job_id = await world.submit()
    await world.tick()
    await wish.ask(world.database, job_id, clock=world.clock)
    await world.tick(2)
    assert world.cluster.stops == [ids.submission_id(job_id, 1)]
    assert await world.state(job_id) is wish.stopped


@STOPS
async def test_a_success_in_the_race_is_a_success(world: World, wish: Wish) -> None:
    job_id = await world.running()
    world.succeed(job_id)
    await wish.ask(world.database, job_id, clock=world.clock)
    await world.tick()
    job = await world.job(job_id)
    assert (job.job_state, job.fine_tuned_model is not None) == (State.SUCCEEDED, True)


@STOPS
async def test_asking_twice_is_asking_once(world: World, wish: Wish) -> None:
    job_id = await world.running()
    first = await wish.ask(world.database, job_id, clock=world.clock)
    world.clock.advance(5)
    second = await wish.ask(world.database, job_id, clock=world.clock)
    assert first.stop_requested_at == second.stop_requested_at
    assert sum(event.to_state == wish.stopping for event in await world.events(job_id)) == 1


@STOPS
async def test_blindness_stops_nothing(world: World, wish: Wish) -> None:
    job_id = await world.running()
    await wish.ask(world.database, job_id, clock=world.clock)
    world.cluster.unreachable = True
    world.clock.advance(600)
    await world.tick(3)
    assert await world.state(job_id) is wish.stopping


@pytest.mark.parametrize("ask", [cancel, pause, resume])
async def test_an_ended_and_an_unknown_job_refuse(world: World, ask: Callable[..., Awaitable[Job]]) -> None:
    job_id = await world.running()
    world.succeed(job_id)
    await world.tick()
    with pytest.raises(Conflict, match="succeeded already"):
        await ask(world.database, job_id)
    with pytest.raises(NotFound, match="ftjob-none"):
        await ask(world.database, "ftjob-none")
    assert await world.state(job_id) is State.SUCCEEDED
