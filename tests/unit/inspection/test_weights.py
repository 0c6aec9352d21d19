"""A model is its own weights, all of them: anything else is refused before a row is read, or read as what it is."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_service.errors import ModelRefused
from dpo_service.inspection.inspect import inspect
from dpo_service.manifests.inspection import InspectionRequest
from dpo_service.registry.inspection import inspect_model
from dpo_service.train.policy import load_model
from tests.unit.train.families import PACKED, PADDED, family
from tests.unit.train.training_kit import Recorder, build_model, make_job

IDS = torch.tensor([[5, 6, 7, 8, 9, 4]])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("plain"), tied=False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture")
    family("qwen3_moe", PACKED["qwen3_moe"]).save_pretrained(directory)
    return directory


def changed(source, target, change):
    """A copy whose weights are what `change` makes of them."""
    shutil.copytree(source, target)
    save_file(change(load_file(target / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def report(directory, **fields):
    return inspect(InspectionRequest(directory=str(directory), **fields))


def fault(directory):
    found = report(directory)
    assert [fault.param for fault in found.faults] == ["model"]
    with pytest.raises(ModelRefused) as caught:
        load_model(directory)
    assert caught.value.message == found.faults[0].message, "it is loaded no more than it is accepted"
    return found.faults[0].message


def logits(directory):
    with torch.no_grad():
        return load_model(directory)(IDS).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_checkpoint_has_no_fault(tmp_path, tied):
    found = report(build_model(tmp_path, tied=tied))
    assert (found.model_class, found.faults, found.notes) == ("LlamaForCausalLM", (), ())


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "phi3", "olmoe", "qwen3_moe"])
def test_as_families_are_stored(tmp_path, name):
    family(name, PACKED[name]).save_pretrained(tmp_path)
    assert report(tmp_path).faults == ()


@pytest.mark.parametrize(
    "wrap",
    [
        "_orig_mod.{}", "module.{}", "base_model.model.{}", "module._orig_mod.{}", "_fsdp_wrapped_module._orig_mod.{}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["plain", "mixture"])
def test_names_under_wrappers_are_read_as_what_they_are(tmp_path, wrap, source, request):
    source = request.getfixturevalue(source)
    wrapped = changed(source, tmp_path / "w", lambda weights: {wrap.format(n): w for n, w in weights.items()})
    assert torch.equal(logits(wrapped), logits(source))
    (note,) = report(wrapped).notes
    assert "without it" in note


def test_a_job_on_such_a_checkpoint_begins_at_the_reference_and_publishes_plain_names(tmp_path, plain):
    wrapped = changed(plain, tmp_path / "w", lambda ws: {f"_orig_mod.{n}": w for n, w in ws.items()})
    reports = Recorder()
    job = make_job(tmp_path / "job", wrapped, reference="live", save_every_steps=6)
    job.train(reports=reports)
    assert reports.losses()[0] == pytest.approx(math.log(2), abs=1e-6)
    published = next(job.store.root.rglob("step-*/model/model.safetensors"))
    assert set(load_file(published)) == set(load_file(plain / "model.safetensors"))


def without(part):
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def test_missing_weights_are_named(tmp_path, plain):
    message = fault(changed(plain, tmp_path / "m", without("up_proj")))
    assert "2 weights are missing: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in message
    assert "LlamaForCausalLM" in message


def test_a_missing_head_of_a_model_that_has_its_own_is_named(tmp_path, plain):
    assert "1 weights are missing: lm_head.weight" in fault(changed(plain, tmp_path / "m", without("lm_head")))


def test_weights_without_a_place_are_named(tmp_path, plain):
    def biased(weights):
        return weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}

    message = fault(changed(plain, tmp_path / "m", biased))
    assert "1 have no place in the model: model.layers.0.self_attn.q_proj.bias" in message


def test_buffers_that_older_versions_stored_are_no_fault(tmp_path, plain):
    def older(weights):
        return weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}

    old = changed(plain, tmp_path / "m", older)
    assert report(old).faults == ()
    assert torch.equal(logits(old), logits(plain))


def test_an_adapter_that_is_not_merged_says_so(tmp_path, plain):
    def adapted(weights):
        return {f"base_model.model.{name}": weight for name, weight in weights.items()} | {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 32)
        }

    assert "merge the adapter" in fault(changed(plain, tmp_path / "m", adapted))


def test_other_shapes_are_named(tmp_path, plain):
    def cut(weights):
        return weights | {"lm_head.weight": weights["lm_head.weight"][:200].contiguous()}

    assert "1 have another shape: lm_head.weight is (200, 32) and not (300, 32)" in fault(
        changed(plain, tmp_path / "m", cut)
    )


def test_an_expert_that_is_missing_is_a_fault(tmp_path, mixture):
    fault(changed(mixture, tmp_path / "part", without("experts.2.up_proj")))
    fault(changed(mixture, tmp_path / "all", without("experts.2.")))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_numbers_of_another_kind_are_named(tmp_path, plain, dtype):
    def rounded(weights):
        name = "model.layers.0.mlp.up_proj.weight"
        return weights | {name: weights[name].to(dtype)}

    message = fault(changed(plain, tmp_path / "m", rounded))
    assert "model.layers.0.mlp.up_proj.weight" in message
    assert "quantization_config" in message


BLOCK = 16


def in_8_bits(weights):
    """Blocks of 16 x 16 with a scale each, as DeepSeek V3 and Qwen 3 publish theirs (of 128 x 128)."""
    stored = {}
    for name, weight in weights.items():
        stored[name] = weight
        if name.endswith("proj.weight"):
            rows, columns = (size // BLOCK for size in weight.shape)
            blocks = weight.view(rows, BLOCK, columns, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            stored[name] = (blocks / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
    return stored


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, plain):
    directory = changed(plain, tmp_path_factory.mktemp("fp8") / "m", in_8_bits)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_8_bits_are_turned_back_into_the_numbers_transformers_gives(quantised, plain):
    theirs = AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert torch.allclose(logits(quantised), expected, atol=1e-5)
    assert 0.01 < (expected - logits(plain)).abs().max() < 1, "near the model that was quantised, and not it"
    found = report(quantised)
    assert found.faults == ()
    assert "quantised (fp8)" in found.notes[0]


def test_a_result_of_8_bits_is_published_as_numbers(tmp_path, quantised):
    job = make_job(tmp_path / "job", quantised, reference="live", save_every_steps=6)
    job.train()
    published = next(job.store.root.rglob("step-*/model"))
    assert "quantization_config" not in json.loads((published / "config.json").read_text())
    assert {w.dtype for w in load_file(published / "model.safetensors").values()} == {torch.float32}
    AutoModelForCausalLM.from_pretrained(published)


def test_the_control_plane_gets_the_same_from_a_process_of_its_own(tmp_path, plain):
    missing = changed(plain, tmp_path / "m", without("up_proj"))
    request = InspectionRequest(directory=str(missing))
    found = inspect_model(request)
    assert found == inspect(request)
    assert inspect_model(request) is found, "it is asked once"
    save_file(load_file(plain / "model.safetensors"), missing / "model.safetensors", metadata={"format": "pt"})
    mended = inspect_model(request)
    assert mended is not None
    assert mended.faults == (), "and again when the files have changed"


def in_4_bits(weights):
    """Experts in blocks of 32 numbers with an exponent each, two numbers a byte, as gpt-oss publishes them."""
    stored, draw = {}, torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = weight.shape
            shape = (experts, outputs, inputs // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
            stored[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=draw)
        else:
            stored[name] = weight
    return stored


def test_experts_in_4_bits_are_turned_back_into_the_numbers_transformers_gives(tmp_path):
    family("gpt_oss", PADDED["gpt_oss"] | {"intermediate_size": 32}).save_pretrained(tmp_path / "plain")
    packed = changed(tmp_path / "plain", tmp_path / "m", in_4_bits)
    config = json.loads((packed / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (packed / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)(IDS).logits
    assert torch.allclose(logits(packed), expected, atol=1e-5)
    assert report(packed).faults == ()
