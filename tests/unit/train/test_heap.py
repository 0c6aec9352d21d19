"""A process with huge pages asks the kernel for its tensors in fewer pieces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_service.train.heap import HUGE_PAGES

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGES, TENSORS = 16_384, 10
"""Of 4 KB in a tensor, and how many of these are made one after the other."""
SCRIPT = f"""
import resource, torch

for _ in range({TENSORS}):
    torch.ones({PAGES} * 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(**environment: str) -> int:
    """How often such a process was given a page."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return int(done.stdout)


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this kernel gives nobody huge pages"
)
def test_tensors_take_a_tenth_of_the_pages():
    plain, huge = faults(THP_MEM_ALLOC_ENABLE="0"), faults(**HUGE_PAGES)
    if "[madvise]" in SETTING.read_text():
        assert plain - huge > 0.9 * PAGES * TENSORS
    assert huge < 0.5 * PAGES * TENSORS
