from __future__ import annotations

import shlex

import pytest

from dpo_service.cluster import ray_jobs
from dpo_service.cluster.port import Liveness
from dpo_service.cluster.ray_jobs import RayJobsCluster


@pytest.mark.parametrize(
    ("status", "liveness", "running", "succeeded"),
    [
        ("PENDING", Liveness.ALIVE, False, None),
        ("RUNNING", Liveness.ALIVE, True, None),
        ("SUCCEEDED", Liveness.GONE, False, True),
        ("FAILED", Liveness.GONE, False, False),
        ("STOPPED", Liveness.GONE, False, False),
        ("SOMETHING_NEW", Liveness.UNKNOWN, False, None),
    ],
)
def test_rays_statuses_have_one_meaning_each(status, liveness, running, succeeded):
    seen = ray_jobs.observation({"status": status, "message": "m"})
    assert (seen.liveness, seen.running, seen.succeeded) == (liveness, running, succeeded)


def test_the_end_of_a_long_message_is_kept():
    message = ray_jobs.observation({"status": "FAILED", "message": "x" * 20_000 + "ValueError: bad"}).message
    assert len(message) == ray_jobs.MESSAGE_CHARS
    assert message.endswith("ValueError: bad")
    assert ray_jobs.observation({"status": "FAILED", "message": None}).message == ""


def test_the_first_line_of_a_long_message_is_kept_too():
    told = "exit code -9, last available logs:\n" + "x" * 20_000 + "ValueError: bad"
    message = ray_jobs.observation({"status": "FAILED", "message": told}).message
    assert message.startswith("exit code -9")
    assert message.endswith("ValueError: bad")


def test_a_submission_survives_the_shell_and_reserves_nothing():
    entrypoint = ["/path with space/python", "-c", "print('a; rm -rf $HOME')"]
    body = ray_jobs.submission("ftjob-1-a1", entrypoint, {"A": "1"}, {"job": "ftjob-1"})
    assert shlex.split(body["entrypoint"]) == ["exec", *entrypoint]
    assert body["entrypoint_num_cpus"] == 0
    assert body["runtime_env"]["env_vars"] == {"A": "1", "RAY_JOB_STOP_WAIT_TIME_S": "20"}
    assert (body["submission_id"], body["metadata"]) == ("ftjob-1-a1", {"job": "ftjob-1"})


def test_a_submission_may_choose_its_own_time_to_stop():
    body = ray_jobs.submission("j", ["true"], {"RAY_JOB_STOP_WAIT_TIME_S": "60"}, {})
    assert body["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"


@pytest.mark.parametrize(
    ("address", "port", "url"),
    [
        ("http://head:8265", None, "http://head:8000/m"),
        ("http://127.0.0.1:8265/", 8123, "http://127.0.0.1:8123/m"),
        ("http://[::1]:8265", 8123, "http://[::1]:8123/m"),
    ],
)
def test_a_served_application_answers_on_the_heads_host(address, port, url):
    assert RayJobsCluster(address, serve_port=port).serve_url("m") == url
