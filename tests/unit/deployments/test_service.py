"""What may be deployed, and that asking twice is asking once."""

import asyncio

import pytest

from dpo_service.checkpoint.retention import prune
from dpo_service.cluster.port import AppState, Capacity
from dpo_service.deployments import service
from dpo_service.errors import Conflict, InvalidSpec, ModelNotFound, ModelRefused, NotFound, Unavailable
from dpo_service.registry import models
from dpo_service.storage import paths
from tests.unit.deployments.conftest import save_model


async def test_asking_twice_is_asking_once(world):
    first, made = await world.create("one")
    again, made_again = await world.create("one")
    assert (made, made_again) == (True, False)
    assert again.id == first.id


async def test_asked_for_at_once_there_is_one(world):
    found = await asyncio.gather(*(world.create("one") for _ in range(10)))
    assert len({row.id for row, _ in found}) == 1
    assert sum(made for _, made in found) == 1


async def test_other_engine_settings_are_a_conflict_and_unsaid_ones_are_not(world):
    row, _ = await world.create("one", max_model_len=128)
    assert (await world.create("one"))[0].id == row.id
    with pytest.raises(Conflict, match=f"DELETE /v1/deployments/{row.id}"):
        await world.create("one", max_model_len=256)


async def test_a_failed_one_is_replaced(world):
    failed = await world.deploy("one")
    await world.tick()
    world.cluster.set_app(failed, AppState.FAILED, "ValueError: broken")
    await world.tick()
    new, made = await world.create("one")
    assert made
    assert new.id != failed
    await world.tick(2)
    assert list(world.cluster.applications) == [new.id]


async def published(world, step):
    """A checkpoint of a job, as a model."""
    key = paths.checkpoint_dir("ftjob-a", step)
    save_model(world.store.path(key) / "model")
    async with world.database.begin() as session:
        facts = {"job_id": "ftjob-a", "digest": "d", "base": "one", "created_at": world.clock.now()}
        row = await models.publish_checkpoint(session, "ft:one::a", step, key=f"{key}/model", **facts)
    return row.id


async def test_a_deployed_checkpoint_is_not_pruned_by_its_job(world):
    first, _ = [await published(world, step) for step in (5, 10)]
    await world.create(first)
    assert prune(world.store, "ftjob-a", keep=1, newest=15) == []


async def test_a_checkpoint_that_is_pruned_meanwhile_is_refused(world, monkeypatch):
    first, _ = [await published(world, step) for step in (5, 10)]

    async def resolve_slowly(name, **parts):
        found = await models.resolve(name, **parts)
        assert prune(world.store, "ftjob-a", keep=1, newest=10) == [5]
        return found

    monkeypatch.setattr(service, "resolve", resolve_slowly)
    with pytest.raises(ModelNotFound, match="keep_last"):
        await world.create(first)


async def test_a_deleted_models_name_is_free_at_once(world):
    old = await world.deploy("one")
    await world.delete("one")
    new = await world.deploy("one")
    assert new != old
    assert (await world.row("one")).id == new


@pytest.mark.parametrize(
    ("config", "missing", "said"),
    [
        ({"architectures": ["BertForMaskedLM"]}, None, "causal"),
        ({}, "model.safetensors", "safetensors"),
        ({}, "config.json", "config.json"),
    ],
)
async def test_what_cannot_be_served_is_refused_before_anything_starts(world, config, missing, said):
    directory = save_model(world.store.path("models/broken"), **config)
    if missing:
        (directory / missing).unlink()
    with pytest.raises((ModelNotFound, ModelRefused), match=said):
        await world.create("broken")
    await world.tick()
    assert world.cluster.lists == []


async def test_unknown_models_are_refused(world):
    with pytest.raises(ModelNotFound, match="nowhere"):
        await world.create("nowhere")


async def test_more_gpus_than_there_are_are_refused(world):
    with pytest.raises(InvalidSpec, match="the cluster has 0") as refused:
        await world.create("one", gpus=1)
    assert refused.value.param == "engine.gpus"
    world.cluster.capacity_value = Capacity(cpus=8, gpus=1)
    assert (await world.create("one", gpus=1))[1]


async def test_a_cluster_that_does_not_answer_is_a_matter_of_time(world):
    world.cluster.unreachable = True
    with pytest.raises(Unavailable):
        await world.create("one", gpus=1)
    assert (await world.create("one"))[1]


async def test_a_length_the_model_does_not_allow_is_refused(world):
    with pytest.raises(InvalidSpec, match="at most 512") as refused:
        await world.create("one", max_model_len=513)
    assert refused.value.param == "engine.max_model_len"


async def test_deleting_twice_is_fine_while_it_goes_and_404_after(world):
    name = await world.deploy("one")
    await world.tick()
    await world.delete(name)
    await world.delete(name)
    await world.tick(2)
    with pytest.raises(NotFound):
        await world.delete(name)
