"""The controls of the fake; how it behaves as a cluster is in tests/contract."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpo_service.cluster.fake import FakeCluster
from dpo_service.cluster.port import AppState, Liveness, ServeApplication
from dpo_service.errors import ClusterError

APP = ServeApplication("m", "pkg:build", {"model": "a"})


async def test_a_forgotten_job_is_gone_without_a_verdict_and_may_be_submitted_again():
    cluster = FakeCluster()
    await cluster.submit("a", ["x"], {}, {})
    cluster.forget("a")
    assert (await cluster.observe("a")).succeeded is None
    await cluster.submit("a", ["x"], {}, {})
    assert [each.submission_id for each in cluster.submissions] == ["a", "a"]


async def test_a_finished_job_does_not_start_running_again():
    cluster = FakeCluster()
    await cluster.submit("a", ["x"], {}, {})
    cluster.finish("a", succeeded=False, message="boom")
    cluster.start_running("a")
    assert (await cluster.observe("a")).liveness is Liveness.GONE


async def test_a_stubborn_job_outlives_its_stop():
    cluster = FakeCluster(stubborn=True)
    await cluster.submit("a", ["x"], {}, {})
    await cluster.stop("a")
    assert cluster.stops == ["a"]
    assert (await cluster.observe("a")).liveness is Liveness.ALIVE


async def test_blindness_passes_and_changes_nothing():
    cluster = FakeCluster()
    await cluster.submit("a", ["x"], {}, {})
    cluster.unreachable = True
    assert (await cluster.observe("a")).liveness is Liveness.UNKNOWN
    with pytest.raises(ClusterError):
        await cluster.submit("b", ["x"], {}, {})
    cluster.unreachable = False
    assert (await cluster.observe("a")).liveness is Liveness.ALIVE
    assert (await cluster.observe("b")).succeeded is None


async def test_only_a_user_config_is_taken_in_place():
    cluster = FakeCluster()
    await cluster.serve([APP])
    cluster.set_app("m", AppState.RUNNING)
    await cluster.serve([replace(APP, user_config={"weights": "v2"})])
    assert (await cluster.observe_applications())["m"].state is AppState.RUNNING
    await cluster.serve([replace(APP, args={"model": "b"})])
    assert (await cluster.observe_applications())["m"].state is AppState.STARTING
