"""A process that keeps freed memory does not take the pages of each large tensor anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PAGES, TENSORS = 16_384, 10
SCRIPT = f"""
import resource, sys, torch
from dpo_service.train.heap import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range({TENSORS}):
    torch.ones({PAGES} * 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(*arguments: str) -> int:
    """Pages taken by a process that makes one tensor after the other."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's setting")
def test_later_tensors_have_the_pages_of_earlier_ones():
    spared = faults("not") - faults("keep")
    assert spared > PAGES * TENSORS / 2
