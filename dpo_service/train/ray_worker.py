"""Training under Ray Train: the only file of this package that knows Ray.

    fit (driver, inside the job) ── TorchTrainer ──> n workers ── gloo | nccl ──> loop.train
         └<── train.json in storage <── rank 0: the outcome, or the error that must not be retried

Workers are given storage keys and read everything themselves. A worker that dies ends its group; Ray Train starts a new
one, which goes on from the newest checkpoint that verifies, as a new attempt after a killed driver does: one mechanism,
ours (`checkpoint.load`), and Ray's own checkpoint bookkeeping stays out of it.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dpo_service.errors import (
    CheckpointError,
    DpoServiceError,
    JudgeError,
    ModelRefused,
    NonFiniteLoss,
    RecurringError,
    SamplerLost,
    TooFewVerdicts,
    TrainingError,
    UserError,
    WeightsRefused,
    recurs,
)
from dpo_service.ids import random_suffix
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.reports import Reporter
from dpo_service.specs.base import Spec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import AttemptSpec, RunSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from dpo_service.telemetry import log
from dpo_service.train.feed import StepFeed
from dpo_service.train.loop import TrainOutcome, train
from dpo_service.train.ranks import BACKENDS, Ranks
from dpo_service.train.tracking import Tracked

logger = logging.getLogger(__name__)
MAX_WORKER_FAILURES = 3
HEALTH_CHECK_S = "0.5"
"""How often Ray Train looks after its workers: a dead one is seen within it, and a start is not held up by it."""

ERRORS: dict[str, type[DpoServiceError]] = {
    kind.__name__: kind
    for kind in (
        NonFiniteLoss,
        RecurringError,
        CheckpointError,
        SamplerLost,
        WeightsRefused,
        TooFewVerdicts,
        JudgeError,
        TrainingError,
        ModelRefused,
        UserError,
    )
}
"""What a worker may end with, by the name under which it leaves it for the driver."""


FeedFactory = Callable[[RunSpec, DatasetManifest, Store, Ranks], StepFeed]


class WorkerResult(Spec):
    """What rank 0 leaves for the driver: an outcome, or an error."""

    outcome: dict[str, Any] | None = None
    error: str | None = None
    """One of `ERRORS`."""
    message: str = ""


class WorkerConfig(Spec):
    """What a worker is told. It is visible in Ray's metadata, so it holds names and places, no secrets."""

    root: str
    job_id: str
    attempt: int
    dataset: DatasetManifest
    model_dir: str
    base_digest: str


