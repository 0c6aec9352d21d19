"""The application as Serve builds it. That it answers is shown end to end; here, what is asked of Serve."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from dpo_service.errors import TrainingError
from dpo_service.serve import app


def test_importing_it_imports_nothing_heavy():
    # Serve imports it in a process of its own to build the application, which must not cost a vLLM each time.
    script = "import sys, dpo_service.serve.app; print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_build_names_the_deployment_as_the_cluster_expects():
    from dpo_service.cluster.port import ServeApplication

    assert ServeApplication("a", "x:y", {}).deployment == app.DEPLOYMENT_NAME


def test_build_refuses_what_is_no_serve_spec():
    with pytest.raises(ValidationError):
        app.build({"model": "m"})


def test_build_makes_one_deployment_with_the_engines_resources():
    spec = {"deployment_id": "dep-1", "model_id": "m", "model_path": "/nowhere", "engine": {"gpus": 1}}
    made = app.build(spec)._bound_deployment
    assert made.name == app.DEPLOYMENT_NAME
    assert made.ray_actor_options["num_gpus"] == 1


def test_an_absolute_path_is_the_directory_itself(tmp_path):
    assert app.locate(str(tmp_path)) == tmp_path


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch):
    import huggingface_hub

    def refuse(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(TrainingError, match=r"org/model.*no route to host"):
        app.locate("org/model")
