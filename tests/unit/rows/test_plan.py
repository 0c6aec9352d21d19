from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_service.rows.plan import BatchPlan

sizes = st.tuples(st.integers(1, 60), st.integers(1, 20), st.integers(1, 3))


@given(sizes, st.booleans(), st.integers(0, 2**31 - 1))
def test_every_row_comes_once_an_epoch(size, shuffle, seed):
    n_rows, batch_size, n_epochs = size
    plan = BatchPlan(n_rows, batch_size, n_epochs, None, shuffle, seed)
    assert plan.total_steps == n_epochs * plan.steps_per_epoch
    for epoch in range(n_epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        rows = [plan.rows(step) for step in steps]
        assert sorted(chain(*rows)) == list(range(n_rows))
        assert all(len(batch) == batch_size for batch in rows[:-1])
        assert len(rows[-1]) in (n_rows % batch_size, batch_size)
        if not shuffle:
            assert list(chain(*rows)) == list(range(n_rows))


@given(sizes, st.integers(1, 5), st.integers(1, 4), st.none() | st.integers(64, 5000), st.integers(0, 99), st.data())
def test_ranks_share_each_step_whole_and_call_equally_often(size, world_size, micro, budget, seed, data):
    n_rows, batch_size, n_epochs = size
    lengths = data.draw(st.lists(st.integers(1, 2000), min_size=n_rows, max_size=n_rows))
    plan = BatchPlan(n_rows, batch_size, n_epochs, None, True, seed, lengths)
    for step in range(plan.steps_per_epoch):
        shares = plan.assign(step, world_size, micro, budget)
        assert len(shares) == world_size
        assert sorted(row for share in shares for part in share for row in part) == sorted(plan.rows(step))
        assert len({len(share) for share in shares}) == 1
        assert all(len(part) <= micro for share in shares for part in share)
        if budget is not None:
            long = [part for share in shares for part in share if sum(lengths[row] for row in part) > budget]
            assert all(len(part) == 1 for part in long)
        assert all(all(share) or all(len(part) <= 1 for part in share) for share in shares)
        counts = [sum(map(len, share)) for share in shares]
        assert max(counts) - min(counts) <= 1


def test_the_plan_is_a_function_of_its_arguments():
    first, same, other = (BatchPlan(50, 8, 2, None, True, seed) for seed in (7, 7, 8))
    steps = range(first.total_steps)
    assert [first.rows(s) for s in steps] == [same.rows(s) for s in steps]
    assert [first.rows(s) for s in steps] != [other.rows(s) for s in steps]
    assert first.rows(0) != first.rows(first.steps_per_epoch)


def test_one_rank_with_room_keeps_the_plans_order():
    plan = BatchPlan(10, 4, 1, None, True, 3, list(range(10, 0, -1)))
    assert plan.assign(0, 1, 4) == [[plan.rows(0)]]


def test_micro_batches_fill_their_budget():
    lengths = [10, 300, 20, 90, 40, 60, 30]
    plan = BatchPlan(7, 7, 1, None, False, 0, lengths)
    assert plan.assign(0, 1, 64, 100) == [[[1], [3], [4, 5], [0, 2, 6]]]
    assert plan.assign(0, 1, 2, 100) == [[[1], [3], [4, 5], [2, 6], [0]]]


def test_ranks_hold_nearly_equally_many_tokens():
    lengths = np.random.default_rng(0).lognormal(6, 1, 640).astype(int) + 1
    plan = BatchPlan(640, 64, 1, None, True, 0, lengths)
    for step in range(plan.total_steps):
        loads = [sum(lengths[row] for part in share for row in part) for share in plan.assign(step, 4, 8)]
        assert max(loads) - min(loads) <= max(lengths[plan.rows(step)])
        assert max(loads) <= 1.5 * sum(loads) / 4


@pytest.mark.parametrize(("max_steps", "total"), [(None, 6), (2, 2), (20, 20)])
def test_max_steps_decides_instead_of_epochs(max_steps, total):
    plan = BatchPlan(10, 4, 2, max_steps, False, 0)
    assert plan.total_steps == total
    assert plan.rows(total - 1) == list(range(10))[4 * ((total - 1) % 3) :][:4]


def test_epochs_and_tokens_of_a_step():
    plan = BatchPlan(10, 4, 2, None, False, 0, [5] * 10)
    assert plan.epoch(3) == 1.0
    assert (plan.tokens(0), plan.tokens(2)) == (20, 10)