def name_of(error: BaseException) -> str:
    """Its name in `ERRORS`, or that of the nearest class it is a kind of."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS)


def fit(
    store: Store,
    attempt: AttemptSpec,
    dataset: DatasetManifest,
    model_dir: Path,
    base_digest: str,
    feed: FeedFactory | None = None,
) -> TrainOutcome:
    """Train the run of `attempt` on its workers, resuming where an earlier attempt stopped; blocks until it ends.

    The attempt's spec lies in storage (`paths.attempt_spec`); every worker can read the storage root and `model_dir`,
    whose digest is `base_digest`. `feed` is called by every worker, to which it goes as Ray sends it; None = the rows
    of `dataset`.

    Raises:
        NonFiniteLoss, CheckpointError, TrainingError: as `loop.train`.
        RecurringError: a worker met an error that another try would meet again.
        TrainingError: workers died more than `MAX_WORKER_FAILURES` times.
    """
    run = attempt.run
    store.delete(_result_key(run.job_id, attempt.attempt))
    config = WorkerConfig(
        root=str(store.root),
        job_id=run.job_id,
        attempt=attempt.attempt,
        dataset=dataset,
        model_dir=str(model_dir),
        base_digest=base_digest,
    )
    try:
        _run_workers(config, run.resources, feed)
    except TrainingError:
        if not _has_failed(store, _result_key(run.job_id, attempt.attempt)):
            raise
    result = store.read_model(_result_key(run.job_id, attempt.attempt), WorkerResult)
    if result.error is not None:
        raise ERRORS[result.error](result.message)
    return TypeAdapter(TrainOutcome).validate_python(result.outcome)


def _run_workers(config: WorkerConfig, resources: ResourceSpec, feed: FeedFactory | None) -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_S)
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    start_ray()
    store = Store(config.root)
    on_gpu = resources.gpus_per_worker > 0
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": config.model_dump_json(), "feed": feed},
        torch_config=TorchConfig(backend=BACKENDS["cuda" if on_gpu else "cpu"]),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=RunConfig(
            name=random_suffix(8),
            storage_path=str(store.path(f"{paths.attempt_dir(config.job_id, config.attempt)}/ray")),
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"the training workers failed: {_first_cause(error)}") from error


def work(loop_config: dict[str, Any]) -> None:
    """One rank. What retrying cannot mend is left in storage and not raised, so that Ray Train does not retry it."""
    config = WorkerConfig.model_validate_json(loop_config["config"])
    store = Store(config.root)
    ranks, key = _ranks(), _result_key(config.job_id, config.attempt)
    if _has_failed(store, key):
        return
    try:
        outcome = _train(config, store, ranks, loop_config["feed"])
    except (TrainingError, UserError) as error:
        result = WorkerResult(error=name_of(error), message=error.message)
    except Exception as error:
        if not recurs(error, computing=True):
            raise
        logger.exception("rank %d failed", ranks.rank)
        store.write_model(key, WorkerResult(error=RecurringError.__name__, message=_described(error)))
        if ranks.world > 1:
            raise  # the others wait for this rank: Ray Train ends and restarts them all, and they leave at once
        return
    else:
        result = WorkerResult(outcome=asdict(outcome))
    if ranks.first and not _has_failed(store, key):
        store.write_model(key, result)


def _has_failed(store: Store, key: str) -> bool:
    """Whether a rank of this attempt met an error that another try would meet again."""
    return store.exists(key) and store.read_model(key, WorkerResult).error == RecurringError.__name__


def _described(error: BaseException) -> str:
    """Type, text and place; for memory that did not suffice, what takes less."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    less = ""
    if "OutOfMemoryError" in type(error).__name__:
        less = "; lower micro_batch_tokens, set activation_checkpointing to true, or train a LoRA adapter (`dpo plan`)"
    return f"{text} ({Path(place.filename).name}, line {place.lineno}, in {place.name}){less}"


def _train(config: WorkerConfig, store: Store, ranks: Ranks, feed: FeedFactory | None) -> TrainOutcome:
    attempt = store.read_model(paths.attempt_spec(config.job_id, config.attempt), AttemptSpec)
    stop_flag = store.path(paths.stop_flag(config.job_id, config.attempt))
    reporter = Tracked(_reporter(store, attempt), attempt.run) if ranks.first else None
    try:
        return train(
            attempt.run,
            config.dataset,
            Path(config.model_dir),
            store=store,
            base_digest=config.base_digest,
            ranks=ranks,
            reports=reporter,
            stop=stop_flag.exists,
            feed=feed(attempt.run, config.dataset, store, ranks) if feed else None,
        )
    finally:
        if reporter is not None:
            reporter.close()


def _reporter(store: Store, attempt: AttemptSpec) -> Reporter:
    spool = store.path(paths.spool_dir(attempt.run.job_id, attempt.attempt))
    return Reporter(spool, "train", url=attempt.report_url, token=attempt.report_token)


def _ranks() -> Ranks:
    """This process's place, its device, and its share of the machine's cores."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    logging.getLogger("ray").setLevel(logging.ERROR)
    log.quiet()
    context = ray.train.get_context()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    return Ranks(context.get_world_rank(), context.get_world_size(), get_device())


def start_ray() -> None:
    """Join the cluster of the job we run in (RAY_ADDRESS), unless an earlier stage has."""
    import ray

    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR)


def _first_cause(error: BaseException) -> str:
    """The last line of what the first worker said, or of the error itself."""
    failures = getattr(error, "worker_failures", None) or {}
    text = str(next(iter(failures.values()), error)).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def _result_key(job_id: str, attempt: int) -> str:
    return f"{paths.attempt_dir(job_id, attempt)}/train.json"
