"""The folder in shared memory: versions appear whole, old ones go, what a killed trainer left is removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_service.errors import WeightsRefused
from dpo_service.online import weights as module
from dpo_service.online.weights import WeightsFolder, check, model_shapes
from dpo_service.train.policy import add_adapter, load_model, merged_state
from tests.models import save_tiny_llama
from tests.unit.online.sampler_kit import LoraSpec, Policy


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path):
    made = WeightsFolder(1 << 20, tmp_path)
    yield made
    made.remove()


@pytest.mark.skipif(module.shared_memory(0) is None, reason="this machine has no /dev/shm")
def test_it_lies_in_shared_memory_where_that_has_room(tmp_path, monkeypatch):
    made = WeightsFolder(1 << 20, tmp_path)
    assert made.path.parent == module.SHARED_MEMORY
    made.remove()
    assert not made.path.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    assert WeightsFolder(1 << 30, tmp_path).path.parent == tmp_path


def test_what_a_killed_trainer_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    orphan, living = tmp_path / f"dpo-weights-{gone.stdout.strip()}-abc", tmp_path / f"dpo-weights-{os.getpid()}-abc"
    for path in (orphan, living):
        path.mkdir()
    WeightsFolder(1)
    assert not orphan.exists()
    assert living.exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_head_in_the_files_is_the_models_where_it_is_no_copy_whatever_the_flag(model_dir, folder, tmp_path, own):
    base = shutil.copytree(model_dir, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.flip(0).contiguous() if own else embedding.clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert ("lm_head.weight" in model_shapes(base)) is own
    check(Policy(base, folder, adapter=False).publish(1), model_shapes(base), "float32")


def test_a_tied_head_is_not_published_and_the_model_is_that_of_the_files(model_dir, folder):
    published = Policy(model_dir, folder, adapter=False).publish(1)
    tensors = load_file(published.path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == model_shapes(model_dir)
    assert "lm_head.weight" not in tensors


def test_versions_before_one_go(model_dir, folder):
    policy = Policy(model_dir, folder, adapter=True)
    for version in (1, 2, 3):
        policy.publish(version)
    folder.drop_before(3)
    assert [path.name for path in folder.path.iterdir()] == ["version-00000003"]


def test_an_adapter_can_be_published_merged(model_dir, folder):
    """What samplers cannot load as an adapter (DoRA, or over a base of 4 bits) comes as whole weights."""
    policy = add_adapter(load_model(model_dir), LoraSpec(rank=4, dora=True), 0)
    merged = folder.publish(policy, merged_state(policy), 1, "float32")
    check(merged, model_shapes(model_dir), "float32")


def test_an_adapter_of_another_rank_than_it_says_is_refused(model_dir, folder):
    good = Policy(model_dir, folder, adapter=True).publish(1)
    check(good, model_shapes(model_dir), "float32")
    shapes = model_shapes(model_dir) | {"model.layers.0.mlp.up_proj.weight": (128, 32)}
    with pytest.raises(WeightsRefused, match=r"up_proj.lora_A.weight is \[4, 64\] where \[4, 32\] is expected"):
        check(good, shapes, "float32")
    with pytest.raises(WeightsRefused, match="adds to nothing of the model"):
        check(good, {"model.norm.weight": (64,)}, "float32")


def test_bfloat16_is_rounded_once(model_dir, folder):
    policy = Policy(model_dir, folder, adapter=False)
    policy.train()
    tensors = load_file(policy.publish(1, "bfloat16").path)
    state = policy.model.state_dict()
    assert all(torch.equal(tensor, state[name].to(torch.bfloat16)) for name, tensor in tensors.items())
