"""Online training on Ray, with a real sampler: what dies is started again, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from ray.util import placement_group_table

from dpo_service.checkpoint.format import digest_of
from dpo_service.errors import TooFewVerdicts, TrainingError
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.online.fit import fit
from dpo_service.reports import read_spool, spool_files
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.judge import PairwiseJudgeSpec, RewardModelJudgeSpec, RulesJudgeSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import AttemptSpec, ModelSource, OnlineSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from tests.actors import running
from tests.models import save_tiny_llama
from tests.unit.online.judges.openai_kit import prefers_good, serving_on_a_thread, status
from tests.unit.train.training_kit import Job, make_job, random_rows

pytestmark = pytest.mark.ray
RULES = RulesJudgeSpec.model_validate(
    {
        "rules": [
            {"rule": "pattern", "pattern": pattern, "weight": 2.0**at}
            for at, pattern in enumerate(["[a-f]", "[g-p]", "[A-Z]", "[0-9]", "e"])
        ]
    }
)
OURS = ("SamplerActor", "CuratorActor", "RayTrainWorker")
DATASET = "dataset.json"
LIMITS = {"attempts": 8, "breaker_failures": 3, "breaker_seconds": 0.5}


def online_job(root: Path, judge=RULES, *, steps: int = 14, lora: LoraSpec | None = None, **online) -> Job:
    model_dir = save_tiny_llama(root / "model")
    columns = random_rows(48)
    columns |= {"prompt_text": ['"a prompt"'] * 48, "reference": [None] * 48, "row": ["{}"] * 48}
    job = make_job(
        root / "store",
        model_dir,
        reference="live",
        steps=steps,
        batch_size=4,
        micro_batch_size=4,
        validation=0,
        resources=ResourceSpec(workers=1),
        save_every_steps=2,
        learning_rate=1e-3,
        columns=columns,
        lora=lora,
    )
    spec = OnlineSpec(
        source="online",
        sampling=SamplingSpec(n=4, max_tokens=12),
        samplers=SamplerSpec(max_num_seqs=16, kv_cache_bytes=32 << 20, lora_rank=lora.rank if lora else None),
        judge=judge,
        pairing=PairingSpec(cut_off="any"),
        sync="step",
        staleness=1,
        **online,
    )
    job.run = job.run.model_copy(update={"online": spec, "method": "online"})
    if spec.mixed_pairs:
        job.dataset = job.dataset.model_copy(update={"mix": job.dataset.train})
    return job


def attempt_of(job: Job, number: int) -> AttemptSpec:
    return AttemptSpec(run=job.run, attempt=number, report_url=None, report_token="t")


def run_attempt(job: Job, number: int = 1):
    attempt = attempt_of(job, number)
    job.store.write_model(paths.attempt_spec("j", number), attempt)
    return fit(job.store, attempt, job.dataset, job.model_dir, digest_of(job.model_dir))


def reports(job: Job):
    files = spool_files(job.store.path(paths.spool_dir("j", 1)))
    return [report for path in files for batch, _ in read_spool(path) for report in batch]


def metrics(job: Job, split: str = "train"):
    told = [report.data for report in reports(job) if report.type == "metrics"]
    return {data["step"]: data for data in told if data["split"] == split}


def ours(cluster) -> list[psutil.Process]:
    return running(cluster.temp_dir, *OURS)


def wait_until(true) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def kill_in_turn(job: Job, cluster, plan, killed: list[str]) -> None:
    """SIGKILL the process of each actor of `plan` once its step is reported."""
    for name, step in plan:
        wait_until(lambda step=step: max(metrics(job), default=0) >= step)
        running(cluster.temp_dir, name)[0].kill()
        killed.append(name)


def nothing_is_left(cluster) -> None:
    psutil.wait_procs(ours(cluster), timeout=20)
    assert ours(cluster) == []
    groups = placement_group_table().values()
    assert [group for group in groups if group["state"] != "REMOVED"] == []
    assert weights_of_the_dead() == []


def weights_of_the_dead() -> list[Path]:
    folders = Path("/dev/shm").glob("dpo-weights-*")
    return [folder for folder in folders if not psutil.pid_exists(int(folder.name.split("-")[2]))]


def kept_samples(job: Job):
    """How often each position was asked for each step."""
    table = pq.read_table(job.store.path(paths.samples_dir("j")), columns=["step", "position"])
    return Counter(zip(table["step"].to_pylist(), table["position"].to_pylist(), strict=True))


def test_actors_killed_in_turn_cost_no_step(tmp_path, ray_connected):
    """A sampler is restarted beside the run. A worker, then a curator: the run goes on from the newest checkpoint."""
    job, killed = online_job(tmp_path, steps=12), []
    job.dataset = job.dataset.model_copy(update={"validation": job.dataset.train})
    job.run = job.run.model_copy(update={"eval_every_steps": 6})
    plan = [("SamplerActor", 2), ("RayTrainWorker", 4), ("CuratorActor", 8)]
    killer = threading.Thread(target=kill_in_turn, args=(job, ray_connected, plan, killed))
    killer.start()
    outcome = run_attempt(job)
    killer.join()
    assert killed == [name for name, _ in plan]
    assert (outcome.steps, outcome.checkpoint) == (12, paths.checkpoint_dir("j", 12))
    starts = [re.search(r"from step (\d+)", report.message) for report in reports(job)]
    after_worker, after_curator = [int(found[1]) for found in starts if found]
    assert (after_worker >= 2, after_curator >= 6) == (True, True)
    told = metrics(job)
    assert sorted(told) == list(range(1, 13))
    assert told[1]["online/logp_gap"] < 1e-3, "the sampler's policy is the trainer's"
    valid = metrics(job, "eval")
    assert sorted(valid) == [0, 6, 12]
    assert max(values["valid/logp_gap"] for values in valid.values()) < 1e-3, "the policy of now has answered"
    assert (abs(valid[0]["valid/kl"]) < 1e-3, valid[0]["judge/verdicts"]) == (True, 48)
    samples = kept_samples(job)
    assert {step for step, _ in samples} == set(range(1, 13))
    assert set(samples.values()) == {1}
    nothing_is_left(ray_connected)


def test_a_judge_that_was_away_costs_nothing_and_a_stop_does_not_wait_for_it(tmp_path, ray_connected):
    """Of an adapter, with pairs of a file among the sampled: the judge fails for a while, and later for good."""
    with serving_on_a_thread(prefers_good) as server:
        endpoint = {"base_url": server.url, "model": "m", "limits": LIMITS, "price": {"prompt": 1, "completion": 1}}
        judge = PairwiseJudgeSpec.model_validate({"endpoint": endpoint})
        job = online_job(tmp_path, judge, steps=1000, lora=LoraSpec(rank=8), mixed_pairs=1)
        away = threading.Thread(target=be_away_twice, args=(job, server))
        away.start()
        outcome = run_attempt(job)
        away.join()
    assert outcome.stopped
    assert outcome.checkpoint == paths.checkpoint_dir("j", outcome.steps)
    told = metrics(job)
    assert sorted(told) == list(range(1, outcome.steps + 1))
    assert not {name for one in told.values() for name in one if name.startswith("online/dropped/server_error")}
    assert max(one["online/logp_gap"] for one in told.values()) < 0.1
    spent = json.loads(job.store.read(paths.judge_spent("j")))["spent"]
    assert spent >= max(one["judge/spent"] for one in told.values()) > 0
    nothing_is_left(ray_connected)


def be_away_twice(job: Job, server) -> None:
    try:
        for step in (2, 5):
            wait_until(lambda step=step: max(metrics(job), default=0) >= step)
            asked = len(server.bodies)
            server.answer = lambda body: status(503)
            wait_until(lambda asked=asked: len(server.bodies) >= asked + 6)
            if step == 2:
                server.answer = prefers_good
    finally:
        job.store.write(paths.stop_flag("j", 1), b"")


@pytest.mark.long
def test_a_killed_driver_takes_all_with_it_and_the_next_attempt_goes_on(tmp_path, ray_connected):
    job = online_job(tmp_path, steps=8)
    job.store.write_model(DATASET, job.dataset)
    job.store.write_model(paths.attempt_spec("j", 1), attempt_of(job, 1))
    code = f"from {drive.__module__} import drive; drive({str(job.store.root)!r}, {str(job.model_dir)!r})"
    environment = {**os.environ, "RAY_ADDRESS": ray_connected.address, "PYTHONPATH": str(Path(__file__).parents[3])}
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        wait_until(lambda: max(metrics(job), default=0) >= 4)
    finally:
        driver.kill()
        driver.wait()
    nothing_is_left(ray_connected)
    outcome = run_attempt(job, 2)
    assert (outcome.steps, outcome.checkpoint) == (8, paths.checkpoint_dir("j", 8))
    assert set(kept_samples(job).values()) == {1}
    nothing_is_left(ray_connected)


def drive(root: str, model_dir: str) -> None:
    """The first attempt, in a process of its own."""
    store = Store(root)
    attempt = store.read_model(paths.attempt_spec("j", 1), AttemptSpec)
    fit(store, attempt, store.read_model(DATASET, DatasetManifest), Path(model_dir), digest_of(Path(model_dir)))


@pytest.mark.long
def test_a_judge_that_stays_away_ends_the_run_with_the_reason(tmp_path, ray_connected):
    limits = LIMITS | {"attempts": 2}
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "limits": limits}
    job = online_job(tmp_path, PairwiseJudgeSpec.model_validate({"endpoint": endpoint}))
    with pytest.raises(TooFewVerdicts, match=r"only 0 of the last 64 judged prompts gave a pair \(\w+: \d+"):
        run_attempt(job)
    nothing_is_left(ray_connected)


@pytest.mark.long
def test_a_reward_model_that_cannot_be_loaded_ends_the_run_with_the_reason(tmp_path, ray_connected):
    """The samplers are there by then."""
    broken = save_tiny_llama(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"torn")
    source = ModelSource(name="broken", path=str(broken))
    job = online_job(tmp_path, RewardModelJudgeSpec(model="broken"), reward_model=source)
    with pytest.raises(TrainingError, match="broken"):
        run_attempt(job)
    nothing_is_left(ray_connected)
