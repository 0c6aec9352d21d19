"""Which policy a step's pairs come from, what lies ready ahead of the trainer, and what ends it."""

from __future__ import annotations

import asyncio

import pytest

from dpo_service.errors import JudgeError, SamplerLost, TooFewVerdicts, TrainingError, WeightsRefused
from tests.unit.online.curator_kit import Loop, ScriptedJudge, settle, version

TIMES = dict.fromkeys(
    [
        "online/sample_seconds",
        "online/judge_seconds",
        "online/sampled_tokens_per_second",
        *(f"judge/seconds_p{share}" for share in (50, 90, 99)),
    ]
)
"""What differs between two runs of the same."""


def run(test):
    asyncio.run(asyncio.wait_for(test, 60))


def test_on_policy_a_step_waits_for_the_weights_of_the_one_before():
    async def test():
        loop = Loop(staleness=0)
        await loop.start()
        for step in range(4):
            made = await loop.pairs(step)
            assert {row.version for row in made.rows} == {step}
            await settle()
            assert len(loop.sampler.prompts) == 4 * (step + 1), "nothing was sampled ahead"
            await loop.trained(step)
        await loop.curator.close()

    run(test())


def test_at_staleness_one_the_next_step_is_sampled_while_this_one_trains():
    async def test():
        loop = Loop(staleness=1)
        await loop.start()
        first = await loop.pairs(0)
        second = await loop.pairs(1)  # the weights of step 0 were never published: it overlapped
        assert {row.version for row in (*first.rows, *second.rows)} == {0}
        await settle()
        assert len(loop.sampler.prompts) == 8, "step 2 needs version 1"
        await loop.trained(0)
        assert {row.version for row in (await loop.pairs(2)).rows} == {1}
        await loop.curator.close()

    run(test())


def test_no_more_lies_ready_than_the_staleness_allows():
    """RSO's samplers keep their first weights: only the room holds them back."""

    async def test():
        loop = Loop(staleness=2, sync_every=None)
        await loop.curator.start(0, None, {})
        await settle()
        assert len(loop.sampler.prompts) == 3 * 4
        await loop.pairs(1)
        await settle()
        assert len(loop.sampler.prompts) == 4 * 4
        await loop.curator.close()

    run(test())


def test_iterated_sources_train_an_iteration_on_its_first_version():
    async def test():
        loop = Loop(staleness=0, sync_every=3)
        await loop.start()
        versions = []
        for step in range(7):
            made = await loop.pairs(step)
            versions.append({row.version for row in made.rows})
            if (step + 1) % 3 == 0:
                await loop.trained(step)
        assert versions == [{0}, {0}, {0}, {3}, {3}, {3}, {6}]
        await loop.curator.close()

    run(test())


def test_a_step_is_exactly_its_size_and_ties_are_asked_no_second_time():
    async def test():
        loop = Loop(judge=ScriptedJudge(ties=[1, 2, 5]), staleness=0)
        await loop.start()
        made = await loop.pairs(0)
        assert [row.position for row in made.rows] == [0, 3, 4, 6]
        assert made.stats.report()["online/valid_share"] == 4 / 7
        assert made.stats.dropped == {"tie": 3}
        assert made.counters["position"] == 7
        assert [turn.dropped for turn in loop.kept.steps[0]] == [None, "tie", "tie", None, None, "tie", None]
        await loop.curator.close()

    run(test())


def test_the_tokens_are_those_that_were_sampled():
    async def test():
        loop = Loop()
        await loop.start()
        row = (await loop.pairs(0)).rows[3]
        assert (row.prompt, row.chosen, row.rejected) == ((3, 3), (0, 2, 3), (0, 0, 3))
        assert (row.chosen_logp, row.rejected_logp) == (-1.0, -1.0)
        await loop.curator.close()

    run(test())


def test_left_over_pairs_go_to_the_next_step_unless_they_are_too_old():
    async def test():
        """Each prompt gives three pairs: step 0 takes four of twelve."""
        loop = Loop(choose="all_pairs", staleness=1)
        await loop.start()
        assert [row.position for row in (await loop.pairs(0)).rows] == [0, 0, 0, 1]
        assert [row.position for row in (await loop.pairs(1)).rows] == [1, 1, 2, 2]
        assert len(loop.sampler.prompts) == 4
        await loop.trained(0)
        made = await loop.pairs(2)
        assert made.stats.stale == 4
        assert {row.version for row in made.rows} == {1}
        assert [row.position for row in made.rows] == [4, 4, 4, 5]
        await loop.curator.close()

    run(test())


