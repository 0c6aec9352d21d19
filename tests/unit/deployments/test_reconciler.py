"""From a row to a served model, whatever happens on the way."""

import asyncio
from types import SimpleNamespace

import pytest

from dpo_service.cluster.port import AppState, Capacity
from dpo_service.deployments.reconciler import FAILED_APP_KEPT
from dpo_service.errors import NotFound
from dpo_service.registry import models


async def test_a_deployment_comes_up(world):
    name = await world.deploy("one")
    assert await world.state(name) == "pending"
    await world.tick()
    assert await world.state(name) == "starting"
    world.cluster.set_app(name, AppState.RUNNING)
    await world.tick()
    assert await world.state(name) == "running"
    args = world.cluster.applications[name].args
    assert args["model_id"] == "one"
    assert args["model_path"] == str(world.store.path("models/one"))
    assert args["engine"]["gpus"] == 0


async def test_the_list_is_put_once_while_nothing_changes(world):
    name = await world.deploy("one")
    await world.tick(3)
    world.cluster.set_app(name, AppState.RUNNING)
    await world.tick(3)
    assert world.cluster.lists == [[name]]


async def test_serve_is_not_started_for_nothing(world):
    await world.tick(2)
    assert world.cluster.lists == []


async def test_a_restart_puts_the_same_list_and_leaves_replicas_alone(world):
    name = await world.deploy("one")
    await world.tick()
    world.cluster.set_app(name, AppState.RUNNING)
    before = world.cluster.applications[name]
    world.restart()
    await world.tick(2)
    assert world.cluster.applications[name] == before
    assert await world.state(name) == "running"


async def test_an_application_the_cluster_lost_is_asked_for_again(world):
    name = await world.deploy("one")
    await world.tick()
    world.cluster.set_app(name, AppState.RUNNING)
    await world.tick()
    world.cluster.set_app(name, AppState.ABSENT)
    await world.tick()
    assert await world.state(name) == "starting"
    assert world.cluster.lists == [[name], [name]]


async def test_an_unreachable_cluster_changes_nothing(world):
    name = await world.deploy("one")
    await world.tick()
    world.cluster.set_app(name, AppState.RUNNING)
    await world.tick()
    world.cluster.unreachable = True
    await world.tick(3)
    assert await world.state(name) == "running"


async def test_a_refused_list_is_told_and_tried_again(world):
    name = await world.deploy("one")
    seeing = world.cluster.observe_applications

    async def see_none():
        return {}

    world.cluster.unreachable, world.cluster.observe_applications = True, see_none
    await world.tick()
    row = await world.row(name)
    assert row.state == "pending"
    assert "cannot be reached" in row.message
    world.cluster.unreachable, world.cluster.observe_applications = False, seeing
    await world.tick()
    assert await world.state(name) == "starting"


async def test_a_failure_is_told_in_a_sentence_and_disturbs_nobody(world):
    good, bad = await world.deploy("one"), await world.deploy("two")
    await world.tick()
    world.cluster.set_app(good, AppState.RUNNING)
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in y\nValueError: no such rope type'
    world.cluster.set_app(bad, AppState.FAILED, f"Failed to update the deployments.\n{trace}")
    await world.tick(2)
    assert await world.state(good) == "running"
    row = await world.row(bad)
    assert (row.state, row.message) == ("failed", "ValueError: no such rope type")
    assert world.cluster.lists == [[good, bad]]


async def test_a_failed_application_is_taken_away_after_a_while_and_its_row_stays(world):
    good, bad = await world.deploy("one"), await world.deploy("two")
    await world.tick()
    world.cluster.set_app(bad, AppState.FAILED, "ValueError: broken")
    await world.tick()
    world.clock.advance(FAILED_APP_KEPT.total_seconds() + 1)
    await world.tick(2)
    assert world.cluster.lists[-1] == [good]
    assert (await world.row(bad)).message == "ValueError: broken"
    assert await world.state(bad) == "failed"


async def test_a_failed_application_that_recovers_runs(world):
    name = await world.deploy("one")
    await world.tick()
    world.cluster.set_app(name, AppState.FAILED, "unhealthy")
    await world.tick()
    world.cluster.set_app(name, AppState.RUNNING)
    await world.tick()
    assert await world.state(name) == "running"


async def test_delete_takes_the_application_away_and_then_the_row(world):
    kept, gone = await world.deploy("one"), await world.deploy("two")
    await world.tick()
    await world.delete(gone)
    assert await world.state(gone) == "deleting"
    await world.tick()
    assert list(world.cluster.applications) == [kept]
    await world.tick()
    with pytest.raises(NotFound):
        await world.row(gone)


async def test_the_last_one_deleted_leaves_an_empty_list(world):
    name = await world.deploy("one")
    await world.tick()
    await world.delete("one")
    await world.tick(2)
    assert world.cluster.lists == [[name], []]
    assert world.cluster.applications == {}


async def test_a_deployment_deleted_before_it_was_asked_for_is_never_asked_for(world):
    name = await world.deploy("one")
    await world.delete(name)
    await world.tick()
    assert world.cluster.lists == []
    with pytest.raises(NotFound):
        await world.row(name)


async def test_applications_of_rows_that_are_gone_are_swept_after_a_restart(world):
    name = await world.deploy("one")
    await world.tick()
    await world.delete(name)
    world.restart()
    await world.tick(2)
    assert world.cluster.applications == {}


async def test_gpus_left_open_are_decided_once(world):
    world.cluster.capacity_value = Capacity(cpus=8, gpus=2)
    name = await world.deploy("one")
    await world.tick()
    assert world.cluster.applications[name].args["engine"]["gpus"] == 1
    world.cluster.capacity_value = Capacity(cpus=8, gpus=0)
    world.restart()
    await world.tick()
    assert world.cluster.applications[name].args["engine"]["gpus"] == 1


async def test_a_jobs_model_is_deployed_in_the_transaction_that_publishes_it(world):
    job = SimpleNamespace(fine_tuned_model="ft:one::abc")
    facts = {"job_id": "ftjob-abc", "key": "jobs/ftjob-abc/checkpoints/step-1/model", "digest": "d" * 64}
    with pytest.raises(RuntimeError):
        async with world.database.begin() as session:
            await models.publish(session, job.fine_tuned_model, base="one", created_at=world.clock.now(), **facts)
            await world.reconciler.deploy_job(session, job)
            raise RuntimeError("the process dies before the commit")
    with pytest.raises(NotFound):
        await world.row(job.fine_tuned_model)
    async with world.database.begin() as session:
        await models.publish(session, job.fine_tuned_model, base="one", created_at=world.clock.now(), **facts)
        await world.reconciler.deploy_job(session, job)
    row = await world.row(job.fine_tuned_model)
    await world.tick()
    args = world.cluster.applications[row.id].args
    assert args["checkpoint_digest"] == "d" * 64
    assert args["model_path"] == str(world.store.path(facts["key"]))


async def test_run_goes_on_after_an_error_and_ends_when_asked(world):
    stop, ticks = asyncio.Event(), []

    async def tick():
        ticks.append(1)
        if len(ticks) == 1:
            raise OSError("disk on fire")
        if len(ticks) == 3:
            stop.set()

    world.reconciler.tick = tick
    await asyncio.wait_for(world.reconciler.run(stop), 5)
    assert len(ticks) == 3
