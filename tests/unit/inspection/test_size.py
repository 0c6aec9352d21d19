"""The size that a plan counts on is the model's: parameters exactly, activations about as autograd keeps them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_service.errors import ModelNotFound
from dpo_service.inspection.inspect import inspect
from dpo_service.inspection.size import size_of
from dpo_service.manifests.inspection import InspectionRequest
from dpo_service.planning.memory import Recipe, layer_activations
from dpo_service.planning.shape import read_shape, shape_of
from dpo_service.planning.speed import useful_operations
from dpo_service.planning.workload import Lengths, load_of
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.batch import collate
from dpo_service.train.flops import Cost
from dpo_service.train.language import language_body
from dpo_service.train.logprobs import completion_logps, packs, use_packing
from dpo_service.train.policy import add_adapter, load_model
from dpo_service.train.rows import Example
from tests.unit.train.families import ADAPTED, EVERY, OTHERS, PADDED, TINY, family

UNTOLD = ("nemotron", "stablelm", "qwen2_moe", "deepseek_v32")
"""Families whose attention could be replaced, and whose trial fails all the same."""
PAIRS = ((40, 30, 20), (60, 10, 25), (50, 40, 60))


def shell(name):
    config = AutoConfig.for_model(name.partition("/")[0], **TINY | EVERY[name])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def shape_by_size(model, directory):
    model.config.save_pretrained(directory)
    return read_shape(directory, "m", size_of(model))


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_counts_every_family_to_the_parameter(name, tmp_path):
    model = shell(name)
    shape = shape_by_size(model, tmp_path)
    assert shape.parameters == model.num_parameters()
    assert not shape.guessed


@pytest.mark.parametrize(
    ("name", "dora"), [("mixtral", False), ("deepseek_v3", False), ("gpt2", False), ("gpt2", True), ("gemma2", True)]
)
def test_adapters_are_counted_as_the_job_makes_them(name, dora, tmp_path):
    """What the family's experts get, and the lengths of DoRA, too."""
    spec = LoraSpec(rank=4, dora=dora)
    family(name, EVERY[name]).save_pretrained(tmp_path)
    trained = add_adapter(load_model(tmp_path), spec, 0)
    size = inspect(InspectionRequest(directory=str(tmp_path), sized=True, lora=spec)).size
    found = read_shape(tmp_path, "m", size).lora_parameters(4, None)
    assert found == sum(p.numel() for p in trained.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "phi", "opt/projected", "falcon", "lfm2", "recurrent_gemma", "glm4"])
def test_adapters_are_counted_by_the_matrices_where_they_were_not_made(name, tmp_path):
    model = shell(name)
    shape = shape_by_size(model, tmp_path)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.lora_parameters(4, None) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [*PADDED, *ADAPTED, *OTHERS])
def test_the_weight_files_alone_count_every_family(name, tmp_path):
    """Where transformers is not at hand: config.json under the families' own names, and the headers."""
    model = family(name, EVERY[name])
    model.save_pretrained(tmp_path)
    shape, counted = read_shape(tmp_path, "m"), size_of(model)
    state = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    assert shape.parameters == sum(state.values())  # some families store a buffer or two
    assert (shape.layers, shape.hidden, shape.vocabulary) == (counted.layers, counted.hidden, counted.vocabulary)
    assert shape.matrix_parameters == pytest.approx(sum(x.into * x.out * x.count for x in counted.linears), rel=0.1)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_said_to_be_padded_is(name):
    model = family(name, EVERY[name])
    use_packing(model)
    if not size_of(model).packs:
        assert not packs(model)
    elif name.partition("/")[0] not in UNTOLD:
        assert packs(model)


def kept(model, batch):
    """Bytes that autograd keeps of a pass through the body."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        completion_logps(model, batch)
    return sum(storage.nbytes() for storage in storages.values())


WIDER = {"gpt2", "opt", "bloom", "gpt_neox", "gptj", "falcon", "phi", "starcoder2", "mamba", "mamba2", "cohere", "glm4"}
WIDER |= {"gemma3n_text", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoe", "lfm2"}


@pytest.mark.parametrize("name", sorted(WIDER))
def test_activations_are_about_what_autograd_keeps(name, tmp_path):
    """Of two models that differ in their layers alone."""
    batch = collate([Example(prompt=[1] * p, chosen=[2] * c, rejected=[3] * r) for p, c, r in PAIRS])
    model = family(name, EVERY[name])
    use_packing(model)
    shape = shape_by_size(model, tmp_path)
    columns = (torch.tensor(column).numpy() for column in zip(*PAIRS, strict=True))
    load = load_of(Lengths(*columns), range(len(PAIRS)), packed=packs(model))
    planned = shape.layers * layer_activations(shape, Recipe(cuda=False), load)
    head = kept(_without_layers(model), batch)
    assert planned == pytest.approx(kept(model, batch) - head, rel=0.35)


def _without_layers(model):
    """The same model, its layers giving what they are given."""
    import copy

    bare = copy.deepcopy(model)
    body = language_body(bare)
    for module in body.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.ModuleList) and len(child) == 2:
                setattr(module, name, torch.nn.ModuleList())
    return bare


def test_useful_operations_are_about_those_that_utilisation_counts(tmp_path):
    columns = (torch.tensor(column).numpy() for column in zip(*PAIRS, strict=True))
    load = load_of(Lengths(*columns), range(len(PAIRS)))
    batch = collate([Example(prompt=[1] * p, chosen=[2] * c, rejected=[3] * r) for p, c, r in PAIRS])
    for name in ("gpt2", "gpt_neox", "phi", "glm4", "granitemoe", "gptj"):
        model = family(name, EVERY[name])
        counted = Cost.of(model).of_pairs(batch.segments)
        assert useful_operations(shape_by_size(model, tmp_path), Recipe(), load) == pytest.approx(counted, rel=0.1), (
            name
        )


def test_the_size_is_in_the_report_where_it_is_asked_for(tmp_path):
    model = family("gpt2", EVERY["gpt2"])
    model.save_pretrained(tmp_path)
    assert inspect(InspectionRequest(directory=str(tmp_path))).size is None
    size = inspect(InspectionRequest(directory=str(tmp_path), sized=True)).size
    assert size.parameters == model.num_parameters()
    assert size.kept_width > 0


def test_a_model_that_cannot_be_planned_has_its_field_and_value_named(tmp_path):
    sizes = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}
    assert shape_of(sizes, "m").layers == 2
    with pytest.raises(ModelNotFound, match=r"'m' cannot be planned: its config.json gives n_layer as 'two', which is"):
        shape_of(sizes | {"n_layer": "two"}, "m")
    with pytest.raises(ModelNotFound, match=r"does not give hidden_size \(nor n_embd, d_model"):
        shape_of({"vocab_size": 3}, "m")
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert read_shape(tmp_path, "m").guessed


def test_a_list_of_sizes_is_its_largest():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    assert shape_of(sizes | {"model_type": "gemma3n_text", "intermediate_size": [48, 64]}, "m").intermediate == 64
