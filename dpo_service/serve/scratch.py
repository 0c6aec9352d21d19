"""A temporary folder for each replica. vLLM and torch put sockets, rendezvous files and caches into the temp folder and
forget to remove them; in a folder of the replica's own they go with it. One that was killed leaves its folder to the
next replica on the machine, which removes it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

_NAME = re.compile(r"dpo-replica-(\d+)")


def use_own() -> Path:
    """Make this process's folder its temp folder, and its children's. Call it before torch and vLLM are imported."""
    parent = Path(tempfile.gettempdir())
    _remove_orphans(parent)
    own = parent / f"dpo-replica-{os.getpid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(own)
    return own


def remove_own() -> None:
    """Give the temp folder back and remove this process's own."""
    own = Path(tempfile.gettempdir())
    if own.name == f"dpo-replica-{os.getpid()}":
        os.environ["TMPDIR"] = tempfile.tempdir = str(own.parent)
        shutil.rmtree(own, ignore_errors=True)


def _remove_orphans(parent: Path) -> None:
    for folder in parent.glob("dpo-replica-*"):
        match = _NAME.fullmatch(folder.name)
        if match and not Path("/proc", match[1]).exists():
            shutil.rmtree(folder, ignore_errors=True)
