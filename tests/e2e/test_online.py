"""Jobs that sample their pairs, through the real service: every config, and pause, resume and cancel mid-run."""

import json
import time
from pathlib import Path

import openai
import pytest

from dpo_service.cli.jobfile import load
from tests.actors import running
from tests.e2e.conftest import pairs_file
from tests.models import save_scorer
from tests.unit.online.judges.openai_kit import serving_on_a_thread, shown
from tests.unit.online.judges.reward_kit import save_reward_model
from tests.unit.online.test_fit import weights_of_the_dead

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]
CONFIGS = Path(__file__).parents[2] / "configs"
SOURCES = ("online-verifier", "online-judge", "rso", "sppo", "spin", "self_rewarding")
STEPS = 4
SMALL = {"batch_size": 4, "n_epochs": 2}
FEW = {"accepted": 4}
ACTORS = ("SamplerActor", "RewardActor", "CuratorActor", "RayTrainWorker")


def prefers_the_higher(body):
    """Of "Score: 3" and "Score: 1" the former."""
    one, other = shown(body)
    return json.dumps({"reason": "higher", "winner": "tie" if one == other else "A" if one > other else "B"})


@pytest.fixture(scope="module")
def judging():
    with serving_on_a_thread(prefers_the_higher) as server:
        yield server


@pytest.fixture(scope="module")
def models(service):
    save_scorer(service.data_dir / "models" / "scorer")
    save_reward_model(service.data_dir / "models" / "rewards", max_position_embeddings=512)


@pytest.fixture(scope="module")
def files(client, tmp_path_factory):
    """Ids by the names that the configs use."""
    root = tmp_path_factory.mktemp("data")
    asked = [{"role": "user", "content": f"What is {number} plus {number % 3}?"} for number in range(4)] * 4
    written = {
        "problems.jsonl": [{"messages": [one], "answer": f"{at % 4 + at % 4 % 3}"} for at, one in enumerate(asked)],
        "held-out.jsonl": [
            {"messages": [{"role": "user", "content": f"What is {number} plus 1?"}], "answer": f"{number + 1}"}
            for number in (0, 2, 3)
        ],
        "prompts.jsonl": [{"messages": [one]} for one in asked],
        "answers.jsonl": [{"messages": [one, {"role": "assistant", "content": "It is 3."}]} for one in asked],
    }
    for name, rows in written.items():
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs_file(root / "preferences.jsonl", 8)
    names = [*written, "preferences.jsonl"]
    return {name: client.files.create(file=root / name, purpose="fine-tune").id for name in names}


def job_of(config, files, judging, **changes):
    """The job of a config, made small: everything that says what is done stays, numbers and addresses change."""
    job = load(CONFIGS / f"{config}.yaml")
    method = job["method"][job["method"]["type"]]["hyperparameters"]
    method |= SMALL | {name: value for name, value in FEW.items() if name in method}
    job |= {"model": "scorer", "training_file": files[job["training_file"]], "max_steps": STEPS, "deduplicate": False}
    if "validation_file" in job:
        job["validation_file"] = files[job["validation_file"]]
    job |= {"max_length": 2048 if config == "self_rewarding" else 256, "learning_rate": 1e-4}
    job["sampling"] |= {"max_tokens": 16, "max_num_seqs": 16, "kv_cache_bytes": 64 << 20}
    if job["sampling"].get("n", 0) > 8:
        job["sampling"]["n"] = 8
    if "mix" in job:
        job["mix"]["file"] = files[job["mix"]["file"]]
    judge = job.get("judge", {})
    if "endpoint" in judge:
        judge["endpoint"] |= {"base_url": judging.url}
        judge["endpoint"].pop("api_key_env", None)
    if "max_tokens" in judge or judge.get("kind") == "self_rewarding":
        judge["max_tokens"] = 16
    if judge.get("kind") == "reward_model":
        judge["model"] = "rewards"
    return job | changes


def submitted(client, job):
    known = {name: job.pop(name) for name in ("model", "training_file", "method", "suffix")}
    return client.fine_tuning.jobs.create(**known, extra_body=job)


