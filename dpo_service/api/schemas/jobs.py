"""Fine-tuning jobs, their events and checkpoints on the wire: OpenAI's objects, then our own fields."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from dpo_service.api.schemas.common import Wire
from dpo_service.clock import unix
from dpo_service.jobs.progress import estimated_finish
from dpo_service.jobs.states import ON_CLUSTER, OPENAI_STATUS
from dpo_service.jobs.tables import Job, JobCheckpoint, JobEvent
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.specs.job import JobSpec
from dpo_service.specs.loss import LossSpec
from dpo_service.specs.method import DpoHyperparameters
from dpo_service.specs.run import RunSpec

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
ORGANIZATION = "dpo-service"
RUN_FIELDS = (
    "method",
    "loss",
    "reference",
    "optim",
    "batch",
    "precision",
    "activation_checkpointing",
    "compile",
    "router_aux_loss_coef",
    "lora",
    "resources",
    "logging_steps",
    "eval_every_steps",
    "save_every_steps",
    "keep_checkpoints",
    "keep_best",
    "online",
)
DATA_FIELDS = ("rows", "eval_split", "max_length", "truncation", "deduplicate", "shuffle")
DATASET_FIELDS = ("train", "validation", "steps_per_epoch", "total_steps", "report")


class JobError(Wire):
    code: str
    message: str
    param: str | None = None


class JobObject(Wire):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None = None
    model: str
    fine_tuned_model: str | None
    organization_id: str = ORGANIZATION
    status: Status
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    seed: int
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    # ours
    state: str
    """Our own state, finer than `status`."""
    attempt: int
    """Number of the newest try; 0 = none yet."""
    started_at: int | None
    cancel_requested_at: int | None
    pause_requested_at: int | None
    """None again when the job is resumed."""
    paused_at: int | None
    """Since when it is paused; None = it is not."""
    suffix: str | None
    deploy: bool
    output_model: str
    """The id the result has, or will have."""
    run: dict[str, Any]
    """Every number as decided, where the request said "auto" or nothing."""
    reference_digest: str | None
    """Digest of the weights the loss measures against; null before the first start, and for losses without one."""
    progress: dict[str, Any] | None
    """Where the running stage stands: stage, done, total, message."""
    dataset: dict[str, Any] | None
    """What the data stage made: rows, tokens and steps."""

    @classmethod
    def of(cls, job: Job) -> JobObject:
        spec, run = job.job_spec, job.run_spec
        finish = estimated_finish(job.progress) if job.job_state in ON_CLUSTER else None
        return cls(
            id=job.id,
            created_at=unix(job.created_at),
            finished_at=_unix(job.finished_at),
            estimated_finish=_unix(finish),
            model=spec.model,
            fine_tuned_model=job.fine_tuned_model,
            status=OPENAI_STATUS[job.job_state],
            hyperparameters=_hyperparameters(spec, run),
            method={"type": spec.method.type, spec.method.type: {"hyperparameters": _hyperparameters(spec, run)}},
            training_file=spec.training_file,
            validation_file=spec.validation_file,
            result_files=[],
            trained_tokens=job.trained_tokens,
            error=_error(job),
            seed=run.seed,
            integrations=[i.model_dump(mode="json") for i in spec.integrations or ()],
            metadata=spec.metadata,
            state=job.state,
            attempt=job.attempt,
            started_at=_unix(job.started_at),
            cancel_requested_at=_unix(job.cancel_requested_at),
            pause_requested_at=_unix(job.pause_requested_at),
            paused_at=_unix(job.paused_at),
            suffix=spec.suffix,
            deploy=spec.deploy,
            output_model=run.output_model,
            run=shown_run(run),
            reference_digest=job.reference_digest,
            progress=_progress(job),
            dataset=_some(job.dataset, DATASET_FIELDS) if job.dataset else None,
        )


def _unix(moment: datetime | None) -> int | None:
    return unix(moment) if moment is not None else None


def _hyperparameters(spec: JobSpec, run: RunSpec) -> dict[str, Any]:
    """As submitted, with what "auto" has become, and without what the loss does not take. The multiplier stays as it
    was given; so do the numbers of a mix of losses, because what is left out is another number for each of them."""
    given = spec.method.hyperparameters.model_dump(mode="json")
    batch = {"batch_size": run.batch.batch_size, "n_epochs": run.batch.n_epochs}
    if given.pop("losses", None) and isinstance(spec.method.hyperparameters, DpoHyperparameters):
        asked = {name: value for name, value in given.items() if value != "auto" and name != "loss"}
        return {**asked, **batch, "losses": spec.method.hyperparameters.losses}
    decided = run.loss.model_dump() | batch
    values = {name: decided.get(name, value) if value == "auto" else value for name, value in given.items()}
    return {name: value for name, value in values.items() if name not in LossSpec.model_fields or name in decided}


def shown_run(run: RunSpec) -> dict[str, Any]:
    """The run without where things lie on our disks."""
    values = run.model_dump(mode="json")
    return _some(values, RUN_FIELDS) | {"data": _some(values["data"], DATA_FIELDS)}


def _progress(job: Job) -> dict[str, Any] | None:
    return _some(job.progress, ("stage", "done", "total", "message", "attempt", "at")) if job.progress else None


def _some(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _error(job: Job) -> JobError | None:
    if job.error_code is None and job.error_message is None:
        return None
    return JobError(code=job.error_code or "error", message=job.error_message or "", param=job.error_param)


class JobList(Wire):
    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class EventObject(Wire):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None
    # ours
    sequence: int
    """Grows within a job; a stream is taken up again after it."""
    state: str | None
    """Set when the event is a move of the job: the state it moved to."""
    actor: str | None

    @classmethod
    def of(cls, event: JobEvent) -> EventObject:
        return cls(
            id=event.id,
            created_at=unix(event.created_at),
            level=event.level,
            message=event.message,
            type=event.type,
            data=event.data,
            sequence=event.sequence,
            state=event.to_state,
            actor=event.actor,
        )


class EventList(Wire):
    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointObject(Wire):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float | None]
    """OpenAI's names where there is a value, and every metric under our own name."""
    # ours
    digest: str

    @classmethod
    def of(cls, row: JobCheckpoint) -> CheckpointObject:
        return cls(
            id=row.id,
            created_at=unix(row.created_at),
            fine_tuning_job_id=row.job_id,
            fine_tuned_model_checkpoint=row.model_id,
            step_number=row.step,
            metrics=_checkpoint_metrics(row),
            digest=row.digest,
        )


def _checkpoint_metrics(row: JobCheckpoint) -> dict[str, float | None]:
    values: dict[str, float | None] = dict(row.metrics)
    named = {"step": float(row.step), "train_loss": values.get("loss"), "valid_loss": values.get("eval_loss")}
    return values | {name: value for name, value in named.items() if value is not None}


class CheckpointList(Wire):
    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class JobDataset(Wire):
    """What is known of the job's data: checked at submission, prepared by the data stage."""

    report: DatasetReport | None
    dataset: dict[str, Any] | None

    @classmethod
    def of(cls, job: Job) -> JobDataset:
        return cls(report=job.dataset_report, dataset=_some(job.dataset, DATASET_FIELDS) if job.dataset else None)
