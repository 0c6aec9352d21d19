"""The published files are the trained model: whatever was adapted or tied, and where they are not, that is seen."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_service.checkpoint.load import newest_valid
from dpo_service.checkpoint.probe import FILE, Probe, probe_ids, read_probe, require_same
from dpo_service.errors import ModelRefused, PublishedModelDiffers
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.policy import load_model
from dpo_service.train.probe import plain_logps, take_probe, verify_published
from tests.unit.train.families import PACKED, PADDED, family
from tests.unit.train.training_kit import Recorder, build_model, make_job

CPU = torch.device("cpu")
FAST = {"reference": "live", "learning_rate": 1e-2, "save_every_steps": 6, "validation": 0}


def own_head(directory):
    """A file with a head of its own under a flag that says it is tied, as some fine-tunes are published."""
    build_model(directory)
    weights = load_file(directory / "model.safetensors")
    torch.manual_seed(1)
    weights["lm_head.weight"] = 0.2 * torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    return directory


def trained(root, base, **options):
    reports = Recorder()
    job = make_job(root, base, **FAST, **options)
    job.train(reports=reports)
    return newest_valid(job.store, "j"), reports


CASES = {
    "tied": (build_model, {}),
    "tied, bfloat16": (build_model, {"precision": "bfloat16"}),
    "tied, pure bfloat16": (build_model, {"precision": "pure_bfloat16"}),
    "own head under a tied flag": (own_head, {}),
    "own head, adapter": (own_head, {"lora": LoraSpec(rank=4)}),
    "tied, adapter": (build_model, {"lora": LoraSpec(rank=4)}),
    "tied, adapter on the head": (build_model, {"lora": LoraSpec(rank=4, target_modules=("lm_head",))}),
    "tied, adapter on the embedding": (build_model, {"lora": LoraSpec(rank=4, target_modules=("embed_tokens",))}),
    "tied, adapter on both": (
        build_model,
        {"lora": LoraSpec(rank=4, target_modules=("embed_tokens", "lm_head", "q_proj"))},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_the_policy(tmp_path, case):
    build, options = CASES[case]
    checkpoint, _ = trained(tmp_path / "job", build(tmp_path / "base"), **options)
    assert "give the policy's log-probabilities" in verify_published(checkpoint.model)
    probe, base = read_probe(checkpoint.model), load_model(tmp_path / "base")
    moved = [abs(s.logp - logp) for s, logp in zip(probe.sequences, plain_logps(base, probe), strict=True)]
    assert max(moved) > 0.1, "something was trained, and it is in the probe"


@pytest.mark.parametrize(
    ("case", "tied"),
    [("tied", True), ("tied, adapter", True), ("own head, adapter", False), ("tied, adapter on the head", False)],
)
def test_the_configuration_says_tied_where_the_weights_are_one(tmp_path, case, tied):
    build, options = CASES[case]
    checkpoint, _ = trained(tmp_path / "job", build(tmp_path / "base"), **options)
    assert json.loads((checkpoint.model / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(checkpoint.model / "model.safetensors")) is not tied


def test_a_file_with_its_own_head_trains_from_the_reference_and_publishes_that_head(tmp_path):
    checkpoint, reports = trained(tmp_path / "job", own_head(tmp_path / "base"))
    assert reports.losses()[0] == pytest.approx(0.6931472, abs=1e-6)
    published = AutoModelForCausalLM.from_pretrained(checkpoint.model)
    assert not torch.allclose(published.lm_head.weight, published.model.embed_tokens.weight, atol=0.1)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2", "granite", "mamba", "gpt_oss"])
def test_the_policys_way_and_the_plain_one_agree_for(name):
    model = family(name, (PACKED | PADDED)[name])
    probe = take_probe(model, "float32", CPU)
    assert require_same(probe, plain_logps(model, probe), "itself") < 1e-5


@pytest.fixture
def published(tmp_path, model_dir):
    """Of a job, copied, so that it can be broken."""
    checkpoint, _ = trained(tmp_path / "job", model_dir)
    shutil.copytree(checkpoint.path, tmp_path / "copy")
    return tmp_path / "copy" / "model"


def test_another_weight_is_seen(published):
    weights = load_file(published / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.05
    save_file(weights, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        PublishedModelDiffers, match=r"the published checkpoint is not the model that was trained.*probe"
    ):
        verify_published(published)


def test_a_missing_weight_is_seen(published):
    weights = load_file(published / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match="down_proj"):
        verify_published(published)


def test_what_is_not_compared_is_said(published, monkeypatch):
    monkeypatch.setattr("dpo_service.train.probe.ROOM", 1e12)
    assert "were not compared" in verify_published(published)
    (published.parent / FILE).unlink()
    assert "no probe" in verify_published(published)


def test_no_number_is_no_agreement():
    sequences = [{"prompt": [1], "answer": [2, 3], "logp": -2.0}, {"prompt": [1], "answer": [4], "logp": -1.0}]
    probe = Probe.model_validate({"arithmetic": "float32", "sequences": sequences})
    assert require_same(probe, [-2.0, -1.00005], "it") == pytest.approx(5e-5, abs=1e-6)
    for logps in ([-2.0, -1.001], [-2.0, float("nan")], [float("-inf"), -1.0]):
        with pytest.raises(PublishedModelDiffers):
            require_same(probe, logps, "it")
    assert require_same(probe, [-2.0, -1.05], "it", arithmetic="half") == pytest.approx(0.05)


@pytest.mark.parametrize("vocabulary", [7, 300, 150_000])
def test_a_probe_has_ids_of_the_vocabulary_and_ends_answers(vocabulary):
    ids = probe_ids(vocabulary, 2)
    assert ids == probe_ids(vocabulary, 2)
    for prompt, (first, second) in ids:
        assert all(0 <= number < vocabulary for number in [*prompt, *first, *second])
        assert first[-1] == 2
