"""What becomes of a run whose judge fails or costs too much; in this process, by the parts that a run on Ray has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpo_service.checkpoint.format import digest_of
from dpo_service.errors import SpendCapReached, TooFewVerdicts, TrainingError
from dpo_service.online import assemble
from dpo_service.online.judges.build import BuiltJudge
from dpo_service.online.judges.metrics import Counted
from dpo_service.online.judges.port import Verdict
from dpo_service.specs.judge import PairwiseJudgeSpec, RulesJudgeSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.run import OnlineSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from tests.unit.online.judges.openai_kit import serving_on_a_thread
from tests.unit.online.online_kit import RULES, train_online
from tests.unit.train.training_kit import Recorder, make_job, random_rows

ROWS = 24
OVER = r"has cost [45]\.\d+ and may cost 4;"
"""Calls under way when the cap is reached are paid for."""


def job_of(root, model_dir, judge, *, steps):
    columns = random_rows(ROWS)
    columns |= {"prompt_text": ['"a prompt"'] * ROWS, "reference": [None] * ROWS, "row": ["{}"] * ROWS}
    options = {"steps": steps, "batch_size": 4, "validation": 0, "save_every_steps": 1, "columns": columns}
    job = make_job(root, model_dir, reference="live", **options)
    online = OnlineSpec(
        source="online",
        sampling=SamplingSpec(n=2, max_tokens=5),
        samplers=SamplerSpec(),
        judge=judge,
        pairing=PairingSpec(),
        sync="step",
        staleness=1,
    )
    job.run = job.run.model_copy(update={"online": online})
    return job


def over(url, **endpoint):
    limits = {"attempts": 1, "breaker_failures": 2, "breaker_seconds": 0.05}
    return PairwiseJudgeSpec.model_validate({"endpoint": {"base_url": url, "model": "m", "limits": limits} | endpoint})


def trained(job, recorder=None):
    reports = recorder or Recorder()
    return train_online(
        job.run, job.dataset, job.model_dir, store=job.store, base_digest=digest_of(job.model_dir), reports=reports
    )


def test_an_endpoint_that_stays_away_ends_the_run_with_the_reason(tmp_path, model_dir):
    job = job_of(tmp_path, model_dir, over("http://127.0.0.1:9/v1"), steps=4)
    with pytest.raises(TooFewVerdicts, match=r"only 0 of the last 64 judged prompts gave a pair \(.*breaker_open: "):
        trained(job)


def test_the_spend_cap_is_the_jobs_and_not_an_attempts(tmp_path, model_dir):
    price = {"prompt": 1000.0, "completion": 5000.0}  # 0.15 a call
    with serving_on_a_thread() as server:
        job, told = job_of(tmp_path, model_dir, over(server.url, price=price, spend_cap=4.0), steps=40), Recorder()
        with pytest.raises(SpendCapReached, match=OVER):
            trained(job, told)
        asked = len(server.bodies)
        assert asked >= 27
        with pytest.raises(SpendCapReached, match=OVER):
            trained(job)
        assert len(server.bodies) == asked, "an attempt that follows has nothing left to spend"
    spent = [values["judge/spent"] for values in told.values.values()]
    assert spent == sorted(spent)
    assert spent[0] >= 8 * 0.15 - 1e-9, "two calls a prompt, and four prompts"


class Failing:
    """A reward model whose process fails after some verdicts."""

    name, digest = "failing", "d"

    def __init__(self):
        self.asked = 0
        self.closed = False

    async def judge(self, request):
        self.asked += 1
        if self.asked > 9:
            raise RuntimeError("out of memory")
        return Verdict(self.name, (1.0, 0.0))

    async def close(self):
        self.closed = True


def test_a_judge_that_raises_ends_the_run_with_what_it_raised(tmp_path, model_dir, monkeypatch):
    judge = Failing()
    monkeypatch.setattr(assemble, "build_judge", lambda spec, around: BuiltJudge(Counted(judge), None))
    job = job_of(tmp_path, model_dir, RulesJudgeSpec.model_validate(RULES), steps=8)
    with pytest.raises(TrainingError, match="making pairs failed: RuntimeError: out of memory") as raised:
        trained(job)
    assert raised.value.retryable
    assert judge.closed
    assert not list(Path("/dev/shm").glob(f"dpo-weights-{os.getpid()}-*"))
    recorder = Recorder()
    judge.asked = -1000
    assert trained(job, recorder).steps == 8
    assert min(step for _, step in recorder.values) > 1, "it went on from the newest checkpoint"
