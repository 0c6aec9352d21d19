"""Every error the service raises on purpose, in one tree.

    DpoServiceError                     status  code                 meaning
    ├── UserError (ValueError)          400     invalid_request      cannot be done as asked; the sentence says the mend
    │   ├── InvalidSpec                 400     invalid_spec         an option, or a combination of options
    │   ├── InvalidData                 400     invalid_data         a row of a file (carries `line`)
    │   ├── ModelNotFound               400     model_not_found      the name resolves to no model
    │   ├── ModelRefused                400     model_refused        weight files are not what config.json needs
    │   ├── NotFound                    404     not_found            an id nobody knows
    │   ├── Conflict                    409     conflict             the object's state does not allow it
    │   ├── Unauthorized                401     invalid_api_key
    │   ├── Forbidden                   403     forbidden            asked in a way that is not open
    │   ├── TooLarge                    413     too_large            a body over the limit
    │   └── StorageFull                 413     storage_full         the disk has no room for it
    ├── Unavailable                     503     unavailable          right request, wrong moment (carries `retry_after`)
    ├── ClusterError                    502     cluster_error        Ray refused or failed a request
    ├── StopAsked                       500     stop_asked           an attempt ends because it was asked to
    └── TrainingError                   500     training_failed      a stage failed (carries `retryable`)
        ├── NonFiniteLoss               500     non_finite_loss      never retried
        ├── RecurringError              500     training_failed      another attempt would meet it again; never retried
        ├── CheckpointError             500     checkpoint_invalid   a digest does not match, a file is missing
        ├── PublishedModelDiffers       500     published_differs    its files or its replica are not what was trained
        ├── SamplerLost                 500     sampler_lost         a sampler died; its prompts can be asked again
        ├── WeightsRefused              500     weights_refused      not what they say they are, or of another model
        └── JudgeError                  500     judge_failed         no verdicts can be had: a key, an address, a model
            ├── JudgeCallFailed         500     judge_call_failed    one call failed (carries `reason`); costs a verdict
            ├── SpendCapReached         500     spend_cap_reached    the judge cost what it may (carries `spent`)
            └── TooFewVerdicts          500     too_few_verdicts     under half of a window's prompts gave a pair

Each class carries its HTTP status and code; `api/problems.py` writes them in the wire format, and nothing else does.
"""

from __future__ import annotations

import re


class DpoServiceError(Exception):
    """Base of the tree. `message` is shown to the user, so it names the thing, its place and the mend."""

    status: int = 500
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class UserError(DpoServiceError, ValueError):
    """Something the user can mend. Never retried."""

    status = 400
    code = "invalid_request"


class InvalidSpec(UserError):
    """An option, or a combination of options, that cannot work. `param` is the dotted field."""

    code = "invalid_spec"


class InvalidData(UserError):
    """A row, or a whole file, that cannot be trained on. `line` counts from 1."""

    code = "invalid_data"

    def __init__(
        self, message: str, *, line: int | None = None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(f"line {line}: {message}" if line is not None else message, param=param, code=code)
        self.line = line

    def at(self, line: int) -> InvalidData:
        """The same of that line, where it has none."""
        return self if self.line is not None else InvalidData(self.message, line=line, param=self.param, code=self.code)


class ModelNotFound(UserError):
    code = "model_not_found"


class ModelRefused(UserError):
    """Weights are missing, cut short or of another model, or are quantised in a way that cannot be trained."""

    code = "model_refused"


class NotFound(UserError):
    status = 404
    code = "not_found"


class Conflict(UserError):
    status = 409
    code = "conflict"


class Unauthorized(UserError):
    status = 401
    code = "invalid_api_key"


class Forbidden(UserError):
    status = 403
    code = "forbidden"


class TooLarge(UserError):
    status = 413
    code = "too_large"


class StorageFull(UserError):
    """No room on the disk. A 4xx, because asking again at once cannot help."""

    status = 413
    code = "storage_full"


class Unavailable(DpoServiceError):
    """The request is right, the moment is not. `retry_after` is in seconds."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: int = 5, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class ClusterError(DpoServiceError):
    status = 502
    code = "cluster_error"


class StopAsked(DpoServiceError):
    """Unwinds a stage that was asked to stop. It ends in the runner, which notes the attempt as stopped."""

    code = "stop_asked"


class TrainingError(DpoServiceError):
    """A stage of a job failed. `retryable` says whether another attempt may succeed."""

    code = "training_failed"
    retryable = True


class NonFiniteLoss(TrainingError):
    code = "non_finite_loss"
    retryable = False


class RecurringError(TrainingError):
    """An error of the model's code, or memory that does not suffice: see `recurs`."""

    retryable = False


class CheckpointError(TrainingError):
    code = "checkpoint_invalid"


class PublishedModelDiffers(TrainingError):
    code = "published_differs"
    retryable = False


class SamplerLost(TrainingError):
    code = "sampler_lost"


class WeightsRefused(TrainingError):
    """A sampler keeps the weights it has."""

    code = "weights_refused"


class JudgeError(TrainingError):
    """The judge cannot give verdicts at all, and asking again cannot mend it."""

    code = "judge_failed"
    retryable = False


class JudgeCallFailed(JudgeError):
    """One call to a judge failed: that verdict is missing, and the job goes on. Never leaves `online/judges`.

    `reason` is what it is counted under; `passing` says whether the same call may succeed later, and `retry_after`,
    in seconds, when.
    """

    code = "judge_call_failed"

    def __init__(self, message: str, *, reason: str, passing: bool, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.passing = passing
        self.retry_after = retry_after


class SpendCapReached(JudgeError):
    """`spent` and `cap` are in the currency of the prices the job gave."""

    code = "spend_cap_reached"

    def __init__(self, message: str, *, spent: float, cap: float) -> None:
        super().__init__(message)
        self.spent = spent
        self.cap = cap


class TooFewVerdicts(JudgeError):
    """Another attempt may do better: an endpoint that was away comes back."""

    code = "too_few_verdicts"
    retryable = True


_RECURRING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_PASSING = re.compile(r"nccl|gloo|cuda error|connection|timed? ?out|socket|peer|store|broken", re.IGNORECASE)


def recurs(error: BaseException, *, computing: bool = False) -> bool:
    """Whether another attempt at the same would meet `error` again.

    What Python raises for what the code asks of it recurs, and memory that did not suffice on a device. What the
    outside does (processes, connections, files, other ranks) may pass. RuntimeError is either: where a model was
    `computing`, its text decides; elsewhere it may pass.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, DpoServiceError):
        return isinstance(error, UserError) or not getattr(error, "retryable", True)
    if "RayTaskError" in kinds:  # what a task raised, on its way to the driver
        cause = getattr(error, "cause", None)
        return cause is not None and recurs(cause, computing=computing)
    if isinstance(error, OSError) or kinds & {"DistError", "RayError"}:
        return False
    if isinstance(error, _RECURRING) or "OutOfMemoryError" in kinds:
        return True
    return computing and isinstance(error, RuntimeError) and _PASSING.search(str(error)) is None
