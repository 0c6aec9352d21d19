"""A run that is asked to stop does not wait for a judge or a sampler, and all of its ranks hear the same."""

from __future__ import annotations

import asyncio

import pytest

from dpo_service.errors import SamplerLost, StopAsked
from dpo_service.online import fit
from dpo_service.online.fit import CuratorActor, CuratorConfig
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from tests.unit.online.curator_kit import Loop, version

RANKS = 2


class Actor(CuratorActor):
    """The actor's class in this process, with a scripted curator that is there once `loaded` is set."""

    def __init__(self, root, fails=None):
        super().__init__(CuratorConfig(str(root), "j", 1, None, ""), None)
        self.loop, self.loaded, self.built, self._fails = Loop(), asyncio.Event(), 0, fails
        self.loaded.set()

    async def _built(self):
        self.built += 1
        await self.loaded.wait()
        if self._fails:
            raise self._fails
        return self.loop.curator

    async def begin(self):
        await self.start(0, version(0), {})

    def ask(self, step):
        return [asyncio.create_task(self.pairs(step)) for _ in range(RANKS)]


@pytest.fixture(autouse=True)
def _look_often(monkeypatch):
    monkeypatch.setattr(fit, "LOOK_S", 0.01)


@pytest.fixture
async def actor(tmp_path):
    actor = Actor(tmp_path)
    yield actor
    await actor.close()
    assert actor.loop.sampler.closed == actor.loaded.is_set()


def stop(root):
    Store(root).write(paths.stop_flag("j", 1), b"")


async def stopped(tasks):
    done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert [type(one) for one in done] == [StopAsked] * len(tasks)


async def test_ranks_that_wait_for_pairs_are_stopped_together(tmp_path, actor):
    actor.loop.sampler.held.clear()
    await actor.begin()
    asked = actor.ask(0)
    await asyncio.sleep(0.05)
    assert [task for task in asked if task.done()] == []
    stop(tmp_path)
    await stopped(asked)
    actor.loop.sampler.held.set()
    await actor.loop.pairs(0)
    await stopped(actor.ask(0))  # of a rank that asks later, though the pairs are there by now


async def test_pairs_that_one_rank_has_are_every_ranks(tmp_path, actor):
    await actor.begin()
    first = await actor.pairs(0)
    actor.loop.sampler.held.clear()
    stop(tmp_path)
    assert await actor.pairs(0) is first
    await actor.published(version(1))
    await stopped(actor.ask(5))


async def test_a_stop_does_not_wait_for_samplers_that_load(tmp_path, actor):
    actor.loaded.clear()
    beginning = asyncio.create_task(actor.begin())
    await asyncio.sleep(0.05)
    assert not beginning.done()
    stop(tmp_path)
    await stopped([beginning])


async def test_samplers_load_once_and_before_anybody_asks(actor):
    await asyncio.gather(actor.prepare(), actor.prepare())
    assert actor.built == 1
    await actor.begin()
    assert (await actor.pairs(0)).step == 0
    assert actor.built == 1


async def test_samplers_that_cannot_load_are_told_of_at_the_start(tmp_path):
    actor = Actor(tmp_path, fails=SamplerLost("no such model"))
    await actor.prepare()
    with pytest.raises(SamplerLost, match="no such model"):
        await actor.begin()
    await actor.close()


async def test_the_workers_are_there_when_the_trainer_has_begun(actor):
    waiting = asyncio.create_task(actor.begun())
    await actor.prepare()
    await asyncio.sleep(0.02)
    assert not waiting.done(), "another run may not gather yet"
    await actor.begin()
    await asyncio.wait_for(waiting, 10)
