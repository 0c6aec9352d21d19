"""The test process as a driver of the session's cluster: what tests of Ray Data and Ray Train build on."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.ray


def _where() -> tuple[int, str]:
    return os.getpid(), os.environ["HF_HUB_OFFLINE"]


def test_a_function_of_a_test_module_runs_in_a_worker(ray_connected):
    import ray

    pid, offline = ray.get(ray.remote(_where).remote())
    assert pid != os.getpid()
    assert offline == "1"
    assert ray.cluster_resources()["CPU"] == 4
