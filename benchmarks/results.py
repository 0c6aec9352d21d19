"""The file that benchmarks write: one entry a benchmark, by its name."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

DEFAULT = Path(__file__).with_name("results.json")
PACKAGES = ("torch", "transformers", "trl")


def record(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Put `entry`, with versions and machine, in the place of what `path` held under `name`."""
    entries = json.loads(path.read_text()) if path.exists() else {}
    versions = {package: version(package) for package in PACKAGES}
    entries[name] = entry | {"versions": versions, "machine": machine()}
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {platform.system()} {platform.machine()}"
