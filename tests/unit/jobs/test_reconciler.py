from __future__ import annotations

import asyncio
import sys
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service import ids
from dpo_service.db.base import Base
from dpo_service.errors import UserError
from dpo_service.jobs import repository
from dpo_service.jobs.cancel import cancel
from dpo_service.jobs.states import State
from dpo_service.jobs.tables import Job
from dpo_service.registry import models
from dpo_service.specs.run import AttemptSpec
from dpo_service.storage import paths
from tests.unit.jobs.world import LONGEST_DELAY_S, World, checkpoint_report, metrics_report, progress_report


async def test_a_job_goes_from_the_queue_to_a_published_model(world: World) -> None:
    job_id = await world.running()
    world.succeed(job_id)
    await world.tick()
    job = await world.job(job_id)
    assert job.job_state is State.SUCCEEDED
    assert job.fine_tuned_model == ids.fine_tuned_model_id("base", None, job_id)
    assert (job.trained_tokens, job.error_code) == (1234, None)
    assert job.started_at is not None
    assert job.finished_at is not None
    async with world.database.begin() as session:
        model = await models.get(session, job.fine_tuned_model)
    assert (model.key, model.digest, model.job_id) == (f"{paths.checkpoint_dir(job_id, 5)}/model", "d5", job_id)


async def test_the_moves_in_the_events_tell_the_way_and_the_actors(world: World) -> None:
    job_id = await world.running()
    world.succeed(job_id)
    await world.tick()
    moves = [(e.actor, e.from_state, e.to_state) for e in await world.events(job_id) if e.to_state]
    assert moves == [
        ("user", None, "queued"),
        ("reconciler", "queued", "submitting"),
        ("reconciler", "submitting", "running"),
        ("reconciler", "running", "succeeded"),
    ]


async def test_the_attempt_is_told_what_to_run_and_where_to_report(world: World) -> None:
    job_id = await world.submit()
    await world.tick()
    submission_id = ids.submission_id(job_id, 1)
    document = world.store.read_model(paths.attempt_spec(job_id, 1), AttemptSpec)
    assert document.run.job_id == job_id
    assert document.report_url == f"http://control:8000/internal/attempts/{submission_id}/reports"
    (submission,) = world.cluster.submissions
    assert submission.entrypoint[1:] == ("-m", "dpo_service.runner", str(world.store.root), job_id, "1")
    async with world.database.begin() as session:
        attempt = await repository.authenticate(session, submission_id, document.report_token)
    assert attempt.job_id == job_id


async def test_the_token_of_an_attempt_is_for_its_owner_alone(world: World) -> None:
    job_id = await world.submit()
    await world.tick()
    key = paths.attempt_spec(job_id, 1)
    assert world.store.path(key).stat().st_mode & 0o777 == 0o600
    token = world.store.read_model(key, AttemptSpec).report_token
    (submission,) = world.cluster.submissions
    assert token not in str(submission)
    async with world.database.begin() as session:
        for table in Base.metadata.sorted_tables:
            assert token not in str((await session.execute(table.select())).all())


async def test_a_local_ray_runs_our_own_interpreter(world: World) -> None:
    await world.submit()
    await world.reconciler(cluster="local").tick()
    assert world.cluster.submissions[0].entrypoint[0] == sys.executable


async def test_jobs_start_in_the_order_they_came_and_only_so_many(world: World) -> None:
    world.current = world.reconciler(max_running_jobs=2)
    jobs = [await world.submit() for _ in range(3)]
    await world.tick(3)
    assert [await world.state(j) for j in jobs] == [State.SUBMITTING, State.SUBMITTING, State.QUEUED]
    world.succeed(jobs[0])
    await world.tick(2)
    assert await world.state(jobs[2]) is State.SUBMITTING


async def test_a_job_that_died_is_tried_again_after_a_delay(world: World) -> None:
    job_id = await world.running()
    world.die(job_id)
    await world.tick(3)
    job = await world.job(job_id)
    assert (job.job_state, job.attempt) == (State.QUEUED, 1)
    assert timedelta(seconds=12) <= job.not_before - world.clock.now() <= timedelta(seconds=18)
    world.clock.advance(18)
    await world.tick()
    assert (await world.job(job_id)).attempt == 2
    assert world.submissions_of(job_id) == [ids.submission_id(job_id, 1), ids.submission_id(job_id, 2)]


