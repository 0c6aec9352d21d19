import pytest

from dpo_service.online.judges.build import Surroundings, build_judge
from dpo_service.online.judges.metrics import JudgeSums
from dpo_service.online.judges.port import Answer, JudgeRequest, PairVerdict, Usage, Verdict
from dpo_service.specs.judge import RulesJudgeSpec

DECIDED = PairVerdict(0, 1, ("first", "first"))
FLIPPED = PairVerdict(0, 1, ("first", "second"))
LEVEL = PairVerdict(0, 1, ("tie", "first"))
FAILED = PairVerdict(0, 1, ("first", None), "timeout")


def verdict(pair, scores=(None, None), missing=("tie", "tie"), **more):
    return Verdict("pairwise", scores, missing, (pair,), usage=Usage(2, 100, 10, 0.5), **more)


def sums(*verdicts):
    total = JudgeSums()
    for one in verdicts:
        total.note(one)
    return total


SEEN = (
    verdict(DECIDED, (1.0, 0.0), (), seconds=1.0),
    verdict(FLIPPED, seconds=1.0),
    verdict(LEVEL, seconds=8.0),
    verdict(FAILED, missing=("timeout", "timeout"), seconds=8.0),
    verdict(DECIDED, (1.0, 0.0), (), seconds=1e-6, cached=True),
)


def test_rates_are_of_what_they_can_be_of():
    report = sums(*SEEN).report()
    assert report["judge/position_flips"] == 1 / 4
    assert report["judge/ties"] == 2 / 4
    assert report["judge/failed_comparisons"] == 1 / 5
    assert report["judge/without_score"] == 6 / 10
    assert report["judge/cached"] == 1 / 5
    assert (report["judge/missing/tie"], report["judge/missing/timeout"]) == (4, 2)
    assert (report["judge/cost"], report["judge/calls"], report["judge/prompt_tokens"]) == (2.5, 10, 500)


def test_sums_of_parts_are_the_sums_of_the_whole():
    assert sums(*SEEN[:2]) + sums(*SEEN[2:]) == sums(*SEEN)
    assert sum((sums(one) for one in SEEN), JudgeSums()) == sums(*SEEN)


def test_latency_is_that_of_what_was_asked_and_close_to_the_truth():
    report = sums(*SEEN).report()
    assert report["judge/seconds_p50"] == pytest.approx(1.0, rel=0.2)
    assert report["judge/seconds_p99"] == pytest.approx(8.0, rel=0.2)


def test_of_nothing_there_are_no_rates():
    assert set(JudgeSums().report()) == {
        f"judge/{name}" for name in ("verdicts", "calls", "prompt_tokens", "completion_tokens", "cost")
    }


async def test_every_verdict_of_a_built_judge_is_counted_once():
    judge = build_judge(RulesJudgeSpec.model_validate({"rules": [{"rule": "exact_match"}]}), Surroundings()).judge
    await judge.judge(JudgeRequest("p", (Answer("a"), Answer("b")), reference="a"))
    await judge.judge(JudgeRequest("p", (Answer("a"),)))
    taken = judge.take()
    assert (taken.verdicts, taken.answers, taken.scored, taken.missing) == (2, 3, 2, {"abstained": 1})
    assert judge.take() == JudgeSums()
