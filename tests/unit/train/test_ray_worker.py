"""The loop under Ray Train: a killed worker costs time and nothing else; what cannot be mended comes out."""

from __future__ import annotations

import json
import threading
import time

import psutil
import pytest

from dpo_service.checkpoint.format import digest_of
from dpo_service.errors import NonFiniteLoss, RecurringError
from dpo_service.reports import read_spool, spool_files
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import AttemptSpec
from dpo_service.storage import paths
from dpo_service.train.ray_worker import fit
from tests.actors import running
from tests.unit.train.training_kit import Job, Recorder, make_job

pytestmark = pytest.mark.ray
TWO = ResourceSpec(workers=2)


def run_attempt(job: Job, feed=None):
    attempt = AttemptSpec(run=job.run, attempt=1, report_url=None, report_token="canary-token")
    job.store.write_model(paths.attempt_spec("j", 1), attempt)
    return fit(job.store, attempt, job.dataset, job.model_dir, digest_of(job.model_dir), feed)


def reports(job: Job):
    files = spool_files(job.store.path(paths.spool_dir("j", 1)))
    return [report for path in files for batch, _ in read_spool(path) for report in batch]


def kill_a_worker(job: Job, temp_dir, after_step: int, killed: list[int]) -> None:
    """SIGKILL one training worker of this cluster once `after_step` steps are reported."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(report.type == "metrics" and report.data["step"] >= after_step for report in reports(job)):
            workers = running(temp_dir, "RayTrainWorker")
            victim = max(workers, key=psutil.Process.create_time)
            killed.append(victim.pid)
            victim.kill()
            return
        time.sleep(0.02)


def test_killed_worker_resumes_from_the_last_checkpoint(tmp_path, model_dir, ray_connected):
    options = {"steps": 60, "save_every_steps": 10, "validation": 0, "keep_checkpoints": 2}
    alone = Recorder()
    make_job(tmp_path / "alone", model_dir, **options).train(reports=alone)
    job = make_job(tmp_path / "ray", model_dir, resources=TWO, **options)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(job, ray_connected.temp_dir, 15, killed))
    killer.start()
    outcome = run_attempt(job)
    killer.join()
    assert len(killed) == 1
    assert (outcome.steps, outcome.stopped, outcome.checkpoint) == (60, False, paths.checkpoint_dir("j", 60))
    starts = [report.message for report in reports(job) if report.message.startswith("Training on")]
    assert starts[0] == "Training on 2 workers, 48 rows, 60 steps"
    assert "resuming from step" in starts[1]
    losses = {r.data["step"]: r.data["loss"] for r in reversed(reports(job)) if r.type == "metrics"}
    expected = {step: values["loss"] for (_, step), values in alone.values.items()}
    assert losses == {step: pytest.approx(loss, rel=1e-3) for step, loss in expected.items()}
    assert not [
        path for path in tmp_path.rglob("*.json") if "canary" in path.read_text() and path.name != "attempt.json"
    ]


def test_sharded_workers_train_what_one_trains(tmp_path, model_dir, ray_connected):
    alone = Recorder()
    make_job(tmp_path / "alone", model_dir, steps=2).train(reports=alone)
    job = make_job(tmp_path / "ray", model_dir, resources=ResourceSpec(workers=2, strategy="fsdp"), steps=2)
    outcome = run_attempt(job)
    assert (outcome.steps, outcome.checkpoint) == (2, paths.checkpoint_dir("j", 2))
    losses = [r.data["loss"] for r in reports(job) if r.type == "metrics" and r.data["split"] == "train"]
    assert losses == pytest.approx(alone.losses(), rel=1e-5)


def test_non_finite_loss_is_not_retried(tmp_path, model_dir, ray_connected):
    job = make_job(tmp_path, model_dir, steps=20)
    job.run = job.run.model_copy(update={"optim": job.run.optim.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(NonFiniteLoss, match=r"step \d+: the (loss|gradient norm) is"):
        run_attempt(job)
    assert len([report for report in reports(job) if report.message.startswith("Training on")]) == 1
    assert json.loads(job.store.read("jobs/j/attempts/1/train.json"))["error"] == "NonFiniteLoss"


def test_stop_flag_saves_and_ends(tmp_path, model_dir, ray_connected):
    job = make_job(tmp_path, model_dir, steps=6)
    job.store.write(paths.stop_flag("j", 1), b"")
    outcome = run_attempt(job)
    assert (outcome.stopped, outcome.steps, outcome.checkpoint) == (True, 0, None)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_that_would_come_again_ends_the_run_at_once(tmp_path, model_dir, ray_connected, workers):
    """On the last rank alone, while the others wait for it."""
    job = make_job(tmp_path, model_dir, steps=2, resources=ResourceSpec(workers=workers))
    tries = tmp_path / "tries"

    def broken(run, dataset, store, ranks):
        from dpo_service.train.feed import Feed

        if ranks.rank == ranks.world - 1:
            with tries.open("a") as file:
                file.write("x")
            raise TypeError("forward() got an unexpected keyword")
        return Feed(run, dataset, store, ranks)

    with pytest.raises(
        RecurringError, match=r"TypeError: forward\(\) got an unexpected keyword \(.*, in broken\)"
    ) as caught:
        run_attempt(job, broken)
    assert not caught.value.retryable
    assert tries.read_text() == "x", "it was tried once"
