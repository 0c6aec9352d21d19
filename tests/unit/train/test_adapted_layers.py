"""Adapters are put where they train, are published and are in use; anywhere else is refused by name."""

from __future__ import annotations

import pytest
import torch

from dpo_service.checkpoint.probe import require_same
from dpo_service.errors import InvalidSpec
from dpo_service.inspection.inspect import inspect
from dpo_service.manifests.inspection import InspectionRequest
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.adapters import adapted_layers, target_modules
from dpo_service.train.batch import collate
from dpo_service.train.logprobs import completion_logps
from dpo_service.train.optim import trained_parameters
from dpo_service.train.policy import add_adapter, base_of, export_model, load_model, merged_state
from dpo_service.train.probe import plain_logps, take_probe
from tests.unit.train.families import ADAPTED, PACKED, PADDED, family
from tests.unit.train.test_attention import random_pairs

FAMILIES = {name: added for name, added in (PACKED | PADDED | ADAPTED).items() if "/" not in name}
LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_default_adapter_trains_and_is_published_as_it_was_trained(tmp_path, name):
    family(name, FAMILIES[name]).save_pretrained(tmp_path / "base")
    policy = add_adapter(load_model(tmp_path / "base"), LoraSpec(rank=2), 0)
    stir(policy)
    completion_logps(base_of(policy), collate(random_pairs(3))).logps_S.sum().backward()
    unused = [n for n, p in trained_parameters(policy).items() if p.grad is None or not p.grad.any()]
    assert unused == [], "every adapter is part of what the model computes"
    probe = take_probe(policy, "float32", torch.device("cpu"))
    export_model(policy, merged_state(policy), tmp_path / "base", tmp_path / "out", torch.float32)
    require_same(probe, plain_logps(load_model(tmp_path / "out"), probe), "what was exported")


@torch.no_grad()
def stir(policy):
    torch.manual_seed(1)
    for parameter in trained_parameters(policy).values():
        parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", LLAMA),
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("mixtral", ATTENTION),
        ("qwen3_moe", ATTENTION),
        ("deepseek_v3", ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]),
        ("mamba", ["in_proj"]),
        ("jamba", sorted([*LLAMA, "in_proj"])),
        ("falcon", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
    ],
)
def test_which_layers_by_default(name, expected):
    assert target_modules(family(name, FAMILIES[name]), LoraSpec()) == expected


def refusal(name, *names, **options):
    with pytest.raises(InvalidSpec) as caught:
        target_modules(family(name, FAMILIES[name]), LoraSpec(target_modules=names, **options))
    assert caught.value.param == "lora.target_modules"
    return caught.value.message


def test_a_misspelt_module_is_named_with_those_there_are():
    message = refusal("llama", "q_proj", "v_porj")
    assert "no module 'v_porj'; did you mean 'v_proj'? There are down_proj, gate_proj" in message
    assert message.endswith("embed_tokens, lm_head")


def test_what_can_have_no_adapter_is_refused_with_the_reason():
    assert "it chooses or weighs" in refusal("qwen2_moe", "shared_expert_gate")
    assert "fused kernels of JambaMambaMixer" in refusal("jamba", "dt_proj")
    assert "it is a LlamaRMSNorm, and no linear layer" in refusal("llama", "input_layernorm")
    assert "set lora.dora to false" in refusal("llama", "embed_tokens", dora=True)


@pytest.mark.parametrize("names", [("w1", "w2", "w3"), ("q_proj", "gate_proj", "up_proj", "down_proj")])
def test_experts_are_refused(names):
    message = refusal("mixtral", *names)
    assert "q_proj" in message


@pytest.mark.parametrize(
    "names", [("q_proj",), ("embed_tokens", "lm_head"), ("self_attn.q_proj", "layers.1.mlp.up_proj")]
)
def test_names_are_taken_as_peft_takes_them(tmp_path, names):
    spec = LoraSpec(rank=2, target_modules=names)
    assert target_modules(family("llama", {}), spec) == sorted(names)
    family("llama", {"tie_word_embeddings": False}).save_pretrained(tmp_path)
    policy = add_adapter(load_model(tmp_path), spec, 0)
    adapted = {path for path, module in base_of(policy).named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == adapted_layers(family("llama", {}), names)
    assert all(any(path.endswith(name) for name in names) for path in adapted)


def test_a_job_is_told_where_its_adapter_is_before_it_begins(tmp_path):
    family("llama", {}).save_pretrained(tmp_path)
    report = inspect(InspectionRequest(directory=str(tmp_path), lora=LoraSpec(rank=8)))
    assert report.notes == (f"The adapter of rank 8 is on 14 layers: {', '.join(LLAMA)}",)
    wrong = LoraSpec(target_modules=("query",))
    (fault,) = inspect(InspectionRequest(directory=str(tmp_path), lora=wrong)).faults
    assert (fault.param, "no module 'query'" in fault.message) == ("lora.target_modules", True)


def test_a_model_without_a_layer_to_adapt_says_so():
    model = family("llama", {})
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(InvalidSpec, match="remove `lora`"):
        target_modules(model, LoraSpec())
