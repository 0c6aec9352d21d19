"""Jobs through the official client: made, listed, watched, paused, cancelled."""

import asyncio
import json

import openai
import pytest

from dpo_service.jobs import moves, repository
from dpo_service.jobs.ingest import record
from dpo_service.jobs.states import Move
from dpo_service.jobs.tables import Job, JobAttempt
from dpo_service.reports import Report
from dpo_service.storage import paths
from tests.api.conftest import lines, save_model

UNWEIGHTED = {"wpo": False, "ld_alpha": 1}
ALWAYS = ("batch_size", "n_epochs", "learning_rate_multiplier")


async def move(api, job_id, *made):
    async with api.database.begin() as session:
        job = await session.get(Job, job_id)
        for one in made:
            moves.apply(session, job, one, actor="reconciler", reason=one.value, now=api.clock.now())


async def report(api, job_id, *reports):
    async with api.database.begin() as session:
        await record(session, await session.get(Job, job_id), reports)


def metrics(step, **values):
    data = {"step": step, "split": "train", **values}
    key = f"metrics:train:{step}"
    return Report(key=key, created_at=1_700_000_000.0 + step, type="metrics", message=f"step {step}", data=data)


def progress(step, at):
    data = {"stage": "train", "done": step, "total": 10}
    return Report(key=f"progress:{step}", created_at=at, type="progress", message=f"step {step}", data=data)


def checkpoint(job_id, step):
    data = {"step": step, "key": paths.checkpoint_dir(job_id, step), "digest": "d" * 64, "metrics": {"loss": 0.5}}
    return Report(key=f"checkpoint:{step}", created_at=1.7e9 + step, type="checkpoint", message="saved", data=data)


async def test_create_answers_with_every_number_decided(api):
    file = await api.upload()
    job = await api.job(
        file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "batch_size": 4}}},
        suffix="mine",
        seed=3,
        metadata={"team": "a"},
        extra_body={"learning_rate": 1e-4, "max_steps": 5, "shuffle": False},
    )
    assert job.id.startswith("ftjob-")
    assert (job.status, job.object, job.model, job.seed) == ("queued", "fine_tuning.job", "tiny", 3)
    assert job.training_file == file.id
    assert job.fine_tuned_model is None
    assert job.error is None
    assert job.metadata == {"team": "a"}
    assert job.method.type == "dpo"
    assert job.method.dpo.hyperparameters.beta == 0.3
    assert job.hyperparameters.batch_size == 4
    assert isinstance(job.hyperparameters.n_epochs, int)
    assert job.model_extra["state"] == "queued"
    assert job.model_extra["run"]["optim"]["learning_rate"] == 1e-4
    assert job.model_extra["run"]["data"]["shuffle"] is False
    assert job.model_extra["output_model"].startswith("ft:tiny:mine:")
    assert api.changes == 1
    assert (await api.sdk.fine_tuning.jobs.retrieve(job.id)).id == job.id


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (
            {"type": "dpo"},
            {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0, "length_penalty": 0, "rpo_alpha": 0, **UNWEIGHTED},
        ),
        (
            {"type": "dpo", "dpo": {"hyperparameters": {"loss": "discopop", "rpo_alpha": 0.5}}},
            {"loss": "discopop", "beta": 0.1, "discopop_tau": 0.05, "rpo_alpha": 0.5, **UNWEIGHTED},
        ),
        (
            {"type": "dpo", "dpo": {"hyperparameters": {"losses": {"sigmoid": 0.8, "nca_pair": 0.2, "sft": 1}}}},
            {"losses": {"sigmoid": 0.8, "nca_pair": 0.2, "sft": 1}, "wpo": False},
        ),
        ({"type": "kto"}, {"beta": 0.1, "desirable_weight": 1, "undesirable_weight": 1}),
        ({"type": "orpo"}, {"lam": 0.1}),
        ({"type": "ipo"}, {"beta": 0.1, "length_normalize": True, "rpo_alpha": 0, "wpo": False}),
    ],
)
async def test_a_job_shows_the_numbers_its_loss_takes_and_can_be_sent_again(api, asked, shown):
    file = await api.upload()
    body = {"model": "tiny", "training_file": file.id, "method": asked}
    first = (await api.http.post("/v1/fine_tuning/jobs", json=body)).json()
    numbers = first["method"][asked["type"]]["hyperparameters"]
    assert {name: numbers[name] for name in numbers if name not in ALWAYS} == shown
    again = (await api.http.post("/v1/fine_tuning/jobs", json=body | {"method": first["method"]})).json()
    assert again["run"]["loss"] == first["run"]["loss"]


