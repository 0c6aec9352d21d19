"""The model of memory against what torch itself records: what autograd saves, what the allocator hands out."""

from dataclasses import replace

import pytest
import torch

from dpo_service.planning.memory import Load, Recipe, layer_activations, memory
from dpo_service.planning.shape import shape_of
from dpo_service.planning.speed import useful_operations
from dpo_service.planning.workload import Lengths, load_of
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.batch import collate
from dpo_service.train.flops import Cost
from dpo_service.train.layers import recompute_layers
from dpo_service.train.logprobs import completion_logps, split_head, use_packing
from dpo_service.train.policy import add_adapter, base_of
from dpo_service.train.rows import Example

PAIRS = ((40, 30, 20), (60, 10, 25), (50, 40, 60))
WIDE = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 3}
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}


def build(layers=2, vocabulary=2000, **sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, tie_word_embeddings=True, pad_token_id=0, **(sizes or SIZES)
    )
    model = LlamaForCausalLM(config).eval()
    split_head(model)
    assert use_packing(model)
    return model


def micro_batch(pairs=PAIRS):
    batch = collate([Example(prompt=[1] * p, chosen=[2] * c, rejected=[3] * r) for p, c, r in pairs])
    columns = (torch.tensor(column).numpy() for column in zip(*pairs, strict=True))
    return batch, load_of(Lengths(*columns), range(len(pairs)))


def loss(model, batch, precision):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        return completion_logps(base_of(model), batch).logps_S.sum()


def saved_bytes(model, batch, precision):
    """Of what autograd keeps of a forward pass, without the weights and their copies."""
    weights = {tuple(p.shape) for p in model.parameters()}
    weights |= {shape[::-1] for shape in weights}
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in owned and tuple(tensor.shape) not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, batch, precision)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("sizes", [SIZES, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize(
    ("precision", "rank"), [("float32", 0), ("float32", 8), ("bfloat16", 0), ("bfloat16", 8), ("pure_bfloat16", 0)]
)
def test_a_layer_keeps_what_autograd_records(precision, rank, sizes):
    batch, load = micro_batch()
    by_layers = []
    for layers in (1, 2):
        model = build(layers, **sizes)
        if precision == "pure_bfloat16":
            model = model.to(torch.bfloat16)
        if rank:
            model = add_adapter(model, LoraSpec(rank=rank), 0)
        by_layers.append(saved_bytes(model, batch, precision))
    recipe = Recipe(precision=precision, lora_rank=rank, cuda=False)
    shape = shape_of(base_of(model).config.to_dict(), "m")
    assert layer_activations(shape, recipe, load) == pytest.approx(by_layers[1] - by_layers[0], rel=0.02)


def allocated_peak(model, batch, precision):
    """The most bytes the allocator had handed out in one forward and backward pass, above those at its start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss(model, batch, precision).backward()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("precision", "rank", "checkpointing"),
    [("float32", 0, False), ("bfloat16", 0, False), ("float32", 8, False), ("float32", 0, True), ("bfloat16", 0, True)],
)
def test_the_peak_is_what_the_allocator_hands_out(precision, rank, checkpointing):
    model = build(4)
    if rank:
        model = add_adapter(model, LoraSpec(rank=rank), 0)
    if checkpointing:
        recompute_layers(model, random=False)
    batch, load = micro_batch(PAIRS * 4)
    loss(model, batch, precision).backward()  # what is made once and kept
    model.zero_grad(set_to_none=True)
    recipe = Recipe(precision=precision, lora_rank=rank, checkpointing=checkpointing, cuda=False, accumulates=False)
    planned = memory(shape_of(base_of(model).config.to_dict(), "m"), recipe, load).parts
    lasting = ("weights", "optimizer", "reference", "framework")
    assert sum(size for name, size in planned.items() if name not in lasting) == pytest.approx(
        allocated_peak(model, batch, precision), rel=0.1
    )


def test_useful_operations_are_those_that_utilisation_counts():
    batch, load = micro_batch()
    for rank in (0, 8):
        model = build()
        if rank:
            model = add_adapter(model, LoraSpec(rank=rank), 0)
        shape = shape_of(base_of(model).config.to_dict(), "m")
        counted = Cost.of(model).of_pairs(batch.segments)
        assert useful_operations(shape, Recipe(lora_rank=rank), load) == pytest.approx(counted, rel=1e-3)


LLAMA_8B = shape_of(
    {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}, "8B",
)  # fmt: skip
FULL = Load(tokens=8192, answers=4096, rejoined=6000, seen=10**7)


def test_what_each_option_saves():
    plain = Recipe(precision="bfloat16", workers=8, reference="live")
    before = memory(LLAMA_8B, plain, FULL)
    assert before.parts["reference"] == before.parts["weights"] == LLAMA_8B.parameters * 4
    for option in ({"strategy": "fsdp"}, {"checkpointing": True}, {"reference": "cached"}, {"lora_rank": 16}):
        assert memory(LLAMA_8B, replace(plain, **option), FULL).total < 0.9 * before.total, option
    sharded = memory(LLAMA_8B, replace(plain, strategy="fsdp"), FULL)
    assert sharded.parts["optimizer"] * 8 == pytest.approx(before.parts["optimizer"])
    assert "communication" not in sharded.parts
