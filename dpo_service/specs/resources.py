"""What a job may take of the cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dpo_service.specs.base import Spec


class ResourceSpec(Spec):
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Training processes, each with its own share of every batch."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """0 trains on the CPU (gloo), 1 on a GPU (nccl)."""
    cpus_per_worker: Annotated[int, Field(ge=1, le=256)] = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: every worker holds the whole model; fsdp: each holds a share of its weights, gradients and optimizer."""