async def test_job_shows_nothing_of_where_things_lie(api):
    file = await api.upload()
    job = await api.job(file.id)
    assert str(api.settings.data_dir) not in (await api.http.get(f"/v1/fine_tuning/jobs/{job.id}")).text


async def test_list_pages_newest_first_and_filters_by_metadata(api):
    file = await api.upload()
    made = []
    for number in range(3):
        api.clock.advance(1)
        made.append((await api.job(file.id, metadata={"n": str(number), 'key "quoted"': "x"})).id)
    first = await api.sdk.fine_tuning.jobs.list(limit=2)
    assert [job.id for job in first.data] == made[:0:-1]
    assert first.has_more
    everything = [job.id async for job in api.sdk.fine_tuning.jobs.list(limit=1)]
    assert everything == made[::-1]
    found = await api.sdk.fine_tuning.jobs.list(metadata={"n": "1"})
    assert [job.id for job in found.data] == [made[1]]
    assert (await api.sdk.fine_tuning.jobs.list(metadata={"n": "7"})).data == []


@pytest.mark.parametrize("query", ["after=nope", "limit=0", "limit=101", "limit=x", 'metadata["]=1', "metadata[]=1"])
async def test_list_refuses_what_it_cannot_do(api, query):
    response = await api.http.get(f"/v1/fine_tuning/jobs?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("after", "limit", "metadata")


async def test_events_and_checkpoints(api):
    job = await api.job((await api.upload()).id)
    await move(api, job.id, Move.SUBMIT, Move.START)
    await report(api, job.id, *(metrics(step, loss=1 / step) for step in range(1, 31)), checkpoint(job.id, 30))
    events = [event async for event in api.sdk.fine_tuning.jobs.list_events(job.id, limit=7)]
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == list(range(30, 0, -1))
    assert events[-1].message.startswith("Created fine-tuning job")
    assert len((await api.sdk.fine_tuning.jobs.list_events(job.id)).data) == 20
    found = (await api.sdk.fine_tuning.jobs.checkpoints.list(job.id)).data
    assert found[0].step_number == 30
    assert found[0].metrics.train_loss == 0.5
    model = await api.sdk.models.retrieve(found[0].fine_tuned_model_checkpoint)
    assert model.model_extra["step"] == 30


async def test_checkpoint_metrics_that_are_no_numbers_are_left_out(api):
    job = await api.job((await api.upload()).id)
    await move(api, job.id, Move.SUBMIT, Move.START)
    saved = checkpoint(job.id, 5)
    await report(api, job.id, saved.model_copy(update={"data": {**saved.data, "metrics": {"loss": None}}}))
    found = (await api.sdk.fine_tuning.jobs.checkpoints.list(job.id)).data
    assert found[0].metrics.train_loss is None


async def test_cancel_once_then_conflict_without_retry(api):
    job = await api.job((await api.upload()).id)
    cancelled = await api.sdk.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    with pytest.raises(openai.ConflictError) as refused:
        await api.sdk.fine_tuning.jobs.cancel(job.id)
    assert refused.value.response.headers["x-should-retry"] == "false"


async def test_pause_and_resume_through_the_sdk(api):
    job = await api.job((await api.upload()).id)
    paused = await api.sdk.fine_tuning.jobs.pause(job.id)
    assert (paused.status, paused.model_extra["state"]) == ("queued", "paused")
    assert (
        paused.model_extra["paused_at"] == paused.model_extra["pause_requested_at"] == int(api.clock.now().timestamp())
    )
    assert (await api.sdk.fine_tuning.jobs.pause(job.id)).model_extra["state"] == "paused"
    resumed = await api.sdk.fine_tuning.jobs.resume(job.id)
    assert (resumed.status, resumed.model_extra["state"]) == ("queued", "queued")
    assert (resumed.model_extra["paused_at"], resumed.model_extra["pause_requested_at"]) == (None, None)
    assert api.changes == 4
    said = [event.message for event in (await api.sdk.fine_tuning.jobs.list_events(job.id)).data]
    assert said[:2] == ["Resumed by the user", "Paused by the user"]


async def test_a_running_job_is_pausing_until_its_attempt_is_gone(api):
    job = await api.job((await api.upload()).id)
    await move(api, job.id, Move.SUBMIT, Move.START)
    await report(api, job.id, progress(1, at=100.0), progress(2, at=101.0))
    assert (await api.sdk.fine_tuning.jobs.retrieve(job.id)).estimated_finish == 109
    pausing = await api.sdk.fine_tuning.jobs.pause(job.id)
    assert (pausing.status, pausing.model_extra["state"], pausing.model_extra["paused_at"]) == (
        "running",
        "pausing",
        None,
    )
    with pytest.raises(openai.ConflictError, match="still pausing") as refused:
        await api.sdk.fine_tuning.jobs.resume(job.id)
    assert refused.value.response.headers["x-should-retry"] == "false"
    await move(api, job.id, Move.STOP)
    found = await api.sdk.fine_tuning.jobs.retrieve(job.id)
    assert (found.status, found.model_extra["state"], found.finished_at) == ("queued", "paused", None)
    assert (found.estimated_finish, found.model_extra["progress"]["done"]) == (None, 2)


@pytest.mark.parametrize("wish", ["pause", "resume"])
async def test_an_ended_or_unknown_job_is_neither_paused_nor_resumed(api, wish):
    job = await api.job((await api.upload()).id)
    await api.sdk.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.ConflictError, match=f"can be {wish}d"):
        await getattr(api.sdk.fine_tuning.jobs, wish)(job.id)
    with pytest.raises(openai.NotFoundError, match="ftjob-none"):
        await getattr(api.sdk.fine_tuning.jobs, wish)("ftjob-none")


