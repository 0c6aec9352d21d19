from __future__ import annotations

import pytest

from dpo_service.errors import NotFound, UserError
from dpo_service.jobs import repository
from dpo_service.jobs.cancel import cancel
from dpo_service.jobs.states import State
from tests.unit.jobs.world import World, checkpoint_report, metrics_report


async def test_jobs_are_listed_newest_first_by_pages(either: World) -> None:
    jobs = [await either.submit() for _ in range(5)]
    async with either.database.begin() as session:
        first, more = await repository.list_jobs(session, limit=2)
        rest, end = await repository.list_jobs(session, limit=10, after=first[-1].id)
    assert [j.id for j in first] + [j.id for j in rest] == jobs[::-1]
    assert (more, end) == (True, False)


async def test_jobs_of_one_moment_are_all_listed(either: World) -> None:
    jobs = {await either.submit() for _ in range(4)}
    await either.run_sql("UPDATE jobs SET created_at = '2026-01-01 00:00:00.000000'")
    seen: list[str] = []
    async with either.database.begin() as session:
        while len(seen) < 4:
            page, _ = await repository.list_jobs(session, limit=1, after=seen[-1] if seen else None)
            seen += [job.id for job in page]
    assert set(seen) == jobs


async def test_jobs_are_found_by_their_metadata(either: World) -> None:
    wanted = await either.submit(metadata={"team": "a", "run": "1"})
    await either.submit(metadata={"team": "b"})
    await either.submit()
    async with either.database.begin() as session:
        found, _ = await repository.list_jobs(session, metadata={"team": "a", "run": "1"})
        none, _ = await repository.list_jobs(session, metadata={"team": "a", "run": "2"})
    assert [job.id for job in found] == [wanted]
    assert none == []


async def test_events_newest_first_by_pages_and_oldest_first_since(either: World) -> None:
    job_id = await either.running()
    await either.ingest(job_id, [metrics_report(step) for step in range(5)])
    everything = await either.events(job_id)
    async with either.database.begin() as session:
        page, more = await repository.list_events(session, job_id, limit=3)
        rest, end = await repository.list_events(session, job_id, limit=50, after=page[-1].id)
        later = await repository.events_since(session, job_id, everything[2].sequence)
    assert [e.id for e in [*page, *rest]] == [e.id for e in everything][::-1]
    assert (more, end) == (True, False)
    assert [e.id for e in later] == [e.id for e in everything[3:]]


async def test_checkpoints_by_pages(world: World) -> None:
    job_id = await world.running()
    await world.ingest(job_id, [checkpoint_report(job_id, step) for step in (5, 10, 15)])
    async with world.database.begin() as session:
        page, more = await repository.list_checkpoints(session, job_id, limit=2)
        rest, end = await repository.list_checkpoints(session, job_id, after=page[-1].id)
    assert [c.step for c in page] == [15, 10]
    assert [c.step for c in rest] == [5]
    assert (more, end) == (True, False)


async def test_a_cursor_of_another_list_is_refused(world: World) -> None:
    job_id, other = await world.running(), await world.running()
    foreign = (await world.events(other))[0].id
    async with world.database.begin() as session:
        for listing in (
            repository.list_jobs(session, after="ftjob-none"),
            repository.list_events(session, job_id, after=foreign),
            repository.list_checkpoints(session, job_id, after="ftckpt_none_1"),
        ):
            with pytest.raises(UserError, match="after") as refused:
                await listing
            assert refused.value.param == "after"


async def test_what_is_not_there_is_not_found(world: World) -> None:
    async with world.database.begin() as session:
        for asked in (
            repository.get_job(session, "ftjob-none"),
            repository.list_events(session, "ftjob-none"),
            repository.list_checkpoints(session, "ftjob-none"),
            repository.get_attempt(session, "ftjob-none", 1),
        ):
            with pytest.raises(NotFound, match="ftjob-none"):
                await asked


async def test_jobs_are_counted_by_state(world: World) -> None:
    await cancel(world.database, await world.submit())
    await world.submit()
    async with world.database.begin() as session:
        counted = await repository.count_by_state(session)
    assert {state: n for state, n in counted.items() if n} == {State.CANCELLED: 1, State.QUEUED: 1}
    assert set(counted) == set(State)