async def test_after_the_last_attempt_the_job_has_failed_and_says_why(world: World) -> None:
    job_id = await world.submit()
    for attempt in (1, 2, 3):
        world.clock.advance(LONGEST_DELAY_S)
        await world.tick()
        world.die(job_id, attempt)
        await world.tick()
    job = await world.job(job_id)
    assert (job.job_state, job.error_code) == (State.FAILED, "attempt_died")
    assert "killed" in job.error_message
    assert "attempt 3 of 3" in (await world.events(job_id))[-1].message


@pytest.mark.parametrize("code", ["invalid_data", "non_finite_loss", "published_differs"])
async def test_a_failure_that_would_come_again_is_not_retried(world: World, code: str) -> None:
    job_id = await world.running()
    world.fail(job_id, error_code=code, error_param="training_file", retryable=False)
    await world.tick()
    job = await world.job(job_id)
    assert job.job_state is State.FAILED
    assert (job.error_code, job.error_message, job.error_param) == (code, "boom", "training_file")


async def test_success_without_a_checkpoint_is_no_success(world: World) -> None:
    job_id = await world.running()
    world.succeed(job_id)
    world.store.delete(f"{paths.checkpoint_dir(job_id, 5)}/manifest.json")
    await world.tick()
    assert await world.state(job_id) is State.QUEUED
    assert "checkpoint does not stand" in (await world.events(job_id))[-1].message


async def test_another_checkpoint_than_the_one_reported_is_no_success(world: World) -> None:
    job_id = await world.running()
    world.write_result(job_id, 1, "succeeded", checkpoint_digest="other")
    world.cluster.finish(ids.submission_id(job_id, 1))
    await world.tick()
    assert await world.state(job_id) is State.QUEUED


async def test_an_attempt_ended_from_outside_is_tried_again(world: World) -> None:
    job_id = await world.running()
    world.stop(job_id)
    await world.tick()
    assert await world.state(job_id) is State.QUEUED


async def test_a_torn_result_counts_as_a_death(world: World) -> None:
    job_id = await world.running()
    world.store.write(paths.attempt_result(job_id, 1), b'{"job_id": "')
    world.cluster.finish(ids.submission_id(job_id, 1))
    await world.tick()
    assert await world.state(job_id) is State.QUEUED


async def test_what_never_came_over_http_is_read_from_the_spool_once(world: World) -> None:
    job_id = await world.running()
    reports = [metrics_report(step) for step in range(450)] + [checkpoint_report(job_id, 5)]
    assert await world.ingest(job_id, reports[:200]) == 200
    world.spool(job_id, reports)
    world.spool(job_id, reports[:10], source="driver-again")
    world.succeed(job_id)
    await world.tick()
    keys = [event.key for event in await world.events(job_id)]
    assert sorted(k for k in keys if k.startswith("metrics")) == sorted(r.key for r in reports[:450])
    assert keys.count("checkpoint:5") == 1


async def test_a_damaged_spool_does_not_keep_a_job_from_ending(world: World) -> None:
    job_id = await world.running()
    world.spool(job_id, [metrics_report(1)])
    world.spool(job_id, [metrics_report(2)], source="torn").write_bytes(b'{"key": 1}\nnot json\n')
    nonsense = checkpoint_report(job_id, 5).model_copy(update={"key": "x", "data": {"step": "five"}})
    world.spool(job_id, [nonsense, metrics_report(3)], source="nonsense")
    world.succeed(job_id)
    await world.tick()
    assert await world.state(job_id) is State.SUCCEEDED
    events = {event.key: event for event in await world.events(job_id)}
    assert {"metrics:train:1", "metrics:train:3"} <= set(events)
    assert "torn.jsonl" in events["spool-damaged:1"].message


async def test_a_short_attempt_may_end_unseen(world: World) -> None:
    job_id = await world.submit()
    await world.tick()
    world.succeed(job_id)
    await world.tick()
    job = await world.job(job_id)
    assert job.job_state is State.SUCCEEDED
    assert job.started_at is not None


