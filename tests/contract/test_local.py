"""Ray on this machine: it outlives the service, is found again, comes back when killed, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys

import psutil
import pytest

from dpo_service.cluster import processes
from dpo_service.cluster.head import Head
from dpo_service.cluster.local import LocalCluster
from dpo_service.cluster.port import Cluster, JobObservation, Liveness

CONNECTS = [sys.executable, "-c", "import ray; ray.init(log_to_driver=False); print(ray.is_initialized())"]


async def _ended(cluster: Cluster, job: str) -> JobObservation:
    while (seen := await cluster.observe(job)).liveness is not Liveness.GONE:
        await asyncio.sleep(0.1)
    return seen


@pytest.mark.ray
async def test_a_second_service_finds_the_head_and_its_jobs(ray_cluster):
    await ray_cluster.start()
    await ray_cluster.submit("found-again", CONNECTS, {}, {})
    await ray_cluster.close()

    again = LocalCluster(ray_cluster.data_dir)
    await again.start()
    assert again.head_pid == ray_cluster.head_pid
    assert (await _ended(again, "found-again")).succeeded
    assert "True" in await again.logs("found-again")
    await again.close()


def _listens_on(process: psutil.Process) -> list[str]:
    try:
        connections = process.net_connections("tcp")
    except psutil.NoSuchProcess:
        return []
    return [each.laddr.ip.removeprefix("::ffff:") for each in connections if each.status == psutil.CONN_LISTEN]


@pytest.mark.ray
def test_only_this_user_and_this_machine_can_reach_it(ray_cluster):
    token = ray_cluster.data_dir / "ray" / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(ray_cluster.temp_dir.stat().st_mode) == 0o700
    listening = [address for each in processes.belonging(ray_cluster.temp_dir) for address in _listens_on(each)]
    assert listening
    assert {address for address in listening if not address.startswith("127.")} == set()


@pytest.mark.ray
def test_the_services_settings_stay_out_of_rays_environment(ray_cluster):
    pid = ray_cluster.head_pid
    names = set(processes.environment(pid))
    assert processes.MARK in names
    assert {name for name in names if name.startswith("DPO_")} == {processes.MARK}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_killed_head_comes_back_with_its_jobs_and_then_ends_without_a_trace(tmp_path):
    cluster = LocalCluster(tmp_path, num_cpus=1)
    try:
        await cluster.start()
        await cluster.submit("before", CONNECTS, {}, {})
        assert (await _ended(cluster, "before")).succeeded
        first = cluster.head_pid
        os.kill(first, signal.SIGKILL)
        assert (await cluster.observe("before")).liveness in (Liveness.UNKNOWN, Liveness.GONE)
        while cluster.head_pid == first:
            await asyncio.sleep(0.2)
        assert (await _ended(cluster, "before")).succeeded
        await cluster.submit("after", CONNECTS, {}, {})
        assert (await _ended(cluster, "after")).succeeded
        await cluster.close()
        # The end of a head in ruins, by a process that never started one.
        os.kill(cluster.head_pid, signal.SIGKILL)
    finally:
        await cluster.close()
        await LocalCluster(tmp_path).shutdown()
    assert processes.belonging(cluster.temp_dir) == []
    assert not Head(tmp_path).folder.exists()
