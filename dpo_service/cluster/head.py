"""The daemons of a Ray head on this machine: started once, found again by later processes, ended on request.

    <data_dir>/ray/            token (0600), state.json, start.log, gcs/ (Ray's own database), serve_used
    <temp>/dpo-<8 hex>/        0700; r/ is Ray's: sockets, logs, spilled objects (socket paths end at 107 bytes: short),
                               tmp/ holds temporary files of jobs and served models

Everything listens on the loopback interface, behind Ray's token authentication, and outlives the process that
started it. With Ray's database on disk a head that was killed comes back with its jobs and served models.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import psutil

from dpo_service.cluster import processes
from dpo_service.errors import ClusterError

ATTEMPTS = 3
START_TIMEOUT_S = 120.0
LONGEST_TEMP = 24
"""Bytes of the temporary folder's own path that leave room for the longest socket path Ray makes in it."""
PORT_RANGE = (20000, 32000)
"""Below the ephemeral ports: a connection of somebody else must not take a remembered port."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ports:
    gcs: int
    dashboard: int
    agent: int
    client: int
    metrics: int
    serve: int


@dataclass(frozen=True)
class HeadState:
    """What state.json says: enough to find the head again, and to know it from a stranger with the same pid."""

    pids: dict[str, int]
    """By daemon: gcs_server, raylet."""
    started: dict[str, float]
    ports: Ports

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports.dashboard}"

    @property
    def alive(self) -> bool:
        """Whether both daemons run. One alone is a head in ruins."""
        return all(processes.started_at(self.pids[name]) == self.started[name] for name in processes.DAEMONS)


class Head:
    """The head of one data directory. Blocking; call it from a thread."""

    def __init__(self, data_dir: Path, num_cpus: int | None = None, serve_port: int | None = None) -> None:
        self.folder = data_dir.resolve() / "ray"
        self.temp_dir = _temp_dir(self.folder)
        self._num_cpus = num_cpus
        self._serve_port = serve_port
        self._serve_used = self.folder / "serve_used"

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    @property
    def serve_used(self) -> bool:
        """Whether anything was ever served: asking Serve costs 150 MB, so nobody asks before that."""
        return self._serve_used.exists()

    def use_serve(self) -> None:
        self._serve_used.touch()

    def state(self) -> HeadState | None:
        try:
            known = orjson.loads((self.folder / "state.json").read_bytes())
        except FileNotFoundError:
            return None
        return HeadState(known["pids"], known["started"], Ports(**known["ports"]))

    def ensure(self) -> HeadState:
        """The running head, started if there is none. Raises ClusterError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._only_one():
            known = self.state()
            if known is not None and known.alive:
                return known
            return self._start_at_last(known)

    def end(self) -> None:
        """End every process of this head and remove its files. Works on a head in ruins, and on none."""
        processes.end(self.temp_dir)
        shutil.rmtree(self.temp_dir, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """What a process needs to connect to this head with ray.init(address=...)."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            # Ray's own name for "this machine only": the node's address, and every listener, is 127.0.0.1. Without it
            # `--node-ip-address 127.0.0.1` is replaced by the machine's outside address, which a laptop changes.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }

    def _start_at_last(self, known: HeadState | None) -> HeadState:
        """Ray gives up after 30 s, which a busy machine can take; and a database that does not load is no use."""
        for attempt in range(ATTEMPTS):
            processes.end(self.temp_dir)
            if attempt == ATTEMPTS - 1:
                shutil.rmtree(self.folder / "gcs", ignore_errors=True)
            try:
                return self._start(known)
            except ClusterError as error:
                logger.warning("attempt %d of %d: %s", attempt + 1, ATTEMPTS, error)
                last = error
        raise last

    def _start(self, known: HeadState | None) -> HeadState:
        ports = _ports(known.ports if known else None, self._serve_port)
        _own_directory(self.temp_dir)
        _write_token(self.folder / "token")
        (self.temp_dir / "tmp").mkdir(exist_ok=True)
        status, log = self._run(_command(ports, self.temp_dir, self._num_cpus), ports)
        pids = _daemons(self.temp_dir)
        if status != 0 or set(pids) != set(processes.DAEMONS):
            processes.end(self.temp_dir)
            raise ClusterError(f"Ray did not start on this machine (exit {status}): {_tail(log)}")
        started = {name: processes.started_at(pid) or 0.0 for name, pid in pids.items()}
        state = HeadState(pids, started, ports)
        _write(self.folder / "state.json", orjson.dumps(asdict(state)))
        return state

    def _run(self, command: list[str], ports: Ports) -> tuple[int | None, Path]:
        """Exit status (None: it took too long) and where the output is. No pipe: the daemons would hold it open."""
        log = self.folder / "start.log"
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    command,
                    env=self._daemon_environment(ports),
                    cwd=self.temp_dir,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    timeout=START_TIMEOUT_S,
                )
            except subprocess.TimeoutExpired:
                return None, log
        return done.returncode, log

    def _daemon_environment(self, ports: Ports) -> dict[str, str]:
        """Jobs inherit this. The service's own settings stay behind: they hold its keys and its database's address."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DPO_", "RAY_ADDRESS"))}
        return inherited | self.environment() | {
            processes.MARK: str(self.temp_dir),
            # Temporary files of workers go where they are removed with the head.
            "TMPDIR": str(self.temp_dir / "tmp"),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.folder / "gcs"),
            "RAY_enable_metrics_collection": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "DASHBOARD_METRIC_PORT": str(ports.metrics),
        }  # fmt: skip

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        """Two processes on one data directory must not start two heads."""
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _command(ports: Ports, temp_dir: Path, num_cpus: int | None) -> list[str]:
    options: Mapping[str, object] = {
        "--node-ip-address": "127.0.0.1",
        "--port": ports.gcs,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": ports.dashboard,
        "--dashboard-agent-listen-port": ports.agent,
        "--ray-client-server-port": ports.client,
        # Any free port: the default range is shared with every other Ray of the machine.
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--object-store-memory": _object_store_bytes(),
        # Ray opens its directory to everybody; ours around it is closed.
        "--temp-dir": temp_dir / "r",
        "--include-dashboard": "true",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"]
    # No autoscaler: there is nothing to scale to, and its monitor takes 50 MB.
    command.append("--no-monitor")
    for name, value in options.items():
        command += [name, str(value)]
    return command if num_cpus is None else [*command, "--num-cpus", str(num_cpus)]


def _object_store_bytes() -> int:
    """A twentieth of the memory, 256 MB to 4 GB. Taken only as it fills; what is over spills to disk."""
    return int(min(max(psutil.virtual_memory().total / 20, 256 << 20), 4 << 30))


def _temp_dir(folder: Path) -> Path:
    base = Path(tempfile.gettempdir()).resolve()
    if len(os.fsencode(base)) > LONGEST_TEMP:
        base = Path("/tmp").resolve()
    return base / f"dpo-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"


def _own_directory(path: Path) -> None:
    """In a folder everybody may write to, a directory of this name could be somebody else's trap."""
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ClusterError(f"{path} belongs to somebody else; remove it, or set TMPDIR to a folder of your own")


def _write_token(path: Path) -> None:
    """Once: the jobs of a head that is started again go on using the token they know."""
    if not path.exists():
        _write(path, secrets.token_hex(32).encode())


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and for this user only."""
    beside = path.with_suffix(".new")
    beside.unlink(missing_ok=True)
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    beside.replace(path)


def _ports(known: Ports | None, serve_port: int | None) -> Ports:
    """The remembered ones while they are free, so that addresses survive a restart."""
    if known is not None and all(map(_is_free, asdict(known).values())) and serve_port in (None, known.serve):
        return known
    chosen: dict[str, int] = {} if serve_port is None else {"serve": serve_port}
    for name in Ports.__dataclass_fields__:
        while name not in chosen:
            port = random.randrange(*PORT_RANGE)
            if port not in chosen.values() and _is_free(port):
                chosen[name] = port
    return Ports(**chosen)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _daemons(temp_dir: Path) -> dict[str, int]:
    """Those that are there, by name."""
    found = ((process.name(), process.pid) for process in processes.belonging(temp_dir))
    return {name: pid for name, pid in found if name in processes.DAEMONS}


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])