async def test_not_to_see_changes_nothing(world: World) -> None:
    running, queued = await world.running(), await world.submit()
    world.cluster.unreachable = True
    before = len(await world.events(running))
    for _ in range(20):  # ten minutes
        world.clock.advance(30)
        await world.tick()
    assert await world.state(running) is State.RUNNING
    assert len(await world.events(running)) == before
    # The queued one got as far as it can without a cluster, and says so once.
    assert await world.state(queued) is State.SUBMITTING
    assert sum("does not take the job" in e.message for e in await world.events(queued)) == 1
    world.cluster.unreachable = False
    await world.tick(2)
    assert await world.state(running) is State.RUNNING
    assert world.submissions_of(queued) == [ids.submission_id(queued, 1)]


async def test_a_cluster_that_lost_its_memory_gets_the_next_attempt(world: World) -> None:
    job_id = await world.running()
    world.cluster.forget(ids.submission_id(job_id, 1))
    await world.tick()
    assert await world.state(job_id) is State.QUEUED
    world.clock.advance(LONGEST_DELAY_S)
    await world.tick()
    assert world.submissions_of(job_id)[-1] == ids.submission_id(job_id, 2)


async def test_a_new_reconciler_goes_on_where_the_last_one_was(world: World) -> None:
    running, queued = await world.running(), await world.submit()
    await cancel(world.database, await world.submit(), clock=world.clock)
    world.current = world.reconciler()
    world.succeed(running)
    await world.tick(2)
    assert await world.state(running) is State.SUCCEEDED
    assert await world.state(queued) is State.SUBMITTING
    assert len(world.submissions_of(running)) == 1


async def test_what_follows_from_a_job_with_deploy_is_committed_with_it(world: World) -> None:
    seen: list[tuple[str, str | None]] = []

    async def on_published(session: AsyncSession, job: Job) -> None:
        await models.get(session, str(job.fine_tuned_model))
        seen.append((job.id, job.fine_tuned_model))

    world.current = world.reconciler(on_published=on_published)
    with_deploy, without = await world.running(deploy=True), await world.running()
    world.succeed(with_deploy)
    world.succeed(without)
    await world.tick(2)
    assert seen == [(with_deploy, (await world.job(with_deploy)).fine_tuned_model)]


async def test_a_deployment_that_cannot_be_had_does_not_undo_the_training(world: World) -> None:
    async def on_published(_session: AsyncSession, _job: Job) -> None:
        raise UserError("no room")

    world.current = world.reconciler(on_published=on_published)
    job_id = await world.running(deploy=True)
    world.succeed(job_id)
    await world.tick()
    assert await world.state(job_id) is State.SUCCEEDED
    assert any(e.level == "warn" and "no room" in e.message for e in await world.events(job_id))


async def test_one_job_that_cannot_be_looked_at_does_not_hold_up_the_others(world: World) -> None:
    broken, fine = await world.submit(), await world.submit()
    await world.run_sql(f"UPDATE jobs SET run = '{{}}' WHERE id = '{broken}'")
    await world.tick()
    assert await world.state(fine) is State.SUBMITTING


async def test_progress_of_a_dead_attempt_is_forgotten(world: World) -> None:
    job_id = await world.running()
    await world.ingest(job_id, [progress_report(1, 100.0)])
    assert (await world.job(job_id)).progress is not None
    world.die(job_id)
    await world.tick()
    assert (await world.job(job_id)).progress is None


async def test_wake_makes_the_next_tick_immediate(world: World) -> None:
    reconciler = world.reconciler(reconcile_every_s=60)
    stop = asyncio.Event()
    task = asyncio.create_task(reconciler.run(stop))
    await asyncio.sleep(0.05)
    job_id = await world.submit()
    reconciler.wake()
    async with asyncio.timeout(5):
        while await world.state(job_id) is State.QUEUED:
            await asyncio.sleep(0.01)
        stop.set()
        await task


async def test_an_error_does_not_end_the_loop(world: World) -> None:
    reconciler = world.reconciler(reconcile_every_s=0.01)
    await world.run_sql("ALTER TABLE jobs RENAME TO elsewhere")
    stop = asyncio.Event()
    task = asyncio.create_task(reconciler.run(stop))
    await asyncio.sleep(0.05)
    await world.run_sql("ALTER TABLE elsewhere RENAME TO jobs")
    job_id = await world.submit()
    async with asyncio.timeout(5):
        while await world.state(job_id) is State.QUEUED:
            await asyncio.sleep(0.01)
        stop.set()
        await task