def test_resumed_it_asks_what_the_unbroken_run_asks():
    async def test():
        unbroken = Loop(judge=ScriptedJudge(ties=[1, 2]), staleness=0)
        await unbroken.start()
        for step in range(5):
            made = await unbroken.pairs(step)
            if step == 2:
                counters, done = made.counters, len(unbroken.sampler.prompts)
            await unbroken.trained(step)
        resumed = Loop(judge=ScriptedJudge(ties=[1, 2]), staleness=0)
        await resumed.start(3, counters)
        for step in (3, 4):
            again = await resumed.pairs(step)
            await resumed.trained(step)
        assert again.rows == made.rows
        assert again.counters == made.counters
        assert unbroken.sampler.prompts[done : done + 8] == resumed.sampler.prompts[:8]
        for loop in (unbroken, resumed):
            await loop.curator.close()

    run(test())


def test_started_again_it_forgets_what_the_lost_trainer_had_seen():
    async def test():
        loop = Loop(staleness=1)
        await loop.start()
        before = await loop.pairs(0)
        for step in range(3):
            await loop.pairs(step)
            await loop.trained(step)
        await loop.start()
        again = await loop.pairs(0)
        assert again.rows == before.rows
        await loop.curator.close()

    run(test())


@pytest.mark.parametrize("error", [SamplerLost("all dead"), KeyError("x")])
def test_an_error_of_the_sampler_reaches_who_waits_and_who_comes_later(error):
    async def test():
        loop = Loop()
        loop.sampler.held.clear()
        await loop.start()
        waiting = asyncio.create_task(loop.pairs(0))
        await loop.sampler.asked.wait()
        loop.sampler.fails = error
        loop.sampler.held.set()
        with pytest.raises(TrainingError, match=r"all dead|KeyError"):
            await waiting
        with pytest.raises(TrainingError):
            await loop.pairs(1)
        await loop.curator.published(version(1))  # the trainer hears of it when it asks for pairs, on every rank
        await loop.curator.close()

    run(test())


def test_an_error_of_the_judge_or_of_a_sync_reaches_the_trainer():
    async def test():
        loop = Loop(judge=ScriptedJudge(fails=JudgeError("a wrong key")))
        await loop.start()
        with pytest.raises(JudgeError, match="wrong key"):
            await loop.pairs(0)
        await loop.curator.close()
        loop = Loop(staleness=0)
        await loop.start()
        await loop.pairs(0)
        loop.sampler.refuses = WeightsRefused("torn")
        await loop.trained(0)
        with pytest.raises(WeightsRefused):
            await loop.pairs(1)
        await loop.curator.close()

    run(test())


def test_every_rank_gets_the_same_of_a_step_before_and_after_a_failure():
    async def test():
        loop = Loop(staleness=1)
        await loop.start()
        await loop.pairs(0)
        await loop.pairs(1)
        loop.sampler.refuses = WeightsRefused("torn")
        loop.sampler.held.clear()
        await loop.trained(0)
        for _ in range(2):
            with pytest.raises(WeightsRefused):
                await loop.pairs(2)
            loop.sampler.held.set()  # the pairs of step 2 are made by now
            await settle()
        assert (await loop.pairs(1)).step == 1  # of a rank that is slower
        await loop.curator.close()

    run(test())


def test_too_few_verdicts_end_it_and_the_window_outlives_a_resume():
    async def test():
        loop = Loop(judge=ScriptedJudge(ties=range(6)), size=2, staleness=0)
        await loop.start()
        with pytest.raises(TooFewVerdicts, match="tie: "):
            for step in range(40):
                made = await loop.pairs(step)
                await loop.trained(step)
        assert len(made.counters["guard"]) > 50
        again = Loop(judge=ScriptedJudge(ties=range(6)), size=2, staleness=0)
        await again.start(30, made.counters)
        with pytest.raises(TooFewVerdicts):
            for step in range(30, 36):
                await again.pairs(step)
                await again.trained(step)
        for one in (loop, again):
            await one.curator.close()

    run(test())


def test_closed_it_leaves_no_task():
    async def test():
        loop, before = Loop(), asyncio.all_tasks()
        loop.sampler.held.clear()
        await loop.start()
        await loop.sampler.asked.wait()
        await loop.curator.close()
        assert asyncio.all_tasks() == before
        assert loop.sampler.closed
        assert loop.judge.closed

    run(test())


def test_held_out_prompts_are_answered_by_the_policy_of_now():
    async def test():
        loop = Loop(held_out=3, staleness=0)
        await loop.start()
        for step in range(3):
            first, second = await loop.evaluation(step), await loop.evaluation(step)
            assert first is second, "every rank asks, and it is done once"
            assert [one.sample.version for one in first.answers] == [step] * 3
            assert (first.reward, first.judge.verdicts) == (0.0, 3)
            await loop.pairs(step)
            await loop.trained(step)
        await loop.curator.close()

    run(test())


