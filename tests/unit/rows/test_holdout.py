import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_service.errors import InvalidData
from dpo_service.rows.facts import FACTS, decide
from dpo_service.rows.holdout import hold_out


def facts_of(prompts, rows=None, reverse=None, reasons=None):
    facts = np.zeros(len(prompts), FACTS)
    facts["line"] = np.arange(1, len(prompts) + 1)
    facts["prompt"] = prompts
    facts["row"] = rows if rows is not None else np.arange(100, 100 + len(prompts))
    facts["reverse"] = reverse if reverse is not None else 0
    facts["reason"] = reasons if reasons is not None else 0
    return facts


@given(
    prompts=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60).filter(lambda p: len(set(p)) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_prompt_lies_on_one_side_and_neither_side_is_empty(prompts, share, seed):
    facts = facts_of(np.array(prompts, np.uint64))
    out = hold_out(facts, share, seed)
    assert set(facts["prompt"][out]).isdisjoint(facts["prompt"][~out])
    assert out.any()
    assert not out.all()
    assert (out == hold_out(facts, share, seed)).all()


def test_the_held_out_share_is_what_was_asked_for_and_follows_the_seed():
    facts = facts_of(np.arange(1000, dtype=np.uint64))
    first, second = hold_out(facts, 0.2, 0), hold_out(facts, 0.2, 1)
    assert first.sum() == second.sum() == 200
    assert (first != second).any()


def test_rows_that_are_left_out_are_held_out_neither():
    facts = facts_of(np.arange(10, dtype=np.uint64), reasons=[4] * 5 + [0] * 5)
    assert not hold_out(facts, 0.5, 0)[:5].any()


def test_one_prompt_cannot_be_split():
    with pytest.raises(InvalidData, match="all rows have the same prompt"):
        hold_out(facts_of([7, 7, 7]), 0.5, 0)


def test_rows_that_validation_holds_do_not_train_in_either_order():
    training = facts_of([1, 2, 3, 3], rows=[10, 20, 30, 30])
    validation = facts_of([1, 2], rows=[10, 21], reverse=[11, 20])
    decided = decide(training, deduplicate=True, validation=validation)
    assert decided["reason"].tolist() == [5, 5, 0, 4]
    assert training["reason"].tolist() == [0, 0, 0, 0]


def test_held_out_prompts_are_not_trained_on_with_another_answer_either():
    training = facts_of([1, 2, 3, 3], rows=[10, 20, 30, 31])
    decided = decide(training, deduplicate=True, validation=facts_of([1, 3], rows=[11, 32]), held_prompts=True)
    assert decided["reason"].tolist() == [5, 0, 5, 5]
