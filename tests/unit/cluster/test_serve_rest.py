from __future__ import annotations

import pytest

from dpo_service.cluster import serve_rest
from dpo_service.cluster.port import AppObservation, AppState, ServeApplication


def test_the_document_is_the_whole_list_in_serves_words():
    app = ServeApplication("m", "pkg.mod:build", {"model": "x"}, {"A": "1"}, {"weights": "v2"}, replicas=2)
    document = serve_rest.document([app], "127.0.0.1", 8123)
    assert document["http_options"] == {"host": "127.0.0.1", "port": 8123}
    assert document["proxy_location"] == "HeadOnly"
    assert document["applications"] == [
        {
            "name": "m",
            "route_prefix": "/m",
            "import_path": "pkg.mod:build",
            "args": {"model": "x"},
            "runtime_env": {"env_vars": {"A": "1"}},
            "deployments": [{"name": "Model", "num_replicas": 2, "user_config": {"weights": "v2"}}],
        }
    ]


def test_ray_accepts_the_document():
    schema = pytest.importorskip("ray.serve.schema")
    apps = [
        ServeApplication("m", "pkg.mod:build", {}),
        ServeApplication("n", "pkg.mod:build", {}, user_config={"a": 1}),
    ]
    parsed = schema.ServeDeploySchema.model_validate(serve_rest.document(apps, "127.0.0.1", 8123))
    assert [app.name for app in parsed.applications] == ["m", "n"]


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("NOT_STARTED", AppState.STARTING),
        ("DEPLOYING", AppState.STARTING),
        ("RUNNING", AppState.RUNNING),
        ("DEPLOY_FAILED", AppState.FAILED),
        ("UNHEALTHY", AppState.FAILED),
        ("DELETING", AppState.UNKNOWN),
        ("SOMETHING_NEW", AppState.UNKNOWN),
    ],
)
def test_serves_statuses_have_one_meaning_each(status, state):
    details = {"applications": {"m": {"status": status, "message": "", "deployments": {}}}}
    assert serve_rest.observations(details) == {"m": AppObservation(state)}


def test_a_failure_says_what_the_deployments_say_once():
    app = {
        "status": "DEPLOY_FAILED",
        "message": "could not start",
        "deployments": {"Model": {"message": "OSError: no such file"}, "Other": {"message": "could not start"}},
    }
    assert (
        serve_rest.observations({"applications": {"m": app}})["m"].message == "could not start\nOSError: no such file"
    )


def test_no_serve_means_no_applications():
    empty = {"controller_info": {}, "proxies": {}, "applications": {}, "target_capacity": None}
    assert serve_rest.observations(empty) == {}
