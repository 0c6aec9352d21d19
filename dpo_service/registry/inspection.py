"""Asks a process that has transformers what it knows of a model directory. The control plane itself never imports it.

An answer is kept for as long as the files it is about stay as they are: starting such a process takes seconds.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from pydantic import ValidationError

from dpo_service.manifests.inspection import Inspection, InspectionRequest

log = logging.getLogger(__name__)
TIMEOUT_S = 120.0
KEPT = 64

_kept: dict[tuple[str, tuple[tuple[str, int, int], ...]], Inspection] = {}


def inspect_model(request: InspectionRequest) -> Inspection | None:
    """The report, from a process of its own or from an earlier one. Blocks for seconds: call it in a thread.

    None where transformers is not installed, or the process failed for a reason of its own: the job inspects again.
    """
    if find_spec("transformers") is None or find_spec("torch") is None:
        return None
    # The rows in a request are of no use to the next one, so the key has their digest.
    asked = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    key = (asked, _state(Path(request.directory)))
    if key not in _kept:
        report = _ask(request)
        if report is None:
            return None
        while len(_kept) >= KEPT:
            _kept.pop(next(iter(_kept)))
        _kept[key] = report
    return _kept[key]


def _state(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of every file."""
    files = ((path.name, path.stat()) for path in sorted(directory.glob("*")) if path.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def _ask(request: InspectionRequest) -> Inspection | None:
    command = [sys.executable, "-m", "dpo_service.inspection"]
    try:
        done = subprocess.run(
            command, input=request.model_dump_json().encode(), capture_output=True, timeout=TIMEOUT_S, check=True
        )
        return Inspection.model_validate_json(done.stdout)
    except subprocess.CalledProcessError as error:
        log.warning("the inspection of %s failed: %s", request.directory, error.stderr.decode()[-2000:])
    except (subprocess.TimeoutExpired, OSError, ValidationError) as error:
        log.warning("the inspection of %s failed: %s", request.directory, error)
    return None