async def test_failed_job_says_why(api):
    job = await api.job((await api.upload()).id)
    await move(api, job.id, Move.SUBMIT, Move.START, Move.FAIL)
    async with api.database.begin() as session:
        row = await session.get(Job, job.id)
        row.error_code, row.error_message = "training_failed", "it broke"
    failed = await api.sdk.fine_tuning.jobs.retrieve(job.id)
    assert (failed.status, failed.error.code, failed.error.message) == ("failed", "training_failed", "it broke")


async def test_stream_follows_the_job_to_its_end(api, monkeypatch):
    monkeypatch.setattr("dpo_service.api.event_stream.LOOK_EVERY_S", 0.01)
    job = await api.job((await api.upload()).id)
    await move(api, job.id, Move.SUBMIT, Move.START)

    async def train():
        for step in range(1, 4):
            await report(api, job.id, metrics(step))
            await asyncio.sleep(0.03)
        await move(api, job.id, Move.SUCCEED)

    _, response = await asyncio.gather(train(), api.http.get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"))
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [frame.split("\n") for frame in response.text.strip().split("\n\n")]
    assert frames[-1] == ["data: [DONE]"]
    sent = [json.loads(line[6:]) for frame in frames[:-1] for line in frame if line.startswith("data: ")]
    assert [event["data"]["step"] for event in sent if event["type"] == "metrics"] == [1, 2, 3]
    assert sent[-1]["state"] == "succeeded"
    again = await api.http.get(
        f"/v1/fine_tuning/jobs/{job.id}/events?stream=true", headers={"last-event-id": str(sent[-2]["sequence"])}
    )
    assert [line for line in again.text.splitlines() if line.startswith("id:")] == [f"id: {sent[-1]['sequence']}"]


async def test_stream_refuses_a_sequence_that_is_none(api):
    job = await api.job((await api.upload()).id)
    response = await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true&after=ftevent-x")
    assert response.status_code == 400


async def test_logs_come_from_the_cluster(api):
    job = await api.job((await api.upload()).id)
    assert (await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/logs")).text == ""
    async with api.database.begin() as session:
        (await session.get(Job, job.id)).attempt = 1
    api.cluster.print(f"dpo-{job.id.removeprefix('ftjob-')}-1", "hello\n")
    response = await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/logs")
    assert response.text == "hello\n"
    assert response.headers["content-type"].startswith("text/plain")


async def test_dataset_report_in_the_models_tokens(api):
    job = await api.job((await api.upload()).id)
    found = (await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/dataset")).json()
    assert found["report"]["rows"] == 16
    assert found["report"]["chosen_tokens"]["max"] > 0


@pytest.mark.parametrize("path", ["", "/events", "/events?stream=true", "/checkpoints", "/logs", "/dataset"])
async def test_unknown_job_is_404(api, path):
    response = await api.http.get(f"/v1/fine_tuning/jobs/ftjob-none{path}")
    assert response.status_code == 404
    assert "ftjob-none" in response.json()["error"]["message"]


async def test_supervised_job(api):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(8)
    ]
    file = await api.upload(lines(rows))
    assert file.model_extra["rows"] == "answers"
    job = await api.job(file.id, method={"type": "supervised"})
    assert job.method.type == "supervised"
    assert job.model_extra["run"]["reference"]["mode"] == "none"


async def test_job_from_an_earlier_result(api):
    save_model(api.store.root / "jobs" / "x" / "model")
    from dpo_service.registry import models

    async with api.database.begin() as session:
        await models.publish(
            session,
            "ft:tiny::x",
            job_id="ftjob-x",
            key="jobs/x/model",
            digest="d",
            base="tiny",
            created_at=api.clock.now(),
        )
    job = await api.job((await api.upload()).id, model="ft:tiny::x")
    assert job.model == "ft:tiny::x"
    with pytest.raises(openai.ConflictError, match="base"):
        await api.sdk.models.delete("ft:tiny::x")


# --- reports of running jobs


async def attempt_of(api, job_id, number=1, token="secret"):
    submission = f"dpo-{job_id.removeprefix('ftjob-')}-{number}"
    async with api.database.begin() as session:
        (await session.get(Job, job_id)).attempt = number
        row = JobAttempt(submission_id=submission, job_id=job_id, attempt=number, created_at=api.clock.now())
        row.token_hash = repository.hash_token(token)
        session.add(row)
    return submission


async def test_reports_count_once_and_only_with_the_attempts_token(api):
    job = await api.job((await api.upload()).id)
    submission = await attempt_of(api, job.id)
    path, body = f"/internal/attempts/{submission}/reports", [metrics(1, loss=0.5).model_dump()]
    good = {"authorization": "Bearer secret"}
    assert (await api.http.post(path, json=body, headers=good)).json() == {"new": 1}
    assert (await api.http.post(path, json=body, headers=good)).json() == {"new": 0}
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert (await api.http.post(path, json=body, headers=headers)).status_code == 401
    assert (await api.http.post("/internal/attempts/none/reports", json=body, headers=good)).status_code == 401


async def test_superseded_attempt_is_fenced_off(api):
    job = await api.job((await api.upload()).id)
    first = await attempt_of(api, job.id)
    await attempt_of(api, job.id, 2, "other")
    path, body = f"/internal/attempts/{first}/reports", [metrics(1).model_dump()]
    response = await api.http.post(path, json=body, headers={"authorization": "Bearer secret"})
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "superseded"
