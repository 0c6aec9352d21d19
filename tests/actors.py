"""The processes of a cluster's actors, by the titles that Ray gives them."""

from __future__ import annotations

from pathlib import Path

import psutil

from dpo_service.cluster import processes


def running(temp_dir: Path, *names: str) -> list[psutil.Process]:
    """Those of the head in `temp_dir` whose title has one of `names`."""
    return [p for p in processes.belonging(temp_dir) if any(name in title(p) for name in names)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile, and may not have been waited for
        return ""
