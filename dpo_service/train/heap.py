"""How a process gets the memory of its tensors on the CPU."""

from __future__ import annotations

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Environment in which torch asks for pages of 2 MB under large tensors, where the kernel has them for those who ask
(`/sys/kernel/mm/transparent_hugepage/enabled`: madvise). Read at a process's first tensor.

glibc maps each large array anew and unmaps it again, so that a step takes its gigabyte from the kernel page by page:
with pages of 4 KB that is a tenth of its time.
"""
