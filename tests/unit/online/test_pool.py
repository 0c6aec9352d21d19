"""The pool: back-pressure by slots, a dead sampler's prompts answered by another, a restarted one given the newest."""

from __future__ import annotations

import asyncio

import pytest

from dpo_service.errors import SamplerLost, TrainingError, WeightsRefused
from dpo_service.online.pool import Member, SamplerPool
from dpo_service.online.port import Sample, SamplePrompt, Synced, Weights
from dpo_service.specs.sampling import SamplingSpec

OPTIONS = SamplingSpec(n=2, max_tokens=4)


class Scripted:
    """A sampler that answers when it is let, and dies when it is told."""

    def __init__(self, *, restarts: int = 10):
        self.first, self.now, self.dead, self.restarts = 0, 0, False, restarts
        self.asked, self.inside, self.most = [], 0, 0
        self.may_answer, self.may_return, self.closed = asyncio.Event(), asyncio.Event(), False
        self.may_answer.set()
        self.may_return.set()

    async def sample(self, prompts, options):
        self.asked.append([prompt.token_ids[0] for prompt in prompts])
        self.inside, self.most = self.inside + 1, max(self.most, self.inside + 1)
        try:
            await self.may_answer.wait()
        finally:
            self.inside -= 1
        if self.dead:
            raise SamplerLost("dead")
        return [tuple(Sample(p.token_ids, (0.0,), True, self.now) for _ in range(options.n)) for p in prompts]

    async def sync(self, weights):
        if weights.digest == "bad":
            raise WeightsRefused("bad")
        if weights.kind == "device" and self.now != weights.version:
            raise SamplerLost("it was not sent to")
        if self.dead:
            raise SamplerLost("dead")
        self.now = weights.version
        return Synced(self.now, 0.0, 0.0)

    async def version(self):
        return self.now

    async def revive(self):
        await self.may_return.wait()
        if self.restarts == 0:
            raise SamplerLost("dead for good")
        if self.dead:
            self.restarts, self.dead, self.now = self.restarts - 1, False, self.first

    async def sleep(self):
        if self.dead:
            raise SamplerLost("dead")
        self.asleep = True

    async def wake(self): ...

    async def close(self):
        self.closed = True


def pool_of(*samplers, chunk=2, slots=2):
    return SamplerPool([Member(s, s.now, s.revive) for s in samplers], chunk=chunk, slots=slots)


def prompts(count):
    return [SamplePrompt((index,), index) for index in range(count)]


def weights(version, digest=""):
    return Weights(version, "full", "/nowhere", digest)


def sent(version, *samplers):
    """Word of a transfer to `samplers`."""
    for sampler in samplers:
        sampler.now = version
    return Weights(version, "device")


async def settle():
    for _ in range(30):
        await asyncio.sleep(0)


async def asked_of(pool, count):
    async with asyncio.timeout(5):
        return await pool.sample(prompts(count), OPTIONS)


async def test_answers_come_in_the_order_of_the_prompts_from_all_samplers():
    one, other = Scripted(), Scripted()
    answers = await asked_of(pool_of(one, other), 9)
    assert [some[0].token_ids for some in answers] == [(index,) for index in range(9)]
    assert [len(some) for some in answers] == [2] * 9
    assert one.asked
    assert other.asked


async def test_no_sampler_is_asked_more_than_its_slots():
    sampler = Scripted()
    sampler.may_answer.clear()
    pool = pool_of(sampler)
    asking = asyncio.create_task(asked_of(pool, 20))
    await settle()
    assert len(sampler.asked) == 2
    sampler.may_answer.set()
    assert len(await asking) == 20
    assert sampler.most == 2


async def test_a_dead_samplers_prompts_go_to_another_which_does_not_wait_for_it():
    dying, other = Scripted(), Scripted()
    dying.dead = True
    dying.may_return.clear()
    pool = pool_of(dying, other)
    assert len(await asked_of(pool, 8)) == 8
    assert pool.counts.lost == 1
    assert pool.counts.retried == 2 * len(dying.asked)
    dying.may_return.set()
    await settle()
    other.may_answer.clear()
    assert len(await asked_of(pool_of(dying), 2)) == 2


async def test_a_restarted_sampler_gets_the_newest_weights_before_it_is_asked_again():
    sampler = Scripted()
    pool = pool_of(sampler)
    await pool.sync(weights(7))
    sampler.dead = True
    answers = await asked_of(pool, 6)
    assert {sample.version for some in answers for sample in some} == {7}
    assert (await pool.version(), sampler.now, pool.counts.lost) == (7, 7, 1)


