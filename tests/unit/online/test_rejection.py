"""Statistical rejection sampling against the distribution that it is to draw from."""

import math
from collections import Counter

import pytest

from dpo_service.online.rejection import Accepted, first_round_pairs, rejection_sample


def test_the_first_accepted_is_drawn_in_proportion_to_the_optimal_policy():
    rewards, beta = [0.0, 0.5, 1.0, -1.0], 0.8
    best = max(rewards)
    shares = [math.exp((reward - best) / beta) for reward in rewards]
    drawn = Counter(
        place for seed in range(4000) for place in rejection_sample(rewards, 4, beta, str(seed), max_rounds=1).places
    )
    for place, share in enumerate(shares):
        assert drawn[place] / 4000 == pytest.approx(share, abs=0.03)


def test_a_small_beta_takes_the_best_in_order_and_a_large_one_all_alike():
    rewards = [0.3, 0.9, 0.1, 0.5]
    assert rejection_sample(rewards, 3, 1e-6, "s") == Accepted((1, 3, 0), 4, 3, False)
    assert rejection_sample(rewards, 4, 1e9, "s").rounds == 1


def test_none_is_taken_twice_and_running_out_is_said():
    accepted = rejection_sample([1.0, None, 2.0, None], 3, 0.5, "s")
    assert sorted(accepted.places) == [0, 2]
    assert (accepted.candidates, accepted.ran_out) == (2, True)
    assert rejection_sample([None], 1, 0.5, "s") == Accepted((), 0, 0, True)


def test_the_rounds_are_capped():
    accepted = rejection_sample([float(n) for n in range(50)], 50, 1e-3, "s", max_rounds=5)
    assert (len(accepted.places), accepted.rounds, accepted.ran_out) == (5, 5, True)


def test_no_more_than_wanted_and_the_same_for_the_same_seed():
    rewards = [0.0] * 20
    assert len(rejection_sample(rewards, 7, 1.0, "s").places) == 7
    drawn = {rejection_sample([0.1 * n for n in range(20)], 7, 0.3, seed).places for seed in ("a", "a", "b")}
    assert len(drawn) == 2


def test_pairs_are_labelled_by_reward_and_equals_left_out():
    rewards = [1.0, 2.0, 3.0, 4.0, None]
    pairs = first_round_pairs([0, 1, 2, 3], rewards, "s")
    assert len(pairs) == 2
    assert sorted(place for pair in pairs for place in (pair.chosen, pair.rejected)) == [0, 1, 2, 3]
    assert all(rewards[pair.chosen] - rewards[pair.rejected] == pair.margin > 0 for pair in pairs)
    assert first_round_pairs([0, 1], [1.0, 1.0], "s") == ()
    assert len(first_round_pairs([0, 1, 2], rewards, "s")) == 1
