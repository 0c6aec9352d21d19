"""The whole way, as a user goes it: the openai SDK against a real service, Ray, training and vLLM."""

import os
import signal
import time

import openai
import pytest

from tests.actors import running
from tests.e2e.conftest import ENDED, dpo, pairs_file

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(600)]
TWO_WORKERS = {"resources": {"workers": 2}, "learning_rate": 1e-3, "precision": "float32"}


def test_upload_train_publish_deploy_chat(service, client, tiny_model, pairs):
    job = client.fine_tuning.jobs.create(
        model=tiny_model,
        training_file=pairs,
        method=dpo(batch_size=8, n_epochs=2, beta=0.1),
        suffix="e2e",
        seed=7,
        metadata={"purpose": "test"},
        extra_body={**TWO_WORKERS, "eval": {"split": 0.2, "every_steps": 5}, "deploy": True},
    )
    assert job.status in ("validating_files", "queued", "running")
    done = service.wait(job.id)
    assert done.status == "succeeded", (done.error, service.logs(job.id))
    assert done.seed == 7
    assert done.metadata == {"purpose": "test"}
    assert done.trained_tokens > 0
    assert done.fine_tuned_model.startswith("ft:tiny:e2e:")

    train = [e.data for e in service.events(job.id) if e.type == "metrics" and e.data["split"] == "train"]
    assert [d["step"] for d in train] == list(range(1, len(train) + 1))
    assert {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"} <= set(train[0])
    assert train[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    evaluated = [e.data for e in service.events(job.id) if e.type == "metrics" and e.data["split"] == "eval"]
    assert evaluated[-1]["rewards/margins"] > 0.05

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints[0].step_number == train[-1]["step"]
    assert client.models.retrieve(done.fine_tuned_model).id == done.fine_tuned_model
    assert client.models.retrieve(checkpoints[0].fine_tuned_model_checkpoint)

    wait_deployed(client, done.fine_tuned_model)
    chat(client, done.fine_tuned_model)
    client.delete(f"/deployments/{done.fine_tuned_model}", cast_to=object)


def wait_deployed(client, model):
    """Chat answers 503 with Retry-After until the model is up."""
    patient = client.with_options(max_retries=0)
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        try:
            return patient.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=1
            )
        except openai.NotFoundError:  # `deploy: true` is acted on a moment after the job has succeeded
            time.sleep(0.5)
        except openai.InternalServerError as error:
            assert error.status_code == 503, error
            assert int(error.response.headers["retry-after"]) > 0
            time.sleep(1)
    raise AssertionError(f"{model} was not served in time: {client.get('/deployments', cast_to=object)}")


def chat(client, model):
    messages = [{"role": "user", "content": "Which colour has the red cat number 1?"}]
    raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, max_tokens=16, temperature=0)
    answer = raw.parse()
    assert answer.model == model
    assert answer.usage.completion_tokens > 0
    assert len(raw.headers["x-dpo-checkpoint"]) == 64
    stream = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert streamed == answer.choices[0].message.content
    completion = client.completions.create(model=model, prompt="The cat", max_tokens=4)
    assert completion.choices[0].finish_reason in ("length", "stop")


def test_pause_resume_and_cancel_a_running_job(service, client, tiny_model, pairs, ray_cluster):
    """A pause frees the workers; what follows it is the history of an unbroken run. A cancellation ends it."""
    job = client.fine_tuning.jobs.create(
        model=tiny_model,
        training_file=pairs,
        method=dpo(batch_size=2, n_epochs=50),
        extra_body={"learning_rate": 1e-4},
    )
    service.wait_for_step(job.id, 3)
    assert client.fine_tuning.jobs.pause(job.id).model_extra["state"] == "pausing"
    paused = service.wait_for_state(job.id, "paused")
    assert (paused.status, paused.finished_at) == ("queued", None)
    wait_until_no_worker_is_left(ray_cluster)
    reached = max(service.steps(job.id))
    assert client.fine_tuning.jobs.resume(job.id).model_extra["state"] == "queued"
    service.wait_for_step(job.id, reached + 3)
    assert any(f"resuming from step {reached}" in event.message for event in service.events(job.id))
    client.fine_tuning.jobs.cancel(job.id)
    cancelled = service.wait(job.id, timeout=60)
    assert cancelled.status == "cancelled"
    assert cancelled.fine_tuned_model is None
    steps = service.steps(job.id)
    assert steps == list(range(1, len(steps) + 1))
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)


def wait_until_no_worker_is_left(cluster, timeout=30):
    """Ray ends the actors of a job that has ended within moments."""
    deadline = time.monotonic() + timeout
    while left := training_workers(cluster):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def test_killed_api_and_killed_worker_cost_nothing(service, client, tiny_model, tmp_path, ray_cluster):
    """SIGKILL of a training worker, then of the API while the run resumes: it ends, and its history is whole."""
    file = client.files.create(file=pairs_file(tmp_path / "pairs.jsonl", 200, seed=1), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=tiny_model,
        training_file=file.id,
        method=dpo(batch_size=2, n_epochs=10),
        extra_body={**TWO_WORKERS, "checkpoint": {"every_steps": 20}, "deduplicate": False},
    )
    service.wait_for_step(job.id, 25)
    os.kill(training_workers(ray_cluster)[0].pid, signal.SIGKILL)
    service.kill()
    time.sleep(3)
    service.up()
    done = service.wait(job.id, timeout=240)
    assert done.status == "succeeded", (done.error, service.logs(job.id))
    assert sorted(service.steps(job.id)) == list(range(1, 1001))
    assert any("resum" in e.message.lower() for e in service.events(job.id))


def training_workers(cluster):
    """The processes of Ray Train's workers on this cluster, by the title Ray gives them."""
    return running(cluster.temp_dir, "RayTrainWorker")


def test_a_second_up_says_who_holds_the_directory(service):
    result = service.dpo("up", "--port", str(service.port + 1), check=False)
    assert result.returncode == 5
    assert str(service.pid) in result.stderr
    assert service.url in result.stderr


def test_refusals_name_the_field_and_leave_nothing(client, tiny_model, pairs):
    before = len(client.fine_tuning.jobs.list().data)
    for extra, param in [
        ({"learning_rte": 1e-4}, "learning_rte"),
        ({"resources": {"workers": 500}}, "resources.workers"),
        ({"resources": {"gpus_per_worker": 1, "workers": 64}}, "resources"),
    ]:
        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.jobs.create(model=tiny_model, training_file=pairs, method=dpo(), extra_body=extra)
        assert refused.value.param.startswith(param)
    with pytest.raises(openai.BadRequestError, match="nowhere"):
        client.fine_tuning.jobs.create(model="nowhere", training_file=pairs, method=dpo())
    with pytest.raises(openai.BadRequestError, match="batch_size"):
        client.fine_tuning.jobs.create(model=tiny_model, training_file=pairs, method=dpo(batch_size=256))
    assert len(client.fine_tuning.jobs.list().data) == before
    assert all(job.status in ENDED for job in client.fine_tuning.jobs.list().data)