async def test_a_restart_that_nobody_saw_shows_by_the_version():
    sampler = Scripted()
    pool = pool_of(sampler)
    await pool.sync(weights(7))
    sampler.now = 0
    answers = await asked_of(pool, 3)
    assert {sample.version for some in answers for sample in some} == {7}
    assert pool.counts.lost == 1


async def test_a_sampler_that_dies_of_a_sync_gets_it_when_it_is_back():
    dying, other = Scripted(), Scripted()
    dying.dead = True
    pool = pool_of(dying, other)
    await pool.sync(weights(3))
    await settle()
    assert (dying.now, other.now) == (3, 3)
    assert len(await asked_of(pool, 8)) == 8


async def test_refused_weights_are_not_pushed_to_who_comes_back():
    sampler = Scripted()
    pool = pool_of(sampler)
    await pool.sync(weights(3))
    with pytest.raises(WeightsRefused):
        await pool.sync(weights(4, "bad"))
    sampler.dead = True
    await asked_of(pool, 4)
    assert (await pool.version(), sampler.now) == (3, 3)


async def test_when_the_last_one_is_gone_everybody_hears_of_it():
    samplers = [Scripted(restarts=0), Scripted(restarts=0)]
    for sampler in samplers:
        sampler.dead = True
    pool = pool_of(*samplers)
    waiting = [asyncio.create_task(asked_of(pool, 20)) for _ in range(3)]
    for failed in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(failed, SamplerLost)
    with pytest.raises(SamplerLost, match="all samplers have died"):
        await asked_of(pool, 1)


async def test_prompts_that_kill_every_sampler_are_given_up():
    class Fragile(Scripted):
        async def sample(self, prompts, options):
            self.dead = True
            return await super().sample(prompts, options)

    with pytest.raises(TrainingError, match="4 samplers died of the same prompts"):
        await asked_of(pool_of(Fragile(), Fragile()), 1)


async def test_a_prompt_that_fails_gives_its_slot_back():
    class Picky(Scripted):
        async def sample(self, prompts, options):
            if prompts[0].token_ids == (0,):
                raise TrainingError("too long")
            return await super().sample(prompts, options)

    pool = pool_of(Picky(), slots=1)
    with pytest.raises(TrainingError, match="too long"):
        await asked_of(pool, 6)
    async with asyncio.timeout(5):
        assert len(await pool.sample(prompts(6)[2:], OPTIONS)) == 4


async def test_close_closes_all_and_ends_what_waits_for_a_restart():
    dying, other = Scripted(), Scripted()
    dying.dead = True
    dying.may_return.clear()
    pool = pool_of(dying, other)
    await asked_of(pool, 4)
    async with asyncio.timeout(5):
        await pool.close()
    assert dying.closed
    assert other.closed


async def test_who_missed_a_transfer_says_so_and_is_asked_nothing_until_the_next_one():
    back, other = Scripted(), Scripted()
    pool, lacking = pool_of(back, other), []

    async def on_lacking():
        lacking.append(pool._newest.version)

    pool.on_lacking = on_lacking
    await pool.sync(sent(7, back, other))
    back.dead = True
    answers = await asked_of(pool, 8)
    assert {sample.version for some in answers for sample in some} == {7}
    await settle()
    asked = len(back.asked)
    assert len(await asked_of(pool, 8)) == 8
    assert (lacking, len(back.asked)) == ([7], asked)
    await pool.sync(sent(8, other))  # without it
    await settle()
    assert lacking == [7, 8]
    await pool.sync(sent(9, back, other))
    await settle()
    assert {sample.version for some in await asked_of(pool, 8) for sample in some} == {9}
    assert len(back.asked) > asked
    assert lacking == [7, 8]


async def test_a_sampler_that_is_not_where_the_transfer_left_it_is_lost():
    behind, other = Scripted(), Scripted()
    pool = pool_of(behind, other)
    await pool.sync(sent(3, other))
    answers = await asked_of(pool, 6)
    assert {sample.version for some in answers for sample in some} == {3}
    assert (pool.counts.lost, behind.asked) == (1, [])


async def test_a_sampler_that_dies_in_its_bed_is_brought_back():
    dying, other = Scripted(), Scripted()
    pool = pool_of(dying, other)
    dying.dead = True
    await pool.sleep()
    await settle()
    assert (other.asleep, pool.counts.lost, dying.dead) == (True, 1, False)