def samples(client, job_id, **query):
    found = client.get(
        f"/fine_tuning/jobs/{job_id}/samples", cast_to=object, options={"params": {"limit": 100} | query}
    )
    return found["data"]


def nobody_is_left(cluster, timeout=30):
    """Ray ends the actors of a job that has ended within moments."""
    deadline = time.monotonic() + timeout
    while left := running(cluster.temp_dir, *ACTORS):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)
    assert weights_of_the_dead() == []


@pytest.mark.parametrize("config", SOURCES)
def test_every_config_runs_to_its_end(service, client, models, files, judging, ray_cluster, config):
    job = submitted(client, job_of(config, files, judging))
    done = service.wait(job.id)
    assert done.status == "succeeded", (done.error, service.logs(job.id))
    metrics = [e.data for e in service.events(job.id) if e.type == "metrics"]
    told = [one for one in metrics if one["split"] == "train"]
    assert [one["step"] for one in told] == list(range(1, STEPS + 1))
    if config == "online-verifier":
        rewards = [one["valid/reward"] for one in metrics if one["split"] == "eval"]
        assert len(rewards) > 1, "its held-out prompts are scored at the start and the end"
    assert told[0]["online/logp_gap"] < 1e-3, "the sampler's policy is the trainer's"
    assert told[0]["loss"] != told[-1]["loss"]
    kept = samples(client, job.id)
    assert {row["step"] for row in kept} == set(range(1, STEPS + 1))
    texts = {answer["text"] for row in kept for answer in row["answers"]}
    assert len(texts & {f"Score: {digit}" for digit in range(6)}) > 2, "the sampler samples"
    assert [row for row in kept if row["dropped"] is None]
    if config == "online-judge":
        assert told[-1]["judge/spent"] > 0
    assert client.models.retrieve(done.fine_tuned_model).id == done.fine_tuned_model
    nobody_is_left(ray_cluster)


def test_paused_resumed_and_cancelled_mid_run(service, client, models, files, judging, ray_cluster):
    asked_for = job_of("online-verifier", files, judging, max_steps=60, checkpoint={"every_steps": 5})
    asked_for["sampling"]["n"] = 8  # of six answers one is right: most prompts give a pair
    job = submitted(client, asked_for.copy())
    service.wait_for_step(job.id, 3)
    asked = time.monotonic()
    client.fine_tuning.jobs.pause(job.id)
    service.wait_for_state(job.id, "paused")
    nobody_is_left(ray_cluster)
    assert time.monotonic() - asked < 60
    reached = max(service.steps(job.id))
    assert reached < 60
    seen = samples(client, job.id, step=reached)
    assert [row["answers"] for row in seen if row["dropped"] is None]
    client.fine_tuning.jobs.resume(job.id)
    done = service.wait(job.id)
    assert done.status == "succeeded", (done.error, service.logs(job.id))
    assert any(f"resuming from step {reached}" in event.message for event in service.events(job.id))
    assert samples(client, job.id, step=reached) == seen
    nobody_is_left(ray_cluster)

    other = submitted(client, asked_for.copy())
    service.wait_for_step(other.id, 2)
    asked = time.monotonic()
    client.fine_tuning.jobs.cancel(other.id)
    assert service.wait(other.id, timeout=60).status == "cancelled"
    nobody_is_left(ray_cluster)
    assert time.monotonic() - asked < 60
    assert samples(client, other.id)
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.resume(other.id)


def test_two_jobs_that_do_not_fit_at_once_run_one_after_the_other(service, client, models, files, judging, ray_cluster):
    """Each needs three of the four CPUs: none may wait for a worker while the other holds a sampler for nothing."""
    wanted = job_of("spin", files, judging)
    wanted["sampling"]["cpus_per_sampler"] = 2
    jobs = [submitted(client, wanted.copy()) for _ in range(2)]
    assert [service.wait(job.id).status for job in jobs] == ["succeeded"] * 2
    nobody_is_left(ray_cluster)
