"""The life of a job, as a table.

                        ┌────────────── RETRY ──────────────┐
                        v                                    │
    (created) ──> queued ── SUBMIT ──> submitting ── START ──> running
                    │                      │ CANCEL   CANCEL │ │
                    │ CANCEL               └──> cancelling <─┘ ├── SUCCEED ──> succeeded
                    v                              │ STOP      └── FAIL ─────> failed
                cancelled <────────────────────────┘

`submitting` means: this attempt is promised to the database, and the cluster has, or will be, asked for it. A job that
is asked to stop and succeeds first has succeeded; one that fails first is cancelled. An ended job never moves again.
A pause is one more state and two more moves; the test of completeness then names every pair that is to be decided.
"""

from __future__ import annotations

from enum import StrEnum

from dpo_service.errors import Conflict


class State(StrEnum):
    QUEUED = "queued"
    SUBMITTING = "submitting"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Move(StrEnum):
    """What can happen to a job."""

    SUBMIT = "submit"
    """An attempt is about to be given to the cluster."""
    START = "start"
    """The cluster runs the attempt."""
    SUCCEED = "succeed"
    FAIL = "fail"
    """The attempt failed, and another will not help."""
    RETRY = "retry"
    """The attempt failed, and another may help."""
    CANCEL = "cancel"
    """The user asks for the end."""
    STOP = "stop"
    """The attempt is gone after it was asked to stop."""


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
ON_CLUSTER = frozenset({State.SUBMITTING, State.RUNNING, State.CANCELLING})
"""States in which an attempt may hold the cluster's resources."""

_ABSORBED: dict[Move, State | None] = dict.fromkeys(Move)

TABLE: dict[State, dict[Move, State | None]] = {
    State.QUEUED: {
        Move.SUBMIT: State.SUBMITTING,
        Move.START: None,
        Move.SUCCEED: None,
        Move.FAIL: None,
        Move.RETRY: None,
        Move.CANCEL: State.CANCELLED,
        Move.STOP: None,
    },
    State.SUBMITTING: {
        Move.SUBMIT: None,
        Move.START: State.RUNNING,
        # A short attempt can end between two looks at the cluster, unseen while it ran.
        Move.SUCCEED: State.SUCCEEDED,
        Move.FAIL: State.FAILED,
        Move.RETRY: State.QUEUED,
        Move.CANCEL: State.CANCELLING,
        Move.STOP: None,
    },
    State.RUNNING: {
        Move.SUBMIT: None,
        Move.START: State.RUNNING,
        Move.SUCCEED: State.SUCCEEDED,
        Move.FAIL: State.FAILED,
        Move.RETRY: State.QUEUED,
        Move.CANCEL: State.CANCELLING,
        Move.STOP: None,
    },
    State.CANCELLING: {
        Move.SUBMIT: None,
        Move.START: State.CANCELLING,
        Move.SUCCEED: State.SUCCEEDED,
        Move.FAIL: State.CANCELLED,
        Move.RETRY: State.CANCELLED,
        Move.CANCEL: State.CANCELLING,
        Move.STOP: State.CANCELLED,
    },
    State.SUCCEEDED: _ABSORBED,
    State.FAILED: _ABSORBED,
    State.CANCELLED: _ABSORBED,
}
"""(state, move) -> state after it; the same state = already so, nothing to do; None = refused."""

OPENAI_STATUS: dict[State, str] = {
    State.QUEUED: "queued",
    State.SUBMITTING: "queued",
    State.RUNNING: "running",
    State.CANCELLING: "running",
    State.SUCCEEDED: "succeeded",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}
"""The word of OpenAI's API for each state; its list of words is closed."""


def after(state: State, move: Move) -> State:
    """The state that follows.

    Raises:
        Conflict: the move is not allowed in `state`.
    """
    target = TABLE[state][move]
    if target is None:
        raise Conflict(f"the job is {state}; it cannot {move} any more" if state in TERMINAL else _refusal(state, move))
    return target


def _refusal(state: State, move: Move) -> str:
    return f"the job is {state}; it cannot {move} from there"
