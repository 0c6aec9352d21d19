"""What becomes of a prompt's answers, source by source; and the pair's tokens."""

from __future__ import annotations

import pytest

from dpo_service.online.judges.metrics import Counted
from dpo_service.online.judges.port import Answer, PairVerdict, Verdict
from dpo_service.online.port import Sample
from dpo_service.online.prompts import PromptRow
from dpo_service.online.sources import OWN, Choice, Judged, Rejection, SelfPlay, Winning, pair_row
from dpo_service.specs.pairing import PairingSpec

PROMPT = PromptRow(0, (1, 2), "p", "own", {"answer": "3"}, (7, 8))


class Says:
    """A judge that says what it is told to."""

    name, digest = "says", "d"

    def __init__(self, *scores, pairs=()):
        self.verdict, self.asked = Verdict("says", scores, pairs=pairs), []

    async def judge(self, request):
        self.asked.append(request)
        return self.verdict

    async def close(self): ...


def some(count, *, finished=True):
    return [Answer(f"answer {place}", (place,), finished) for place in range(count)]


async def test_the_judge_sees_the_row_and_is_counted():
    judge = Says(1.0, 3.0, 2.0)
    source = Judged(Counted(judge), PairingSpec())
    chosen = await source.choose(PROMPT, some(3), "s")
    assert (chosen.choices, chosen.dropped, chosen.verdict) == ((Choice(1, 0),), None, judge.verdict)
    (request,) = judge.asked
    assert (request.reference, request.row, request.prompt_token_ids) == ("own", {"answer": "3"}, (1, 2))
    assert source.sums().verdicts == 1
    assert source.sums().verdicts == 0


async def test_rejection_pairs_accepted_candidates_by_reward():
    source = Rejection(Counted(Says(1.0, 5.0, 3.0, 4.0)), 100.0, 4)
    chosen = await source.choose(PROMPT, some(4), "s")
    scores = [1.0, 5.0, 3.0, 4.0]
    assert len(chosen.choices) == 2
    assert all(scores[one.chosen] > scores[one.rejected] for one in chosen.choices)


async def test_rejection_says_when_the_candidates_ran_out():
    source = Rejection(Counted(Says(None, 5.0)), 1.0, 2)
    assert (await source.choose(PROMPT, some(2), "s")).dropped == "candidates_ran_out"
    source = Rejection(Counted(Says(1.0, 2.0)), 1.0, 2)
    assert (await source.choose(PROMPT, some(2, finished=False), "s")).dropped == "candidates_ran_out"


async def test_win_probabilities_label_the_pair():
    compared = (
        PairVerdict(0, 1, ("first", "first")),
        PairVerdict(0, 2, ("first", "first")),
        PairVerdict(1, 2, ("first", "second")),
    )
    chosen = await Winning(Counted(Says(None, None, None, pairs=compared)), 1.0).choose(PROMPT, some(3), "s")
    assert chosen.choices == (Choice(0, 1, pytest.approx(2.5 / 3)),)
    by_score = await Winning(Counted(Says(0.0, 2.0)), 2.0).choose(PROMPT, some(2), "s")
    assert by_score.choices[0].label == pytest.approx((0.5 + 1 / (1 + 2.718281828**-1)) / 2)


@pytest.mark.parametrize(
    ("scores", "finished", "why"),
    [((1.0, 1.0), True, "tie"), ((None, None), True, "too_few_scores"), ((1.0, 2.0), False, "cut_off")],
)
async def test_without_a_winner_there_is_no_pair(scores, finished, why):
    chosen = await Winning(Counted(Says(*scores)), 1.0).choose(PROMPT, some(2, finished=finished), "s")
    assert (chosen.choices, chosen.dropped) == ((), why)


async def test_self_play_sets_the_rows_answer_against_a_sample():
    answers = [Answer("own", (7, 8)), Answer("other", (9,))]
    chosen = await SelfPlay().choose(PROMPT, answers, "s")
    assert chosen.choices == (Choice(OWN, 1),)
    row = pair_row(
        5, PROMPT, [Sample((7, 8), (-1.0, -1.0), True, 4), Sample((9,), (-2.0,), False, 4)], chosen.choices[0]
    )
    assert (row.chosen, row.rejected, row.chosen_logp, row.rejected_logp) == ((7, 8), (9,), None, -2.0)
    assert (row.position, row.version, row.truncated) == (5, 4, True)
    assert (await SelfPlay().choose(PROMPT, answers[:1], "s")).dropped == "same_text"
    assert (await SelfPlay().choose(PromptRow(0, (1,), "p", None, {}), answers, "s")).dropped == "no_reference"
