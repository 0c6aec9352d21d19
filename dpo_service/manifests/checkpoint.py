"""What a training run made."""

from __future__ import annotations

from pydantic import Field

from dpo_service.specs.base import Spec

EVALUATED_AT = "eval_step"
"""Among a checkpoint's metrics: the step of those of the validation split, which may be an earlier one."""


class FileDigest(Spec):
    path: str
    """Relative to the checkpoint's directory."""
    bytes: int
    sha256: str


class CheckpointManifest(Spec):
    """A checkpoint directory: `model/` (Hugging Face layout), `adapter/` with LoRA, `state/` (to resume from)."""

    job_id: str
    step: int
    epoch: float
    files: tuple[FileDigest, ...]
    digest: str
    """sha256 over the sorted (path, sha256) pairs: the checkpoint's identity."""
    model_digest: str
    """The same over `model/` alone."""
    base_model: str
    base_digest: str
    reference_digest: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    world_size: int = 1
    created_at: float = 0.0


class RunResult(Spec):
    """How an attempt ended, written by the runner as its last act. Absent = it died."""

    job_id: str
    attempt: int
    status: str
    """succeeded | failed | stopped: it was asked to stop, and can be gone on with"""
    checkpoint: str | None = None
    """Storage key of the directory of the checkpoint to publish: the last, or the best where the job says so."""
    checkpoint_digest: str | None = None
    model_id: str | None = None
    trained_tokens: int = 0
    steps: int = 0
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None
    retryable: bool = True
