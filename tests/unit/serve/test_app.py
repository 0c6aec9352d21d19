"""The application as Serve builds it. That it answers is shown end to end; here, what is asked of Serve, and that what
is not the trained model never answers."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from dpo_service.checkpoint.format import MODEL, CheckpointFacts, publish
from dpo_service.checkpoint.probe import FILE
from dpo_service.errors import TrainingError
from dpo_service.serve import app
from dpo_service.serve.engine import environment
from dpo_service.specs.serve import ServeSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from tests.models import save_tiny_llama


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


@pytest.mark.ray
def test_a_replica_of_another_model_than_was_trained_does_not_start(tmp_path, ray_connected):
    import ray
    from ray.exceptions import RayActorError

    model_dir = published_with_another_probe(tmp_path)
    spec = ServeSpec(deployment_id="dep-1", model_id="m", model_path=str(model_dir))
    options = {"num_cpus": 0, "runtime_env": {"env_vars": environment(0)}}
    replica = ray.remote(app.ModelReplica).options(**options).remote(spec.model_dump(mode="json"))
    with pytest.raises(RayActorError, match=r"the served model is not the model that was trained.*0\.01 apart"):
        ray.get(replica.check_health.remote())


def published_with_another_probe(root):
    """A checkpoint that says its policy gave log-probabilities a hundredth a token higher than its files do."""
    import torch

    from dpo_service.train.policy import load_model
    from dpo_service.train.probe import take_probe

    def fill(directory):
        save_tiny_llama(directory / MODEL)
        probe = take_probe(load_model(directory / MODEL), "float32", torch.device("cpu"))
        probe = probe.with_logps([s.logp + 0.01 * len(s.answer) for s in probe.sequences])
        (directory / FILE).write_text(probe.model_dump_json())

    facts = CheckpointFacts(job_id="j", step=1, epoch=1.0, base_model="m", base_digest="b")
    publish(Store(root), facts, fill)
    return root / paths.checkpoint_dir("j", 1) / MODEL
