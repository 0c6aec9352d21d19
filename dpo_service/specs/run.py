"""A job with every number decided: the whole input of an attempt. Written to storage before the cluster is asked."""

from __future__ import annotations

from typing import Literal

from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.base import Spec
from dpo_service.specs.data import DataSpec
from dpo_service.specs.eval import BestSpec
from dpo_service.specs.job import Integration
from dpo_service.specs.judge import JudgeSpec
from dpo_service.specs.loss import LossSpec
from dpo_service.specs.method import ReferenceSpec, RowKind
from dpo_service.specs.optim import OptimSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec

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


Source = Literal["online", "rso", "sppo", "spin", "self_rewarding"]


class OnlineSpec(Spec):
    """Where sampled pairs come from, everything decided."""

    source: Source
    sampling: SamplingSpec
    samplers: SamplerSpec
    judge: JudgeSpec | None = None
    """None = the row's answer is the better one (SPIN)."""
    reward_model: ModelSource | None = None
    """Where the model of a judge of kind `reward_model` lies."""
    pairing: PairingSpec | None = None
    """Of `online` and `self_rewarding`; the others have a rule of their own."""
    sync: Literal["step", "iteration", "never"]
    """When the samplers get the policy's weights."""
    staleness: int = 0
    """With sync `step`: by so many steps the sampling policy may be older than the trained one."""
    iteration_steps: int | None = None
    """With sync `iteration`: its length. The reference is refreshed at the same steps (`ReferenceSpec.refresh`)."""
    accepted: int = 0
    """`rso`: candidates a prompt that are accepted, at most."""
    rejection_beta: float = 0.0
    """`rso`: in units of the judge's score."""
    win_scale: float = 0.0
    """`sppo`: scale of a score in Bradley and Terry's model."""
    mixed_pairs: int = 0
    """So many of each step's pairs come from the file of `DataSpec.mix_file`."""


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
    online: OnlineSpec | None = None
    """None = the pairs are those of the file."""
    output_model: str
    """Id under which the result is published."""

    @property
    def trained_rows(self) -> RowKind:
        """What the training step is given."""
        return "pairs" if self.online else self.data.rows


class AttemptSpec(Spec):
    """What the runner is given: the run, which try this is, and where to report. Lies in storage."""

    run: RunSpec
    attempt: int
    report_url: str | None
    """Where reports of this attempt are posted; None = spool only."""
    report_token: str
    """Admits reports of this attempt and nothing else."""
