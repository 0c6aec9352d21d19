"""What all tests share: no network, few threads, and one Ray cluster for the whole session.

ray_cluster    a LocalCluster whose head runs. Its address, dashboard, token and connection_environment() are ready;
               to call its methods, connect the test's own event loop: `await ray_cluster.start()`, then `close()`.
ray_connected  the test process is a driver of that cluster (Ray Data and Ray Train in process).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Read when ray, torch and transformers are imported: before anything else.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's workers import what test modules define, by the names pytest gives these modules.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])),
    }
)
os.environ.pop("RAY_ADDRESS", None)

import pytest

from dpo_service.cluster import processes
from dpo_service.cluster.local import LocalCluster
from dpo_service.db import session

CPUS = 4
"""More than the machine may have: tests wait for results, not for a free core."""


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Whatever leaves the machine fails at once, as with the cable pulled."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(address[0]):
            raise OSError(f"tests do not reach the network: {address}")
        connect(self, address)

    def resolve_here(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and not _is_here(host):
            raise socket.gaierror(socket.EAI_NONAME, f"tests do not reach the network: {host!r}")
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        patch.setattr(socket, "getaddrinfo", resolve_here)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test can pull the plug, so nothing is synced in this process: thousands of commits would wait for it."""
    pragmas = session._sqlite_pragmas

    def pragmas_without_sync(connection: Any, record: Any) -> None:
        pragmas(connection, record)
        connection.execute("PRAGMA synchronous=OFF")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_sqlite_pragmas", pragmas_without_sync)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def _is_here(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name in ("", "localhost", socket.gethostname())
    return address.is_loopback or address.is_unspecified


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[LocalCluster]:
    data_dir = Path(tempfile.mkdtemp(prefix="dpo-tests-"))
    cluster = LocalCluster(data_dir, num_cpus=CPUS)
    try:
        _in_a_loop_of_its_own(_start_and_let_go(cluster))
        yield cluster
    finally:
        memory = processes.shared_memory(processes.belonging(cluster.temp_dir))
        _in_a_loop_of_its_own(cluster.shutdown())
        shutil.rmtree(data_dir, ignore_errors=True)
    assert processes.belonging(cluster.temp_dir) == []
    assert not cluster.temp_dir.exists()
    assert [path for path in memory if path.exists()] == []


def _in_a_loop_of_its_own(work: Coroutine[Any, Any, None]) -> None:
    """In a thread: an async test or fixture may be the first to ask for the cluster, and its loop is running."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(asyncio.run, work).result()


async def _start_and_let_go(cluster: LocalCluster) -> None:
    await cluster.start()
    await cluster.close()


@pytest.fixture(scope="session")
def ray_connected(ray_cluster: LocalCluster) -> Iterator[LocalCluster]:
    os.environ.update(ray_cluster.connection_environment())
    import ray

    ray.init(address=ray_cluster.address, namespace="tests", logging_level="ERROR", log_to_driver=False)
    try:
        yield ray_cluster
    finally:
        ray.shutdown()