@pytest.mark.parametrize(("sync_every", "held"), [(None, 0), (4, 0)])
def test_lent_weights_answer_held_out_prompts_and_nothing_is_trained_on_them(sync_every, held):
    async def test():
        loop = Loop(held_out=3, staleness=2, sync_every=sync_every)
        await loop.curator.start(0, version(0), {})
        loop.sampler.held.clear()
        await loop.sampler.asked.wait()
        waiting = asyncio.create_task(loop.evaluation(2))
        await loop.curator.published(version(2), lent=True)
        await settle()
        assert loop.sampler.current == 0, "the step under way is not sampled from two policies"
        loop.sampler.held.set()
        assert [one.sample.version for one in (await waiting).answers] == [2, 2, 2]
        await settle()
        steps = len(loop.kept.steps)
        assert steps == 1, "room for two more, and weights that are not to be trained on"
        await loop.curator.published(version(held))
        for step in range(4):
            made = await loop.pairs(step)
            assert {row.version for row in made.rows} == {held}
            assert made.stats.sync_seconds == 0, "what an evaluation takes is not training's"
        assert loop.sampler.current == held
        await loop.curator.close()

    run(test())


def test_evaluated_or_not_the_training_is_the_same():
    async def made(every):
        loop = Loop(judge=ScriptedJudge(ties=[1, 2]), held_out=5, staleness=0)
        await loop.start()
        steps = []
        for step in range(4):
            if every and step % every == 0:
                await loop.evaluation(step)
            steps.append(await loop.pairs(step))
            await loop.trained(step)
        await loop.curator.close()
        counted = [(step.rows, step.counters, step.stats.report() | TIMES) for step in steps]
        return counted, loop.asked(held_out=False), loop.asked(held_out=True), loop.kept.steps

    async def test():
        with_it, without = await made(2), await made(None)
        assert with_it[:2] == without[:2]
        assert with_it[3] == without[3]
        assert (len(with_it[2]), len(without[2])) == (10, 0)
        seeds = [[prompt.seed for prompt, version in with_it[2] if version == step] for step in (0, 2)]
        assert sorted(seeds[0]) == sorted(seeds[1]), "the same dice each time"

    run(test())


def test_an_error_in_an_evaluation_reaches_who_asked():
    async def test():
        loop = Loop(held_out=3, staleness=0)
        loop.valid_judge.fails = JudgeError("a wrong key")
        await loop.start()
        with pytest.raises(JudgeError, match="wrong key"):
            await loop.evaluation(0)
        loop.valid_judge.fails = KeyError("x")
        await loop.start()
        with pytest.raises(TrainingError, match="KeyError"):
            await loop.evaluation(0)
        await loop.start()
        await loop.pairs(0)
        loop.sampler.refuses = WeightsRefused("torn")
        await loop.curator.published(version(1), lent=True)
        with pytest.raises(WeightsRefused):
            await loop.evaluation(1)
        await loop.curator.close()

    run(test())


def test_started_again_lent_weights_are_given_back():
    async def test():
        loop = Loop(held_out=3, staleness=0, sync_every=None)
        await loop.start()
        await loop.pairs(0)
        await loop.curator.published(version(1), lent=True)
        await loop.evaluation(1)
        await loop.curator.start(0, version(0), {})
        assert {row.version for row in (await loop.pairs(0)).rows} == {0}
        await loop.curator.close()

    run(test())


def test_who_lacks_weights_has_the_trainer_asked_for_them_on_every_rank_alike():
    async def test():
        loop = Loop(staleness=0)
        loop.sampler.held.clear()
        await loop.start()
        ranks = [asyncio.create_task(loop.curator.pairs(0)) for _ in range(2)]
        await loop.sampler.asked.wait()
        await loop.curator.lacking()
        assert [await rank for rank in ranks] == [None, None]
        waiting = asyncio.create_task(loop.curator.pairs(0, 1))
        await settle()
        assert not waiting.done(), "they were asked for, and are on their way"
        loop.sampler.held.set()
        await loop.curator.published(version(0))
        made = await waiting
        assert made.step == 0
        assert await loop.curator.pairs(0) is None, "a rank that comes late sends with the others"
        assert await loop.curator.pairs(0, 1) is made
        await loop.curator.close()

    asyncio.run(test())


def test_what_a_publication_brings_is_not_asked_for():
    async def test():
        loop = Loop(staleness=0)
        await loop.start()
        made = await loop.pairs(0)
        await loop.curator.lacking()
        assert await loop.pairs(0) is made, "pairs that are there are given"
        await loop.trained(0)
        assert (await loop.pairs(1)).step == 1
        await loop.curator.close()

    asyncio.run(test())


def test_in_turns_the_samplers_sleep_when_the_pairs_are_handed_out():
    async def test():
        loop = Loop(staleness=0, takes_turns=True)
        await loop.start()
        for step in range(3):
            await loop.pairs(step)
            assert loop.sampler.asleep
            await loop.trained(step)  # the scripted sampler takes new weights awake only
        await loop.curator.close()

    asyncio.run(test())
