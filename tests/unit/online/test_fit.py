"""Online training on Ray, with a real sampler: what dies is started again, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest

from dpo_service.checkpoint.format import digest_of
from dpo_service.cluster import processes
from dpo_service.errors import TooFewVerdicts
from dpo_service.online.fit import fit
from dpo_service.reports import read_spool, spool_files
from dpo_service.specs.judge import RulesJudgeSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import AttemptSpec, OnlineSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.storage import paths
from tests.models import save_tiny_llama
from tests.unit.train.training_kit import Job, make_job, random_rows

pytestmark = pytest.mark.ray
RULES = [
    {"rule": "pattern", "pattern": pattern, "weight": 2.0**at}
    for at, pattern in enumerate(["[a-f]", "[g-p]", "[A-Z]", "[0-9]", "e"])
]
SAMPLERS = SamplerSpec(max_num_seqs=16, kv_cache_bytes=32 << 20)
OURS = ("SamplerActor", "CuratorActor", "RayTrainWorker")


def online_job(root: Path, rules=RULES, steps: int = 14) -> Job:
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
    )
    online = OnlineSpec(
        source="online",
        sampling=SamplingSpec(n=4, max_tokens=12),
        samplers=SAMPLERS,
        judge=RulesJudgeSpec.model_validate({"rules": rules}),
        pairing=PairingSpec(cut_off="any"),
        sync="step",
        staleness=1,
    )
    job.run = job.run.model_copy(update={"online": online, "method": "online"})
    return job


def run_attempt(job: Job):
    attempt = AttemptSpec(run=job.run, attempt=1, report_url=None, report_token="t")
    job.store.write_model(paths.attempt_spec("j", 1), attempt)
    return fit(job.store, attempt, job.dataset, job.model_dir, digest_of(job.model_dir))


def reports(job: Job):
    files = spool_files(job.store.path(paths.spool_dir("j", 1)))
    return [report for path in files for batch, _ in read_spool(path) for report in batch]


def ours(cluster) -> list[psutil.Process]:
    return [p for p in processes.belonging(cluster.temp_dir) if any(name in line_of(p) for name in OURS)]


def line_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def kill_after(job: Job, cluster, name: str, step: int, killed: list[str]) -> None:
    """SIGKILL the process of the actor `name` once `step` is reported."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(report.type == "metrics" and report.data["step"] >= step for report in reports(job)):
            next(p for p in ours(cluster) if name in line_of(p)).kill()
            killed.append(name)
            return
        time.sleep(0.02)


def stop_after(job: Job, step: int) -> None:
    """Ask the run to stop once `step` is reported."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(report.type == "metrics" and report.data["step"] >= step for report in reports(job)):
            break
        time.sleep(0.02)
    job.store.write(paths.stop_flag("j", 1), b"")


def nothing_is_left(cluster) -> None:
    psutil.wait_procs(ours(cluster), timeout=20)
    assert ours(cluster) == []
    assert [
        path for path in Path("/dev/shm").glob("dpo-weights-*") if not psutil.pid_exists(int(path.name.split("-")[2]))
    ] == []


def test_killed_actors_cost_no_step(tmp_path, ray_connected):
    """The sampler is killed first: it is restarted beside the run. Then the curator: the run goes on from step 4."""
    job, killed = online_job(tmp_path), []
    killers = [
        threading.Thread(target=kill_after, args=(job, ray_connected, name, step, killed))
        for name, step in (("SamplerActor", 2), ("CuratorActor", 5))
    ]
    for killer in killers:
        killer.start()
    outcome = run_attempt(job)
    for killer in killers:
        killer.join()
    assert killed == ["SamplerActor", "CuratorActor"]
    assert (outcome.steps, outcome.checkpoint) == (14, paths.checkpoint_dir("j", 14))
    told = {report.data["step"]: report.data for report in reports(job) if report.type == "metrics"}
    assert sorted(told) == list(range(1, 15))
    assert told[1]["online/logp_gap"] < 1e-3, "the sampler's policy is the trainer's"
    nothing_is_left(ray_connected)


def test_an_answer_nobody_can_choose_ends_the_run_with_the_reason(tmp_path, ray_connected):
    job = online_job(tmp_path, rules=[{"rule": "length", "minimum": 0, "maximum": 1000}])
    with pytest.raises(TooFewVerdicts, match=r"of the last 64 judged prompts gave a pair .tie: "):
        run_attempt(job)
    nothing_is_left(ray_connected)


def test_the_stop_flag_saves_and_ends(tmp_path, ray_connected):
    job = online_job(tmp_path)
    job.dataset = job.dataset.model_copy(update={"validation": job.dataset.train})
    job.run = job.run.model_copy(update={"eval_every_steps": 1})
    flag = threading.Thread(target=stop_after, args=(job, 2))
    flag.start()
    outcome = run_attempt(job)
    flag.join()
    assert outcome.stopped
    assert 2 <= outcome.steps < 14
    valid = {r.data["step"]: r.data for r in reports(job) if r.type == "metrics" and r.data["split"] == "eval"}
    assert sorted(valid) == list(range(outcome.steps + 1))
    assert max(values["valid/logp_gap"] for values in valid.values()) < 1e-3, "the policy of now has answered"
    assert (abs(valid[0]["valid/kl"]) < 1e-3, valid[0]["judge/verdicts"]) == (True, 48)
    assert outcome.checkpoint == paths.checkpoint_dir("j", outcome.steps)
    nothing_is_left(ray_connected)
