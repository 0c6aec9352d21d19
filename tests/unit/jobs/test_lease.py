from __future__ import annotations

import asyncio

import pytest

from dpo_service.jobs import lease
from dpo_service.jobs.states import State
from tests.unit.jobs.world import World


async def claim(world: World, token: str, lease_s: float = 30.0) -> list[lease.Owned]:
    async with world.database.begin() as session:
        now = world.clock.now()
        return list(await lease.claim(session, token, lease_s=lease_s, now=now, max_running=10))


async def test_a_job_has_one_owner(either: World) -> None:
    job_id = await either.submit()
    assert [owned.job.id for owned in await claim(either, "a")] == [job_id]
    assert await claim(either, "b") == []


async def test_a_lease_runs_out_by_the_databases_clock(either: World) -> None:
    await either.submit()
    await claim(either, "a", lease_s=0.2)
    either.clock.advance(1000)  # ours does not count
    assert await claim(either, "b") == []
    await asyncio.sleep(0.3)
    assert len(await claim(either, "b")) == 1


async def test_a_released_job_can_be_claimed_at_once(either: World) -> None:
    await either.submit()
    await claim(either, "a")
    async with either.database.begin() as session:
        assert await lease.release(session, "a") == 1
    assert len(await claim(either, "b")) == 1


async def test_a_stale_owner_changes_no_row(either: World) -> None:
    await either.submit()
    (stale,) = await claim(either, "a", lease_s=0.0)
    await asyncio.sleep(0.01)
    (owned,) = await claim(either, "b")
    for _ in range(20):
        with pytest.raises(lease.StaleLease):
            async with lease.guarded(either.database, stale, 30.0) as (_, job):
                job.state = State.FAILED.value
        async with either.database.begin() as session:
            assert not await lease.hold(session, stale.job.id, "a", 30.0)
            assert await lease.release(session, "a") == 0
    async with lease.guarded(either.database, owned, 30.0) as (_, job):
        assert job.job_state is State.QUEUED


async def test_work_that_takes_longer_than_the_lease_keeps_it(either: World) -> None:
    await either.submit()
    await claim(either, "a", lease_s=0.3)
    async with lease.renewing(either.database, "a", 0.3):
        await asyncio.sleep(0.7)
        assert await claim(either, "b") == []
    await asyncio.sleep(0.4)
    assert len(await claim(either, "b")) == 1


async def test_only_jobs_with_something_to_do_are_claimed(either: World) -> None:
    active, done = await either.running(), await either.running()
    either.succeed(done)
    await either.tick()
    waiting = await either.running()
    either.die(waiting)
    await either.tick()
    assert [owned.job.id for owned in await claim(either, "a")] == [active]


async def test_of_the_queue_only_as_many_are_claimed_as_there_are_places(either: World) -> None:
    await either.running()
    queued = [await either.submit() for _ in range(3)]
    async with either.database.begin() as session:
        now = either.clock.now()
        owned = await lease.claim(session, "a", lease_s=30.0, now=now, max_running=2)
    assert [o.job.id for o in owned if o.attempt is None] == queued[:1]


async def test_two_reconcilers_at_once_start_a_job_once_and_keep_the_limit(either: World) -> None:
    jobs = [await either.submit() for _ in range(6)]
    reconcilers = [either.reconciler(max_running_jobs=3) for _ in range(4)]
    for _ in range(3):
        await asyncio.gather(*(reconciler.tick() for reconciler in reconcilers))
    states = [await either.state(job_id) for job_id in jobs]
    assert states.count(State.SUBMITTING) == 3
    assert len(either.cluster.submissions) == 3
