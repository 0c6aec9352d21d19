from __future__ import annotations

import pytest

from dpo_service import ids
from dpo_service.errors import Conflict, NotFound, UserError
from dpo_service.jobs import repository
from dpo_service.registry import models
from dpo_service.reports import Report
from dpo_service.storage import paths
from tests.unit.jobs.world import LONGEST_DELAY_S, World, checkpoint_report, metrics_report, progress_report


async def test_a_report_counts_once_however_often_it_comes(either: World) -> None:
    job_id = await either.running()
    reports = [metrics_report(1), metrics_report(2), metrics_report(1)]
    assert await either.ingest(job_id, reports) == 2
    assert await either.ingest(job_id, reports) == 0
    events = [e for e in await either.events(job_id) if e.type == "metrics"]
    assert [e.data["step"] for e in events] == [1, 2]
    assert events[0].created_at.timestamp() == 100.0


async def test_two_jobs_may_use_the_same_keys(world: World) -> None:
    one, other = await world.running(), await world.running()
    assert await world.ingest(one, [metrics_report(1)]) == 1
    assert await world.ingest(other, [metrics_report(1)]) == 1


async def test_a_checkpoint_is_listed_and_can_be_asked_for_by_name(either: World) -> None:
    job_id = await either.running()
    await either.ingest(job_id, [checkpoint_report(job_id, 5), checkpoint_report(job_id, 10)])
    async with either.database.begin() as session:
        rows, more = await repository.list_checkpoints(session, job_id)
        model = await models.get(session, rows[0].model_id)
    assert [(row.step, row.digest, row.metrics) for row in rows] == [(10, "d", {"loss": 0.5}), (5, "d", {"loss": 0.5})]
    assert not more
    assert (model.step, model.key) == (10, f"{paths.checkpoint_dir(job_id, 10)}/model")


async def test_of_a_step_saved_twice_the_later_checkpoint_counts(world: World) -> None:
    job_id = await world.running()
    first, second = checkpoint_report(job_id, 5, "first", 100.0), checkpoint_report(job_id, 5, "second", 200.0)
    await world.ingest(job_id, [first, second])
    await world.ingest(job_id, [first])
    async with world.database.begin() as session:
        rows, _ = await repository.list_checkpoints(session, job_id)
        model = await models.get(session, rows[0].model_id)
    assert [row.digest for row in rows] == ["second"]
    assert model.digest == "second"


async def test_a_pruned_checkpoint_is_neither_listed_nor_a_model_however_often_it_is_read(world: World) -> None:
    job_id = await world.running()
    said = [checkpoint_report(job_id, 5, at=1.0), checkpoint_report(job_id, 10, at=2.0, pruned=[5])]
    for _ in range(2):
        await world.ingest(job_id, said)
        async with world.database.begin() as session:
            rows, _ = await repository.list_checkpoints(session, job_id)
            with pytest.raises(NotFound):
                await models.get(session, ids.checkpoint_model_id(ids.fine_tuned_model_id("base", None, job_id), 5))
        assert [row.step for row in rows] == [10]


async def test_a_dataset_and_progress_are_kept_at_the_job(world: World) -> None:
    job_id = await world.running()
    dataset = Report(key="dataset", created_at=1.0, type="dataset", message="ready", data={"rows": "pairs"})
    assert await world.ingest(job_id, [dataset, progress_report(1, 10.0), progress_report(2, 20.0)]) == 1
    job = await world.job(job_id)
    assert job.dataset == {"rows": "pairs"}
    assert (job.progress["done"], job.progress["since"]) == (2, 10.0)
    assert not [e for e in await world.events(job_id) if e.key.startswith("progress")]


async def test_the_newest_reference_digest_is_kept_at_the_job_and_told(either: World) -> None:
    job_id = await either.running()
    assert (await either.job(job_id)).reference_digest is None

    def said(step: int, digest: str) -> Report:
        data = {"step": step, "digest": digest}
        return Report(key=f"reference:{step}", created_at=float(step), type="reference", message="", data=data)

    await either.ingest(job_id, [said(0, "a" * 64), said(4, "b" * 64)])
    await either.ingest(job_id, [said(0, "a" * 64)])
    assert (await either.job(job_id)).reference_digest == "b" * 64
    assert [e.data["step"] for e in await either.events(job_id) if e.key.startswith("reference")] == [0, 4]


async def test_a_superseded_attempt_is_fenced_off(world: World) -> None:
    job_id = await world.running()
    world.die(job_id)
    await world.tick()
    # Dead, but not yet followed: what it said last still counts.
    assert await world.ingest(job_id, [metrics_report(1)]) == 1
    world.clock.advance(LONGEST_DELAY_S)
    await world.tick()
    with pytest.raises(Conflict, match="superseded") as refused:
        await world.ingest(job_id, [metrics_report(2)], attempt=1)
    assert refused.value.code == "superseded"
    assert await world.ingest(job_id, [metrics_report(2)], attempt=2) == 1


async def test_late_reports_of_an_ended_job_are_taken(world: World) -> None:
    job_id = await world.running()
    world.succeed(job_id)
    await world.tick()
    assert await world.ingest(job_id, [metrics_report(1)]) == 1


async def test_an_unknown_attempt_is_not_found(world: World) -> None:
    with pytest.raises(NotFound, match="dpo-none-1"):
        await world.ingest("ftjob-none", [metrics_report(1)])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": None}, "data.step"),
        ({"data": {"step": 5, "key": "jobs/other/checkpoints/x", "digest": "d", "metrics": {}}}, "not where step 5"),
    ],
)
async def test_a_checkpoint_that_makes_no_sense_is_refused_whole(world: World, change: dict, match: str) -> None:
    job_id = await world.running()
    wrong = checkpoint_report(job_id, 5).model_copy(update=change)
    with pytest.raises(UserError, match=match):
        await world.ingest(job_id, [metrics_report(1), wrong])
    assert await world.ingest(job_id, [metrics_report(1)]) == 1


async def test_the_token_admits_its_own_attempt_only(world: World) -> None:
    from dpo_service.errors import Unauthorized
    from dpo_service.specs.run import AttemptSpec

    one, other = await world.running(), await world.running()
    token = world.store.read_model(paths.attempt_spec(one, 1), AttemptSpec).report_token
    async with world.database.begin() as session:
        assert (await repository.authenticate(session, ids.submission_id(one, 1), token)).job_id == one
        for submission, given in [(other, token), (one, "guess"), ("ftjob-none", token)]:
            with pytest.raises(Unauthorized):
                await repository.authenticate(session, ids.submission_id(submission, 1), given)
