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
from dpo_service.errors import CheckpointError, ModelRefused, PublishedModelDiffers
from dpo_service.inspection.inspect import inspect
from dpo_service.manifests.inspection import InspectionRequest
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train import policy
from dpo_service.train.policy import load_model
from dpo_service.train.probe import plain_logps, take_probe, verify_published
from tests.unit.train.families import ADAPTED, PACKED, PADDED, family
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


def test_a_file_with_a_copy_of_the_embedding_is_tied_without_a_word(tmp_path):
    base = build_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert inspect(InspectionRequest(directory=str(base))).notes == ()
    checkpoint, _ = trained(tmp_path / "job", base)
    assert "lm_head.weight" not in load_file(checkpoint.model / "model.safetensors")


def test_a_file_with_its_own_head_trains_from_the_reference_and_publishes_that_head(tmp_path):
    base = own_head(tmp_path / "base")
    (note,) = inspect(InspectionRequest(directory=str(base))).notes
    assert "that head is used, as transformers does" in note
    checkpoint, reports = trained(tmp_path / "job", base)
    assert reports.losses()[0] == pytest.approx(0.6931472, abs=1e-6)
    published = AutoModelForCausalLM.from_pretrained(checkpoint.model)
    assert not torch.allclose(published.lm_head.weight, published.model.embed_tokens.weight, atol=0.1)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2", "granite", "mamba", "gpt_oss"])
def test_the_policys_way_and_the_plain_one_agree_for(name):
    model = family(name, (PACKED | PADDED)[name])
    probe = take_probe(model, "float32", CPU)
    assert require_same(probe, plain_logps(model, probe), "itself") < 1e-5


HALF = {
    "whole": {"precision": "bfloat16"},
    "whole, pure": {"precision": "pure_bfloat16"},
    "adapter": {"precision": "bfloat16", "lora": LoraSpec(rank=4)},
}


@pytest.mark.parametrize("case", HALF)
def test_in_half_precision_too_the_base_is_not_taken_for_what_was_trained(tmp_path, model_dir, case):
    """A usual rate of learning moves log-probabilities less than rounding may."""
    job = make_job(tmp_path / "job", model_dir, **FAST | {"learning_rate": 1e-4}, **HALF[case])
    job.train()
    copy = shutil.copytree(newest_valid(job.store, "j").path, tmp_path / "copy") / "model"
    assert "give the policy's log-probabilities" in verify_published(copy)
    base = {name: tensor.bfloat16() for name, tensor in load_file(model_dir / "model.safetensors").items()}
    save_file(base, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PublishedModelDiffers, match=r"weights are not as they were written.*layers.* is up to 0\.0"):
        verify_published(copy)


def test_in_half_precision_an_adapter_is_merged_again_in_float32(tmp_path, model_dir, monkeypatch):
    checkpoint, _ = trained(tmp_path / "job", model_dir, precision="bfloat16", lora=LoraSpec(rank=4, dora=True))
    assert "merging the adapter in float32 (within" in verify_published(checkpoint.model, model_dir)
    monkeypatch.setattr(policy, "_merged_weight", lambda module: module.get_base_layer().weight)
    with pytest.raises(PublishedModelDiffers, match="the model with its adapter merged in is not the model"):
        verify_published(checkpoint.model, model_dir)


def test_merging_in_a_tied_model_leaves_the_other_weight_as_it_was(tmp_path, model_dir):
    options = {"precision": "bfloat16", "lora": LoraSpec(rank=4, target_modules=("lm_head", "embed_tokens"))}
    checkpoint, _ = trained(tmp_path / "job", model_dir, **options)
    assert "merging the adapter in float32 (within" in verify_published(checkpoint.model, model_dir)


def test_what_transformers_keeps_in_float32_is_published_so(tmp_path):
    family("deepseek_v3", ADAPTED["deepseek_v3"]).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", precision="pure_bfloat16")
    (name,) = (n for n, buffer in model.named_buffers() if n.endswith("e_score_correction_bias"))
    chosen = model.get_buffer(name).normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(chosen, chosen.bfloat16().float()), "rounding would change it"
    written = policy.export_model(
        model, policy.merged_state(model), tmp_path / "base", tmp_path / "out", torch.bfloat16
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert torch.equal(loaded[name], chosen)
    assert all(torch.equal(tensor, loaded[weight]) for weight, tensor in written.items())
    assert {str(tensor.dtype) for weight, tensor in written.items() if weight != name} == {"torch.bfloat16"}


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


def test_a_probe_that_was_altered_is_not_believed(published):
    text = (published.parent / FILE).read_text()
    (published.parent / FILE).write_text(text.replace("float32", "half"))
    with pytest.raises(CheckpointError, match=r"probe\.json is not what was written"):
        verify_published(published)


def test_a_file_of_that_name_beside_another_model_is_not_read(tmp_path, model_dir):
    (tmp_path / FILE).write_text("{}")
    assert read_probe(tmp_path / "model") is None
    shutil.copytree(model_dir, tmp_path / "mine")
    assert read_probe(tmp_path / "mine") is None


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
    assert min(len(prompt) + len(short) for prompt, (_, short) in ids) < 16, "the shortest context there may be"
    for prompt, (first, second) in ids:
        assert all(0 <= number < vocabulary for number in [*prompt, *first, *second])
        assert first[-1] == 2
