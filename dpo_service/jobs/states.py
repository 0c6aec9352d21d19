"""The life of a job, as a table.

                   ┌─────────────────── RETRY ──────────────────┐
                   v                                            │
    (created) ─> queued ─── SUBMIT ──> submitting ── START ──> running ──┬── SUCCEED ──> succeeded
                 │ │  ^                     │                   │        └── FAIL ─────> failed
                 │ │  └── RESUME ─┐         ├────── PAUSE ──────┤
                 │ └─── PAUSE ──> paused    │      CANCEL       │
                 │                │  ^      v                   v
                 │         CANCEL │  └STOP─ pausing ── CANCEL ─> cancelling
                 │ CANCEL         v                                  │
                 └────────────> cancelled <────────── STOP ──────────┘

`submitting` means: this attempt is promised to the database, and the cluster has, or will be, asked for it. `pausing`
and `cancelling`: the attempt is asked to save and stop. One that succeeds first has succeeded. One that fails first is
cancelled; while pausing it has failed where another attempt would fail too, and is paused where another may help: the
next attempt is then the one that `resume` makes. A cancellation overtakes a pause, never the other way. A pausing job
cannot be resumed before it has paused: its attempt may have seen the wish and be saving already. An ended job never
moves again.
"""

from __future__ import annotations

from enum import StrEnum

from dpo_service.errors import Conflict


class State(StrEnum):
    QUEUED = "queued"
    SUBMITTING = "submitting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
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
    PAUSE = "pause"
    """The user asks for the workers to be given back, and the place to be kept."""
    RESUME = "resume"
    """The user asks for the job to go on."""
    STOP = "stop"
    """The attempt is gone after it was asked to stop."""


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
STOPPING = frozenset({State.PAUSING, State.CANCELLING})
"""States in which an attempt is asked to save and stop."""
ON_CLUSTER = frozenset({State.SUBMITTING, State.RUNNING}) | STOPPING
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
        Move.PAUSE: State.PAUSED,
        Move.RESUME: State.QUEUED,
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
        Move.PAUSE: State.PAUSING,
        Move.RESUME: State.SUBMITTING,
        Move.STOP: None,
    },
    State.RUNNING: {
        Move.SUBMIT: None,
        Move.START: State.RUNNING,
        Move.SUCCEED: State.SUCCEEDED,
        Move.FAIL: State.FAILED,
        Move.RETRY: State.QUEUED,
        Move.CANCEL: State.CANCELLING,
        Move.PAUSE: State.PAUSING,
        Move.RESUME: State.RUNNING,
        Move.STOP: None,
    },
    State.PAUSING: {
        Move.SUBMIT: None,
        Move.START: State.PAUSING,
        Move.SUCCEED: State.SUCCEEDED,
        Move.FAIL: State.FAILED,
        Move.RETRY: State.PAUSED,
        Move.CANCEL: State.CANCELLING,
        Move.PAUSE: State.PAUSING,
        Move.RESUME: None,
        Move.STOP: State.PAUSED,
    },
    State.PAUSED: {
        Move.SUBMIT: None,
        Move.START: None,
        Move.SUCCEED: None,
        Move.FAIL: None,
        Move.RETRY: None,
        Move.CANCEL: State.CANCELLED,
        Move.PAUSE: State.PAUSED,
        Move.RESUME: State.QUEUED,
        Move.STOP: None,
    },
    State.CANCELLING: {
        Move.SUBMIT: None,
        Move.START: State.CANCELLING,
        Move.SUCCEED: State.SUCCEEDED,
        Move.FAIL: State.CANCELLED,
        Move.RETRY: State.CANCELLED,
        Move.CANCEL: State.CANCELLING,
        Move.PAUSE: None,
        Move.RESUME: None,
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
    State.PAUSING: "running",
    State.PAUSED: "queued",
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
