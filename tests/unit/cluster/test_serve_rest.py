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
    details = {"applications": {"dep-m": {"status": status, "message": "", "deployments": {}}}}
    assert serve_rest.observations(details) == {"dep-m": AppObservation(state)}


def test_a_failure_says_what_the_deployments_say_once():
    app = {
        "status": "DEPLOY_FAILED",
        "message": "could not start",
        "deployments": {"Model": {"message": "OSError: no such file"}, "Other": {"message": "could not start"}},
    }
    assert (
        serve_rest.observations({"applications": {"dep-m": app}})["dep-m"].message
        == "could not start\nOSError: no such file"
    )


def test_applications_of_others_are_kept_but_not_observed():
    theirs = {"name": "theirs", "import_path": "their.app:build", "runtime_env": {"env_vars": {"A": "1"}}}
    details = {
        "applications": {
            "theirs": {"status": "RUNNING", "message": "", "deployed_app_config": theirs},
            "default": {"status": "RUNNING", "message": "", "deployed_app_config": {"import_path": "nameless:app"}},
            "from-python": {"status": "RUNNING", "message": "", "deployed_app_config": None},
            "going": {"status": "DELETING", "message": "", "deployed_app_config": {"name": "going"}},
            "dep-m": {"status": "RUNNING", "message": "", "deployments": {}, "deployed_app_config": {"name": "dep-m"}},
        }
    }
    kept = serve_rest.others(details)
    assert kept == [theirs, {"name": "default", "import_path": "nameless:app"}]
    assert set(serve_rest.observations(details)) == {"dep-m"}
    ours = serve_rest.document([ServeApplication("dep-m", "m:b", {})], "127.0.0.1", 8123, kept)["applications"]
    assert [app["name"] for app in ours] == ["theirs", "default", "dep-m"]


def test_no_serve_means_no_applications():
    empty = {"controller_info": {}, "proxies": {}, "applications": {}, "target_capacity": None}
    assert serve_rest.observations(empty) == {}
