"""What a Ray job executes: `python -m dpo_service.runner STORE JOB ATTEMPT`.

    attempt.json ──> model ──> data stage ──> training ──> result.json
                     (digest)  (dataset.json)  (checkpoints/)

Each stage leaves a manifest and finds the one of an earlier attempt, so another attempt goes on where the last one
ended. `result.json` is the last thing written: without it the attempt has died. A SIGTERM becomes the stop flag. It
is looked for before each stage, by the data stage between two pieces of work, and by training between two steps, which
then saves. The attempt ends as stopped, which makes the job paused or cancelled, as its user has asked.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType

from dpo_service.errors import CheckpointError, DpoServiceError, NotFound, StopAsked, UserError, recurs
from dpo_service.manifests.checkpoint import RunResult
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.manifests.inspection import InspectionRequest
from dpo_service.reports import Reporter
from dpo_service.rows.balance import notes
from dpo_service.rows.sample import sample_rows
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import AttemptSpec, RunSpec
from dpo_service.specs.sampling import SamplerSpec
from dpo_service.storage import paths
from dpo_service.storage.hub import locate_model
from dpo_service.storage.store import Store
from dpo_service.telemetry import log

logger = logging.getLogger(__name__)
SETTLE_S = 3.0


def main(arguments: list[str]) -> int:
    """Run one attempt. Exit status 0 unless it failed."""
    log.configure()
    root, job_id, attempt = arguments
    store = Store(root)
    spec = store.read_model(paths.attempt_spec(job_id, int(attempt)), AttemptSpec)
    if _superseded(store, spec):
        logger.info("attempt %s of %s has ended or was superseded; nothing to do", attempt, job_id)
        return 0
    _stop_on_sigterm(store, spec)
    with _reporter(store, spec) as reporter:
        result = _guarded(store, spec, reporter)
        store.write_model(paths.attempt_result(job_id, spec.attempt), result)
    return 1 if result.status == "failed" else 0


def _superseded(store: Store, spec: AttemptSpec) -> bool:
    """A cluster may run an entrypoint again: one that has a result, or a successor, must not."""
    job_id = spec.run.job_id
    return store.exists(paths.attempt_result(job_id, spec.attempt)) or store.exists(
        paths.attempt_spec(job_id, spec.attempt + 1)
    )


def _stop_on_sigterm(store: Store, spec: AttemptSpec) -> None:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        store.path(paths.stop_flag(spec.run.job_id, spec.attempt)).touch()

    signal.signal(signal.SIGTERM, stop)


def _reporter(store: Store, spec: AttemptSpec) -> Reporter:
    spool = store.path(paths.spool_dir(spec.run.job_id, spec.attempt))
    return Reporter(spool, "driver", url=spec.report_url, token=spec.report_token)


def _guarded(store: Store, spec: AttemptSpec, reporter: Reporter) -> RunResult:
    """Run the stages; every way they can end becomes a result."""
    try:
        return _stages(store, spec, reporter)
    except StopAsked as asked:
        logger.info("%s", asked.message)
        return RunResult(job_id=spec.run.job_id, attempt=spec.attempt, status="stopped")
    except DpoServiceError as error:
        logger.exception("attempt failed")
        retryable = not isinstance(error, UserError) and getattr(error, "retryable", True)
        return _failed(spec, error.code, error.message, retryable, error.param)
    except Exception as error:
        logger.exception("attempt failed")
        reporter.message(traceback.format_exc(limit=-8), level="error")
        return _failed(spec, "internal_error", f"{type(error).__name__}: {error}", retryable=not recurs(error))


def _stages(store: Store, spec: AttemptSpec, reporter: Reporter) -> RunResult:
    _leave_if_asked(store, spec)
    import ray

    # Late: torch and Ray take seconds to import, and a failure to import them is the attempt's, not the process's.
    from dpo_service.checkpoint.format import MODEL, digest_of
    from dpo_service.online.fit import fit as fit_online
    from dpo_service.train.probe import verify_published
    from dpo_service.train.ray_worker import fit

    ray.init(address="auto", logging_level=logging.WARNING, log_to_driver=True, configure_logging=False)
    run = spec.run
    model_dir = locate_model(store, run.model)
    digest = digest_of(model_dir)
    _require_same_base(store, run, digest)
    _require_sound(store, run, model_dir, reporter)
    if run.reference.mode != "none":
        reporter.reference(0, digest)
    dataset = _prepare(store, spec, model_dir, digest, reporter)
    _leave_if_asked(store, spec)
    _tell_of_waiting(run, reporter)
    outcome = (fit_online if run.online else fit)(store, spec, dataset, model_dir, digest)
    if outcome.checkpoint is not None and not outcome.stopped:
        # A base of 4 bits is loaded on a GPU only, and the driver has none.
        adapted = model_dir if run.lora is not None and run.lora.quantize == "none" else None
        reporter.message(verify_published(store.path(outcome.checkpoint) / MODEL, adapted))
    return RunResult(
        job_id=run.job_id,
        attempt=spec.attempt,
        status="stopped" if outcome.stopped else "succeeded",
        checkpoint=outcome.checkpoint,
        checkpoint_digest=outcome.digest,
        model_id=run.output_model,
        trained_tokens=outcome.trained_tokens,
        steps=outcome.steps,
    )


def _tell_of_waiting(run: RunSpec, reporter: Reporter) -> None:
    """Ray starts the workers all at once, when there is room for all; until then a user should know what is missing."""
    import ray

    samplers = run.online.samplers if run.online else None

    def short() -> list[str]:
        return missing(run.resources, ray.available_resources(), samplers)

    deadline = time.monotonic() + SETTLE_S  # what the data stage used is given back within moments
    while short() and time.monotonic() < deadline:
        time.sleep(0.2)
    if lacking := short():
        reporter.message(f"Waiting for {' and '.join(lacking)}; something else holds the rest", level="warn")


def missing(resources: ResourceSpec, free: Mapping[str, float], samplers: SamplerSpec | None = None) -> list[str]:
    """What the workers and samplers need and the cluster has not free at the moment, in words."""
    needed = {
        "CPU": resources.workers * resources.cpus_per_worker,
        "GPU": resources.workers * resources.gpus_per_worker,
    }
    if samplers is not None:
        needed["CPU"] += samplers.booked_cpus
        needed["GPU"] += samplers.booked_gpus
    return [f"{n} {kind}s ({free.get(kind, 0):g} free)" for kind, n in needed.items() if n > free.get(kind, 0)]


def _leave_if_asked(store: Store, spec: AttemptSpec) -> None:
    """Raises StopAsked."""
    if _stop_asked(store, spec):
        raise StopAsked("asked to stop between two stages")


def _stop_asked(store: Store, spec: AttemptSpec) -> bool:
    return store.exists(paths.stop_flag(spec.run.job_id, spec.attempt))


def _prepare(store: Store, spec: AttemptSpec, model_dir: Path, digest: str, reporter: Reporter) -> DatasetManifest:
    from dpo_service.data.pipeline import prepare
    from dpo_service.train.reference import ReferenceScorer

    run = spec.run
    cached = run.reference.mode == "cached"
    scorer = partial(ReferenceScorer, str(model_dir), run.precision, run.batch, run.loss.ld_alpha)
    dataset = prepare(
        store,
        run.data,
        run.batch,
        job_id=run.job_id,
        model_dir=model_dir,
        reporter=reporter,
        scorer=scorer if cached else None,
        reference_digest=digest if cached else None,
        scored_as={"precision": run.precision, "ld_alpha": run.loss.ld_alpha},
        resources=run.resources,
        stop=partial(_stop_asked, store, spec),
    )
    for note in notes(dataset.report, run.loss):
        reporter.message(note[0].upper() + note[1:], level="warn")
    return dataset


def _require_same_base(store: Store, run: RunSpec, digest: str) -> None:
    """The base model, which is also the reference, is pinned by the first attempt and checked by every later one."""
    key = f"{paths.job_dir(run.job_id)}/base_digest"
    try:
        pinned = store.read(key).decode()
    except NotFound:
        store.write(key, digest.encode())
        return
    if pinned != digest:
        error = CheckpointError(
            f"model {run.model.name!r} has changed since the job began (digest {pinned[:12]} then, {digest[:12]} now); "
            "put the original files back, or submit a new job",
            param="model",
        )
        error.retryable = False
        raise error


def _require_sound(store: Store, run: RunSpec, model_dir: Path, reporter: Reporter) -> None:
    """Raises InvalidSpec where the model cannot be trained as the job asks: known before a row is read."""
    from dpo_service.inspection.inspect import inspect, require

    samples = sample_rows(store.path(run.data.training_file), run.data.training_name, run.data.rows)
    report = inspect(InspectionRequest(directory=str(model_dir), lora=run.lora, samples=samples))
    for note in report.notes:
        reporter.message(note)
    require(report)


def _failed(spec: AttemptSpec, code: str, message: str, retryable: bool, param: str | None = None) -> RunResult:
    return RunResult(
        job_id=spec.run.job_id,
        attempt=spec.attempt,
        status="failed",
        error_code=code,
        error_message=message,
        error_param=param,
        retryable=retryable,
    )


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Ray's and torch's exit hooks can hang for seconds after the work is done and the result is on disk.
    os._exit(code)
