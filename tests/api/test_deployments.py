"""/v1/deployments over HTTP: what it says, and that it says it at once."""

import pytest

from dpo_service.cluster.port import AppState
from dpo_service.deployments.reconciler import DeploymentReconciler


@pytest.fixture
def reconciler(api):
    return DeploymentReconciler(api.database, api.store, api.cluster, api.settings, api.clock)


async def test_created_at_once_and_found_by_id_and_by_model(api):
    made = await api.http.post("/v1/deployments", json={"model": "tiny"})
    assert made.status_code == 201
    body = made.json()
    assert body["id"].startswith("dep-")
    assert body | {"id": "", "engine": {}} == {
        "id": "",
        "object": "deployment",
        "model": "tiny",
        "status": "pending",
        "message": "Waiting for the cluster",
        "checkpoint": None,
        "engine": {},
        "created_at": 1_700_000_000,
        "updated_at": 1_700_000_000,
    }
    assert api.changes == 1
    for name in (body["id"], "tiny"):
        assert (await api.http.get(f"/v1/deployments/{name}")).json() == body
    listed = (await api.http.get("/v1/deployments")).json()
    assert listed == {"object": "list", "data": [body], "has_more": False}


async def test_a_second_post_answers_200_with_the_same(api):
    first = await api.http.post("/v1/deployments", json={"model": "tiny"})
    again = await api.http.post("/v1/deployments", json={"model": "tiny", "engine": {}})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    other = await api.http.post("/v1/deployments", json={"model": "tiny", "engine": {"max_model_len": 64}})
    assert other.status_code == 409
    assert other.json()["error"]["param"] == "engine.max_model_len"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "nowhere"}, "model"),
        ({}, "model"),
        ({"model": ""}, "model"),
        ({"model": "tiny", "engines": {}}, "engines"),
        ({"model": "tiny", "engine": {"gpus": 1}}, "engine.gpus"),
        ({"model": "tiny", "engine": {"dtype": "int3"}}, "engine.dtype"),
        ({"model": "tiny", "engine": {"max_model_len": 4096}}, "engine.max_model_len"),
        ({"model": "/etc"}, "model"),
    ],
)
async def test_what_cannot_work_is_refused_and_leaves_nothing(api, body, param):
    answer = await api.http.post("/v1/deployments", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert (await api.http.get("/v1/deployments")).json()["data"] == []


async def test_a_failure_is_shown(api, reconciler):
    name = (await api.http.post("/v1/deployments", json={"model": "tiny"})).json()["id"]
    await reconciler.tick()
    api.cluster.set_app(name, AppState.FAILED, "ValueError: no such rope type")
    await reconciler.tick()
    body = (await api.http.get(f"/v1/deployments/{name}")).json()
    assert (body["status"], body["message"]) == ("failed", "ValueError: no such rope type")


async def test_deleted_by_model_and_gone(api, reconciler):
    name = (await api.http.post("/v1/deployments", json={"model": "tiny"})).json()["id"]
    await reconciler.tick()
    answer = await api.http.delete("/v1/deployments/tiny")
    assert answer.json() == {"id": name, "object": "deployment", "deleted": True}
    assert (await api.http.get(f"/v1/deployments/{name}")).json()["status"] == "deleting"
    await reconciler.tick()
    await reconciler.tick()
    assert (await api.http.get(f"/v1/deployments/{name}")).status_code == 404
    assert (await api.http.delete("/v1/deployments/tiny")).status_code == 404


async def test_pages(api):
    for number in range(3):
        (api.store.path(f"models/m{number}")).symlink_to(api.store.path("models/tiny"))
        api.clock.advance(1)
        assert (await api.http.post("/v1/deployments", json={"model": f"m{number}"})).status_code == 201
    first = (await api.http.get("/v1/deployments", params={"limit": 2})).json()
    assert [d["model"] for d in first["data"]] == ["m2", "m1"]
    assert first["has_more"]
    rest = (await api.http.get("/v1/deployments", params={"limit": 2, "after": first["data"][-1]["id"]})).json()
    assert [d["model"] for d in rest["data"]] == ["m0"]
    assert (await api.http.get("/v1/deployments", params={"after": "dep-x"})).status_code == 400
