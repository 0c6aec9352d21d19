"""What a process does with memory that its tensors have given back."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""mallopt(3)"""


def keep_freed_memory() -> None:
    """Let glibc keep it for the next tensors, for as long as this process lives.

    By default each large array is mapped anew and unmapped again, so that every step takes its gigabyte in pages that
    the kernel must find and clear: a tenth of a step's time. The peak of the resident size is the same, and stays.
    Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
