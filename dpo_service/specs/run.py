"""A job with every number decided: the whole input of an attempt. Written to storage before the cluster is asked."""

from __future__ import annotations

from typing import Literal

from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.base import Spec
from dpo_service.specs.data import DataSpec
from dpo_service.specs.eval import BestSpec
from dpo_service.specs.job import Integration
from dpo_service.specs.loss import LossSpec
from dpo_service.specs.method import ReferenceSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.specs.resources import ResourceSpec

Precision = Literal["float32", "bfloat16", "pure_bfloat16"]


class ModelSource(Spec):
    """Where a model lies. Exactly one of the three places."""

    name: str
    """As the user named it."""
    path: str | None = None
    """A local directory in the Hugging Face layout."""
    key: str | None = None
    """A storage key of such a directory: an earlier result."""
    hub: str | None = None
    """A hub id."""


class BatchSpec(Spec):
    batch_size: int
    """Rows a step over all workers (pairs, or answers)."""
    micro_batch_size: int
    """Rows a forward pass on one worker, at most."""
    micro_batch_tokens: int = 8192
    """Their tokens, at most, a prompt counted once; a longer row goes alone."""
    n_epochs: int
    max_steps: int | None = None


class RunSpec(Spec):
    job_id: str
    method: str
    model: ModelSource
    data: DataSpec
    loss: LossSpec
    reference: ReferenceSpec
    optim: OptimSpec
    batch: BatchSpec
    precision: Precision
    activation_checkpointing: bool = False
    compile: bool = False
    router_aux_loss_coef: float = 0.0
    """Weight of a mixture's load-balancing loss (train/router.py); 0 = none."""
    lora: LoraSpec | None = None
    resources: ResourceSpec
    seed: int
    logging_steps: int = 1
    eval_every_steps: int | None = None
    save_every_steps: int | None = None
    keep_checkpoints: int = 3
    keep_best: BestSpec | None = None
    integrations: tuple[Integration, ...] = ()
    output_model: str
    """Id under which the result is published."""


class AttemptSpec(Spec):
    """What the runner is given: the run, which try this is, and where to report. Lies in storage."""

    run: RunSpec
    attempt: int
    report_url: str | None
    """Where reports of this attempt are posted; None = spool only."""
    report_token: str
    """Admits reports of this attempt and nothing else."""
