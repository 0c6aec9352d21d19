"""The pieces of the online demo around its jobs: an earlier run's policy, the scores, the table, what comes next."""

from __future__ import annotations

import httpx
import pytest

from dpo_service.cli.client import Service
from dpo_service.cli.exits import CliError
from dpo_service.cli.watch import Progress
from dpo_service.demo import online
from dpo_service.demo.online import Outcome, held_out_scores, sampled_scores, trained_before
from dpo_service.demo.story import job_of
from dpo_service.specs.job import JobSpec

JOB = {"model": "demo-base", "suffix": "demo-lists", "seed": 0, "status": "succeeded", "fine_tuned_model": "ft:1"}


def service_with(*jobs, models=("ft:1", "ft:2")):
    def answer(request):
        found = [{"id": name} for name in models] if request.url.path == "/v1/models" else list(jobs)
        return httpx.Response(200, json={"data": found, "has_more": False})

    return Service("http://127.0.0.1:1", transport=httpx.MockTransport(answer))


def outcome(plot="online.png"):
    scores = {0: 0.2, 16: 0.51, 32: 0.9}
    return Outcome("ftjob-1", "ft:1", "ft:2", scores, ((1.0, 0.21), (32.0, 0.88)), str(plot), 301.0)


def test_the_jobs_are_jobs_whose_files_are_filled_in():
    for config in (online.SUPERVISED, online.ONLINE):
        job = JobSpec.model_validate(job_of(config, model="m", training_file="f", validation_file="v"))
        assert (job.training_file, job.validation_file) == ("f", "v")


def test_the_policy_of_an_earlier_run_is_found():
    other = JOB | {"suffix": "another", "fine_tuned_model": "ft:2"}
    assert trained_before(service_with(other, JOB), JOB) == "ft:1"


@pytest.mark.parametrize("change", [{"model": "m"}, {"suffix": "s"}, {"seed": 1}, {"status": "failed"}])
def test_what_another_job_made_is_not_taken_for_it(change):
    assert trained_before(service_with(JOB | change), JOB) is None


def test_a_model_that_was_removed_is_trained_anew():
    assert trained_before(service_with(JOB, models=["ft:2"]), JOB) is None


def test_scores_are_those_of_the_evaluations_and_of_the_steps():
    progress = Progress("ftjob-1")
    for step, reward in ((1, 0.25), (2, 0.5)):
        progress.take({"type": "metrics", "data": {"step": step, "online/reward": reward, "loss": 0.7}})
    for step, reward in ((2, 0.6), (0, 0.2)):
        progress.take({"type": "metrics", "data": {"step": step, "split": "eval", "valid/reward": reward}})
    assert held_out_scores(progress) == {0: 0.2, 2: 0.6}
    assert sampled_scores(progress) == ((1.0, 0.25), (2.0, 0.5))


def test_a_job_that_evaluated_nothing_is_an_error():
    with pytest.raises(CliError, match="ftjob-9 reported no evaluation"):
        held_out_scores(Progress("ftjob-9"))


def test_the_table_shows_the_score_of_every_evaluation(capsys):
    online.show(outcome())
    shown = capsys.readouterr().out
    for words in ("0     0.20   ██████", "16    0.51   " + "█" * 15, "32    0.90   " + "█" * 27, "online.png"):
        assert words in shown


def test_json_has_both_ends():
    told = outcome().as_json()
    assert (told["before"], told["after"], told["scores"][16]) == (0.2, 0.9, 0.51)


def test_the_picture_is_written(tmp_path):
    online.picture(outcome(tmp_path / "demo" / "online.png"))
    assert (tmp_path / "demo" / "online.png").read_bytes().startswith(b"\x89PNG")


def test_samples_of_both_ends_are_asked_for_and_shown(capsys):
    asked = []

    def answer(request):
        asked.append(request.url.params["step"])
        text = {"text": f"of step {asked[-1]}", "finished": True, "version": 0, "score": 0.5, "missing": None}
        found = {"step": int(asked[-1]), "prompt_index": 1, "prompt": "p", "judge": "rules", "answers": [text]}
        found |= {"comparisons": [], "replies": [], "pairs": [], "dropped": None}
        return httpx.Response(200, json={"data": [found] * 3, "has_more": False})

    online.show_samples(Service("http://127.0.0.1:1", transport=httpx.MockTransport(answer)), outcome())
    shown = capsys.readouterr().out
    assert asked == ["1", "32"]
    assert [shown.count(f"of step {step}") for step in asked] == [2, 2]


def test_the_end_says_how_to_go_on(capsys):
    online.show_next_steps(outcome(), "data")
    shown = capsys.readouterr().out
    for words in (
        "Done in 5:01",
        "from 0.20 to 0.90",
        "dpo samples ftjob-1 --step 16 --data-dir data",
        "dpo chat ft:2",
    ):
        assert words in shown
