"""How an attempt ended, and what that means for its job. Pure but for `read_result`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from dpo_service.errors import CheckpointError, NotFound
from dpo_service.jobs.moves import Level
from dpo_service.jobs.retry import GiveUp, decide
from dpo_service.jobs.states import Move, State
from dpo_service.manifests.checkpoint import CheckpointManifest, RunResult
from dpo_service.storage import paths
from dpo_service.storage.store import Store

MANIFEST = "manifest.json"
DIED = "attempt_died"
INTERRUPTED = "attempt_interrupted"


@dataclass(frozen=True)
class Failure:
    code: str
    message: str
    param: str | None = None
    retryable: bool = True


@dataclass(frozen=True)
class Success:
    result: RunResult
    checkpoint: str
    """Storage key of the checkpoint's directory."""
    manifest: CheckpointManifest


@dataclass(frozen=True)
class Stopped:
    """It ended because it was asked to."""


Ending = Success | Failure | Stopped


@dataclass(frozen=True)
class Verdict:
    """The move to make and what to write beside it."""

    move: Move
    message: str
    level: Level = "info"
    failure: Failure | None = None
    delay: timedelta | None = None
    """For RETRY."""


def read_result(store: Store, job_id: str, attempt: int, message: str) -> Ending:
    """What the attempt left behind. `message` is what the cluster says of its end, for one that left nothing."""
    try:
        result = store.read_model(paths.attempt_result(job_id, attempt), RunResult)
    except NotFound:
        # The first line is the cluster's own sentence; what follows is the end of the log, which `dpo logs` shows.
        headline = message.partition("\n")[0].partition(", last available logs")[0]
        said = f" ({headline})" if headline else ""
        return Failure(DIED, f"the job's process ended without leaving a result{said}; its log may say why")
    except ValueError as error:
        return Failure(DIED, f"the job's result cannot be read: {error}")
    if result.status == "succeeded":
        return _verified(store, result)
    if result.status == "stopped":
        return Stopped()
    return Failure(
        code=result.error_code or "training_failed",
        message=result.error_message or "the job failed and did not say why",
        param=result.error_param,
        retryable=result.retryable,
    )


def _verified(store: Store, result: RunResult) -> Ending:
    """A success counts when its checkpoint is there: the manifest is the last file of a checkpoint to appear."""
    try:
        if result.checkpoint is None:
            raise CheckpointError("the job's result names no checkpoint")
        manifest = store.read_model(f"{result.checkpoint}/{MANIFEST}", CheckpointManifest)
        if result.checkpoint_digest not in (None, manifest.digest):
            raise CheckpointError(f"checkpoint {result.checkpoint} is not the one the job has saved last")
    except (CheckpointError, NotFound, ValueError) as error:
        return Failure(CheckpointError.code, f"the job ended well, but its checkpoint does not stand: {error}")
    return Success(result, result.checkpoint, manifest)


def judge(ending: Ending, state: State, *, attempt: int, failures: int, max_attempts: int, chance: float) -> Verdict:
    """What the end of attempt number `attempt` makes of a job in `state`, of which `failures` attempts failed before.
    `chance` in [0, 1) spreads the delay of a retry."""
    if isinstance(ending, Success):
        return Verdict(Move.SUCCEED, "The job has successfully completed")
    if state is State.CANCELLING:
        return Verdict(Move.STOP, "Fine-tuning job cancelled")
    if state is State.PAUSING and (isinstance(ending, Stopped) or ending.retryable):
        return _paused(ending)
    if isinstance(ending, Stopped):
        ending = Failure(INTERRUPTED, "the attempt was ended from outside before it was done")
    decision = decide(failures + 1, retryable=ending.retryable, max_attempts=max_attempts, chance=chance)
    if isinstance(decision, GiveUp):
        note = f" ({decision.why})" if ending.retryable else ""
        return Verdict(Move.FAIL, f"Fine-tuning job failed: {ending.message}{note}", "error", failure=ending)
    seconds = decision.delay.total_seconds()
    message = f"Attempt {attempt} failed: {ending.message}. The next attempt starts in {seconds:.0f} s"
    return Verdict(Move.RETRY, message, "warn", failure=ending, delay=decision.delay)


def _paused(ending: Failure | Stopped) -> Verdict:
    """However it ended, its newest checkpoint is good. That it was killed is no news: that may have been our doing."""
    message = "Fine-tuning job paused; when it is resumed, it goes on from its newest checkpoint"
    if isinstance(ending, Stopped) or ending.code == DIED:
        return Verdict(Move.STOP, message)
    return Verdict(Move.STOP, f"{message}. Its attempt had failed: {ending.message}", "warn", failure=ending)
