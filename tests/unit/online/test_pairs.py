"""From verdicts to pairs: who is chosen, and why a prompt gives none."""

import pytest

from dpo_service.online.judges.port import Answer, PairVerdict, Verdict
from dpo_service.online.pairs import Pair, pairs_of
from dpo_service.specs.pairing import PairingSpec


def paired(scores, *, lengths=None, finished=None, texts=None, pairs=(), missing=(), seed="s", **spec):
    count = len(scores)
    texts = texts or [f"answer {place}" for place in range(count)]
    lengths, finished = lengths or [1] * count, finished or [True] * count
    answers = [Answer(*one) for one in zip(texts, ((0,) * n for n in lengths), finished, strict=True)]
    verdict = Verdict("j", tuple(scores), tuple(missing), tuple(pairs))
    return pairs_of(answers, verdict, PairingSpec.model_validate(spec), seed)


def places(pairing):
    return [(pair.chosen, pair.rejected) for pair in pairing.pairs]


def test_the_best_against_the_worst():
    pairing = paired([2.0, 5.0, 1.0, 3.0])
    assert (pairing.pairs, pairing.dropped) == ((Pair(1, 2, 4.0),), None)


def test_a_missing_score_takes_no_part_and_is_not_the_worst():
    assert places(paired([2.0, None, 1.0, None], missing=[None, "timeout", None, "timeout"])) == [(0, 2)]


def test_all_pairs_above_the_margin():
    assert places(paired([1.0, 2.0, 4.0], choose="all_pairs", margin=1.0)) == [(2, 1), (2, 0)]
    assert places(paired([1.0, 1.0, 2.0], choose="all_pairs")) == [(2, 0), (2, 1)]


def test_the_best_against_a_random_one_is_a_function_of_the_seed():
    scores = [float(score) for score in range(20)]
    seen = {seed: places(paired(scores, choose="best_random", seed=str(seed))) for seed in range(20)}
    assert {chosen for ((chosen, _),) in seen.values()} == {19}
    assert len({rejected for ((_, rejected),) in seen.values()}) > 5
    assert seen[3] == places(paired(scores, choose="best_random", seed="3"))


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ({"scores": [1.0, 1.0]}, "tie"),
        ({"scores": [None, None], "missing": ["tie", "tie"]}, "tie"),
        ({"scores": [1.0, None], "missing": [None, "timeout"]}, "timeout"),
        ({"scores": [None, None, 1.0], "missing": ["abstained", "abstained", None]}, "abstained"),
        ({"scores": [1.0, 1.4], "margin": 0.5}, "below_margin"),
        ({"scores": [1.0, 2.0], "texts": ["same", "same"]}, "same_text"),
        ({"scores": [1.0, 2.0], "finished": [True, False]}, "cut_off"),
        ({"scores": [1.0, 2.0], "finished": [False, False]}, "cut_off"),
        ({"scores": [1.0, 2.0], "finished": [True, False], "cut_off": "dropped"}, "cut_off"),
        ({"scores": [1.0]}, "too_few_scores"),
        ({"scores": []}, "too_few_scores"),
        ({"scores": [1.0, 0.0], "pairs": [PairVerdict(0, 1, ("first", "second"))]}, "tie"),
        ({"scores": [1.0, 0.0], "pairs": [PairVerdict(0, 1, ("first", None), "timeout")]}, "missing"),
    ],
)
@pytest.mark.parametrize("choose", ["best_worst", "all_pairs", "best_random"])
def test_a_prompt_without_a_pair_says_why(case, why, choose):
    pairing = paired(**case, choose=choose)
    assert (pairing.pairs, pairing.dropped) == ((), why)


def test_a_cut_off_answer_can_lose_but_not_win():
    finished = [False, True, True, False]
    scores = [9.0, 5.0, 3.0, 1.0]
    assert places(paired(scores, finished=finished)) == [(1, 3)]
    assert places(paired(scores, finished=finished, cut_off="any")) == [(0, 3)]
    assert places(paired(scores, finished=finished, cut_off="dropped")) == [(1, 2)]
    assert places(paired(scores, finished=finished, choose="all_pairs")) == [(1, 2), (1, 3), (2, 3)]


def test_a_comparison_that_was_lost_makes_no_pair_whatever_the_scores():
    lost = [PairVerdict(0, 1, ("second", "second")), PairVerdict(0, 2, ("first", "first"))]
    assert places(paired([3.0, 1.0, 2.0], choose="all_pairs", pairs=lost)) == [(0, 2), (2, 1)]


def test_length_can_cost_score():
    scores, lengths = [5.0, 4.0, 1.0], [300, 10, 10]
    assert places(paired(scores, lengths=lengths)) == [(0, 2)]
    pairing = paired(scores, lengths=lengths, length={"penalty": 0.01})
    assert places(pairing) == [(1, 2)]
    assert pairing.pairs[0].margin == pytest.approx(3.0)


def test_of_about_equal_answers_the_nearest_in_length_become_the_pair():
    scores, lengths = [5.0, 4.9, 1.0, 1.1], [300, 40, 200, 50]
    assert places(paired(scores, lengths=lengths)) == [(0, 2)]
    assert places(paired(scores, lengths=lengths, length={"tolerance": 0.2})) == [(1, 3)]
    assert places(paired(scores, lengths=lengths, length={"tolerance": 9.0}, margin=2.0)) == [(1, 3)]
