"""The demo's service: the one that runs on the data directory, or a new one started with `dpo up --detach`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from dpo_service.cli.client import SERVICE_FILE, Service, find_url
from dpo_service.cli.exits import CliError, ExitCode

PORT = 8000
READY_S = 60.0


def ensure(data_dir: Path, port: int | None, model_root: Path | None) -> tuple[Service, bool]:
    """A ready service on `data_dir`, and whether it was started now. `model_root`: models there may be named by path.

    Raises:
        CliError: it does not start; the exit code is that of `dpo up`.
    """
    running = _running(data_dir)
    if running is not None:
        return running, False
    command = [sys.executable, "-m", "dpo_service.cli", "up", "--detach", "--data-dir", str(data_dir)]
    command += ["--port", str(port or free_port())]
    code = subprocess.run(command, env=_environment(model_root), stdout=sys.stderr, check=False).returncode
    if code != 0:
        raise CliError("the service did not start; see above", _exit_code(code))
    started = _running(data_dir)
    if started is None:
        raise CliError(f"`dpo up` left no address in {data_dir / SERVICE_FILE}", ExitCode.UNREACHABLE)
    return started, True


def _running(data_dir: Path) -> Service | None:
    """The service that holds `data_dir`, once it is ready; None = nobody holds it."""
    from dpo_service.main import holder

    who = holder(data_dir)
    if who is None:
        return None
    service = Service(str(who.get("url") or find_url(None, data_dir)))
    service.wait_ready(READY_S)
    return service


def _exit_code(code: int) -> ExitCode:
    try:
        return ExitCode(code)
    except ValueError:
        return ExitCode.FAILED


def _environment(model_root: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    if model_root is not None:
        roots = json.loads(environment.get("DPO_ALLOWED_MODEL_ROOTS", "[]"))
        environment["DPO_ALLOWED_MODEL_ROOTS"] = json.dumps([*roots, str(model_root)])
    return environment


def free_port(preferred: int = PORT) -> int:
    """`preferred` where nothing listens on it, else any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise CliError("no port is free")
