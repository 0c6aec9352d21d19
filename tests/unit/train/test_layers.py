"""Recomputed and compiled layers give what plain ones give, packed and padded, with adapters and without."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from dpo_service.errors import TrainingError
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.batch import collate
from dpo_service.train.layers import decoder_layers, recompute_layers
from dpo_service.train.logprobs import completion_logps, packs, use_packing
from dpo_service.train.policy import adapter_dropout, add_adapter, autocast, base_of
from dpo_service.train.rows import Example
from tests.unit.train.families import PACKED, PADDED, family
from tests.unit.train.training_kit import Recorder, make_job

WIDE = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 4}


def model_of(name, *, layout, **added):
    model = family(name, (PACKED if layout == "packed" else PADDED)[name] | added)
    use_packing(model)
    assert packs(model) == (layout == "packed")
    return model


def micro_batch(rows=3, longest=20):
    draw = random.Random(0)

    def ids():
        return [draw.randrange(2, 97) for _ in range(draw.randrange(2, longest))]

    return collate([Example(prompt=ids(), chosen=ids(), rejected=ids()) for _ in range(rows)])


def gradients(policy, batch, precision="float32"):
    """Of the trained parameters, and the bytes that the forward pass kept besides the weights."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    policy.zero_grad()
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    with adapter_dropout(policy, 7):
        with autocast(torch.device("cpu"), precision), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logps_S = completion_logps(base_of(policy), batch).logps_S
        size = sum(size for place, (size, _) in kept.items() if place not in weights)
        logps_S.sum().backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return found, size


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "packed"), ("mixtral", "packed"), ("gemma2", "packed"), ("gpt_oss", "padded")]
)
def test_recomputed_gradients_are_the_same_bits(name, layout, precision):
    plain = model_of(name, layout=layout)
    recomputed = copy.deepcopy(plain)
    recompute_layers(recomputed, random=False)
    expected, _ = gradients(plain, micro_batch(), precision)
    found, _ = gradients(recomputed, micro_batch(), precision)
    assert found.keys() == expected.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(found[parameter], expected[parameter]) for parameter in expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_adapters_draw_the_same_dropout(dropout):
    plain = add_adapter(model_of("llama", layout="packed"), LoraSpec(rank=4, dropout=dropout), seed=0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.02)
    recomputed = copy.deepcopy(plain)
    recompute_layers(recomputed, random=dropout > 0)
    expected, _ = gradients(plain, micro_batch())
    found, _ = gradients(recomputed, micro_batch())
    assert found.keys() == expected.keys()
    assert all("lora_" in parameter for parameter in expected)
    assert all(torch.equal(found[parameter], expected[parameter]) for parameter in expected)


@pytest.mark.parametrize(("name", "layout"), [("llama", "packed"), ("qwen2_moe", "padded")])
def test_recomputing_keeps_a_fifth_of_the_memory(name, layout):
    model = model_of(name, layout=layout, **WIDE)
    batch = micro_batch(rows=6, longest=60)
    _, whole = gradients(model, batch)
    recompute_layers(model, random=False)
    _, rest = gradients(model, batch)
    assert rest < whole / 5


def test_a_run_is_the_same_with_recomputing(tmp_path, model_dir):
    plain, recomputed = Recorder(), Recorder()
    make_job(tmp_path / "a", model_dir, reference="live").train(reports=plain)
    make_job(tmp_path / "b", model_dir, reference="live", activation_checkpointing=True).train(reports=recomputed)
    assert recomputed.losses() == plain.losses()
    assert recomputed.losses("eval") == plain.losses("eval")


@pytest.mark.long  # the compiler takes a minute on two cores
def test_a_compiled_run_follows_the_plain_one(tmp_path, model_dir):
    plain, compiled = Recorder(), Recorder()
    make_job(tmp_path / "a", model_dir, reference="live").train(reports=plain)
    options = {"reference": "live", "activation_checkpointing": True, "compile": True}
    make_job(tmp_path / "b", model_dir, **options).train(reports=compiled)
    assert compiled.losses() == pytest.approx(plain.losses(), rel=1e-5)


def test_a_model_without_layers_is_refused():
    with pytest.raises(TrainingError, match=r"Linear has no decoder layers.*set activation_checkpointing"):
        decoder_layers(torch.nn.Linear(2, 2))
