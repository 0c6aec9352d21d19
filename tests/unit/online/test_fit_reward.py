"""Online training on Ray with a reward model in vLLM: its process has its place, is killed, and is gone in the end."""

from __future__ import annotations

import threading

import psutil
import pytest

from dpo_service.specs.judge import RewardModelJudgeSpec
from dpo_service.specs.run import ModelSource
from tests.actors import running
from tests.unit.online.judges.reward_kit import save_reward_model
from tests.unit.online.test_fit import nothing_is_left, online_job, reports, run_attempt

pytestmark = [pytest.mark.ray, pytest.mark.long]


def rewarding(cluster) -> list[psutil.Process]:
    return running(cluster.temp_dir, "RewardActor")


def kill_after(job, cluster, step: int, killed: list[int], done: threading.Event) -> None:
    """SIGKILL the reward model's process once `step` is reported."""
    while not done.wait(0.02):
        if any(report.type == "metrics" and report.data["step"] >= step for report in reports(job)):
            (victim,) = rewarding(cluster)
            victim.kill()
            killed.append(victim.pid)
            return


def test_a_killed_reward_model_costs_no_step_and_none_is_left(tmp_path, ray_connected):
    job, killed, done = online_job(tmp_path), [], threading.Event()
    judged = {
        "judge": RewardModelJudgeSpec(model="rm", engine="vllm"),
        "reward_model": ModelSource(name="rm", path=str(save_reward_model(tmp_path / "reward"))),
    }
    job.run = job.run.model_copy(update={"online": job.run.online.model_copy(update=judged)})
    killer = threading.Thread(target=kill_after, args=(job, ray_connected, 3, killed, done))
    killer.start()
    try:
        outcome = run_attempt(job)
    finally:
        done.set()
        killer.join()
    assert len(killed) == 1
    assert outcome.steps == 14
    told = {report.data["step"]: report.data for report in reports(job) if report.type == "metrics"}
    assert sorted(told) == list(range(1, 15))
    assert all(values.get("judge/without_score", 0.0) == 0 for values in told.values()), "it was asked again"
    nothing_is_left(ray_connected)
    psutil.wait_procs(rewarding(ray_connected), timeout=20)
    assert rewarding(ray_connected) == []
