"""Models: published by jobs, the user's own directories, and what is deployed."""

import openai
import pytest

from dpo_service.deployments.tables import Deployment
from dpo_service.registry import models
from tests.api.conftest import save_model


async def publish(api, model_id="ft:tiny::a", **fields):
    values = {"job_id": "ftjob-a", "key": "jobs/a/model", "digest": "d" * 64, "base": "tiny"} | fields
    async with api.database.begin() as session:
        await models.publish(session, model_id, created_at=api.clock.now(), **values)


async def deploy(api, model):
    now = api.clock.now()
    async with api.database.begin() as session:
        row = Deployment(id="dep-1", model=model, model_path="/x", engine={}, state="running", message="")
        row.created_at = row.updated_at = now
        session.add(row)


async def test_list_shows_all_newest_first_without_checkpoints(api):
    await publish(api)
    await publish(api, "ft:tiny::a:ckpt-step-5", step=5)
    api.clock.advance(5)
    await publish(api, "ft:tiny::b")
    save_model(api.store.root / "models" / "org" / "other")
    await deploy(api, "hub/name")
    found = {model.id: model async for model in api.sdk.models.list()}
    assert set(found) == {"tiny", "org/other", "ft:tiny::a", "ft:tiny::b", "hub/name"}
    created = [model.created for model in found.values()]
    assert created == sorted(created, reverse=True)
    assert found["ft:tiny::a"].model_extra["base"] == "tiny"
    assert found["hub/name"].model_extra["deployment"] == "running"


@pytest.mark.parametrize("model", ["tiny", "org/other", "ft:tiny::a", "ft:tiny::a:ckpt-step-5"])
async def test_retrieve_by_any_name(api, model):
    await publish(api)
    await publish(api, "ft:tiny::a:ckpt-step-5", step=5)
    save_model(api.store.root / "models" / "org" / "other")
    assert (await api.sdk.models.retrieve(model)).id == model


@pytest.mark.parametrize("call", ["retrieve", "delete"])
async def test_unknown_model_is_404(api, call):
    with pytest.raises(openai.NotFoundError) as refused:
        await getattr(api.sdk.models, call)("nowhere")
    assert refused.value.code == "model_not_found"


async def test_delete_forgets_a_published_model(api):
    await publish(api)
    assert (await api.sdk.models.delete("ft:tiny::a")).deleted
    with pytest.raises(openai.NotFoundError):
        await api.sdk.models.retrieve("ft:tiny::a")


async def test_delete_leaves_the_users_directories_alone(api):
    with pytest.raises(openai.ConflictError, match="your own directory"):
        await api.sdk.models.delete("tiny")
    assert (api.store.root / "models" / "tiny" / "config.json").exists()


async def test_delete_is_refused_while_deployed(api):
    await publish(api)
    await deploy(api, "ft:tiny::a")
    with pytest.raises(openai.ConflictError, match="deployed"):
        await api.sdk.models.delete("ft:tiny::a")
