from __future__ import annotations

from typing import get_args

import pytest

from dpo_service.errors import Conflict
from dpo_service.jobs.states import ON_CLUSTER, OPENAI_STATUS, TABLE, TERMINAL, Move, State, after


def test_every_pair_of_state_and_move_is_decided() -> None:
    assert set(TABLE) == set(State)
    for state in State:
        assert set(TABLE[state]) == set(Move), state


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("move", Move)
def test_an_ended_job_never_moves(state: State, move: Move) -> None:
    with pytest.raises(Conflict, match=state.value):
        after(state, move)


def test_every_state_can_be_reached_and_every_job_can_end() -> None:
    def reachable(start: State) -> set[State]:
        seen, todo = {start}, [start]
        while todo:
            for target in TABLE[todo.pop()].values():
                if target is not None and target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    assert reachable(State.QUEUED) == set(State)
    for state in State:
        assert reachable(state) & TERMINAL, state


def test_only_the_table_of_moves_leads_back_to_the_queue() -> None:
    back = {(s, m) for s in State for m, t in TABLE[s].items() if t is State.QUEUED}
    retried = {(State.SUBMITTING, Move.RETRY), (State.RUNNING, Move.RETRY)}
    assert back == retried | {(State.PAUSED, Move.RESUME), (State.QUEUED, Move.RESUME)}


def test_cancelling_ends_in_success_only_by_success() -> None:
    ends = {move: target for move, target in TABLE[State.CANCELLING].items() if target in TERMINAL}
    assert ends.pop(Move.SUCCEED) is State.SUCCEEDED
    assert set(ends.values()) == {State.CANCELLED}


def test_a_pause_is_no_end_and_a_cancellation_overtakes_it() -> None:
    stopped = {State.CANCELLED: State.CANCELLING, State.PAUSED: State.PAUSING}
    for state, asked in stopped.items():
        assert {s for s in State if TABLE[s][Move.STOP] is state} == {asked}
    assert (TABLE[State.PAUSING][Move.CANCEL], TABLE[State.CANCELLING][Move.PAUSE]) == (State.CANCELLING, None)
    assert (TABLE[State.PAUSED][Move.CANCEL], TABLE[State.PAUSED][Move.SUBMIT]) == (State.CANCELLED, None)
    assert {s for s in State if TABLE[s][Move.RESUME] is None} == TERMINAL | {State.PAUSING, State.CANCELLING}
    assert State.PAUSED not in ON_CLUSTER | TERMINAL


def test_a_refusal_names_state_and_move() -> None:
    with pytest.raises(Conflict, match="the job is queued; it cannot start"):
        after(State.QUEUED, Move.START)


def test_every_state_has_a_word_that_the_openai_sdk_accepts() -> None:
    from openai.types.fine_tuning import FineTuningJob

    words = get_args(FineTuningJob.model_fields["status"].annotation)
    assert set(OPENAI_STATUS) == set(State)
    assert set(OPENAI_STATUS.values()) <= set(words)
    assert ON_CLUSTER.isdisjoint(TERMINAL)
