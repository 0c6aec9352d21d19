"""Where samplers on GPUs are put, and that each group of workers gets its own; without Ray."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from dpo_service.errors import TrainingError
from dpo_service.online import actors, fit
from dpo_service.online.actors import Place, RaySampler, start_actor
from dpo_service.online.fit import CuratorActor, CuratorConfig
from dpo_service.specs.sampling import SamplerSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from tests.unit.jobs.test_sampled_choices import decided

OWN = SamplerSpec(gpus=2, cpus=3)
SHARED = SamplerSpec(gpus=1, shares_device=True)


@pytest.fixture
def started(monkeypatch):
    """The options and arguments of the actors that were started."""
    found = []

    def remote(**options):
        return lambda _: SimpleNamespace(remote=lambda *arguments: found.append((options, arguments)))

    monkeypatch.setattr(actors.ray, "remote", remote)
    return found


def test_a_sampler_beside_a_worker_books_nothing_and_is_told_the_device(started, tmp_path):
    start_actor(SHARED, tmp_path, 0, beside=Place("a" * 56, "3"))
    ((options, arguments),) = started
    assert (options["num_gpus"], options["num_cpus"]) == (0, 0)
    assert (options["scheduling_strategy"].node_id, options["scheduling_strategy"].soft) == ("a" * 56, False)
    assert arguments[-1] == "3"


def test_one_with_devices_of_its_own_books_them_in_its_bundle(started, tmp_path):
    start_actor(OWN, tmp_path, 0, placement="group", bundle=1)
    ((options, arguments),) = started
    assert (options["num_gpus"], options["num_cpus"]) == (2, 3)
    assert options["scheduling_strategy"].placement_group_bundle_index == 1
    assert arguments[-1] is None
    assert actors.bundles(OWN) == [{"CPU": 3.0, "GPU": 2.0}]
    assert actors.bundles(SHARED) == []


class Curator:
    closed = False

    async def lacking(self): ...

    async def close(self):
        self.closed = True


@pytest.fixture
def actor(tmp_path, monkeypatch):
    """The curator's, with samplers that share the devices of two workers; `actor.made` are those it has made."""
    store = Store(tmp_path)
    run = decided(
        "online", resources={"gpus_per_worker": 1, "workers": 2}, sampling={"shares_device": True, "samplers": 2}
    )
    store.write_model(
        paths.attempt_spec("j", 1), fit.AttemptSpec(run=run, attempt=1, report_url=None, report_token="t")
    )
    config = CuratorConfig(str(tmp_path), "j", 1, None, str(tmp_path))
    made = []

    async def start_samplers(online, model_dir, placement, beside):
        pool = SimpleNamespace(members=[SimpleNamespace(sampler=RaySampler(place)) for place in beside])
        made.append(SimpleNamespace(pool=pool, curator=Curator()))
        return pool

    monkeypatch.setattr(fit, "start_samplers", start_samplers)
    monkeypatch.setattr(fit, "build_curator", lambda *_: made[-1].curator)
    built = CuratorActor(config, None)
    built.made = made
    return built


def test_each_sampler_is_put_beside_its_worker_whoever_joined_first(actor):
    async def test():
        for rank in (1, 0):
            await actor.join(rank, Place("node", str(rank)))
        assert await actor.samplers() == [Place("node", "0"), Place("node", "1")]
        assert actor.made[0].pool.on_lacking == actor.made[0].curator.lacking

    asyncio.run(test())


def test_a_new_group_of_workers_gets_new_samplers_where_it_is(actor):
    async def test():
        for rank in (0, 1):
            await actor.join(rank, Place("node", str(rank)))
        await actor.samplers()
        for rank in (0, 1):
            await actor.join(rank, Place("another", str(rank)))
        assert await actor.samplers() == [Place("another", "0"), Place("another", "1")]
        assert actor.made[0].curator.closed
        assert not actor.made[1].curator.closed

    asyncio.run(test())


def test_samplers_that_cannot_be_started_are_said_by_a_name_that_the_driver_knows(actor, monkeypatch):
    async def fails(*_):
        raise TrainingError("no memory")

    monkeypatch.setattr(fit, "start_samplers", fails)
    actor._places = {rank: Place("node", "0") for rank in (0, 1)}
    with pytest.raises(TrainingError, match="no memory"):
        asyncio.run(actor.samplers())
