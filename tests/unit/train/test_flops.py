"""Useful operations: against what torch counts while it computes, and against masks counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_service.checkpoint.format import digest_of
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train import flops, lora_linear
from dpo_service.train.attention.layout import Segment
from dpo_service.train.batch import collate
from dpo_service.train.feed import Feed
from dpo_service.train.flops import Cost
from dpo_service.train.logprobs import completion_logps, split_head, use_packing
from dpo_service.train.optim import trained_parameters
from dpo_service.train.policy import add_adapter, base_of
from dpo_service.train.ranks import Ranks
from dpo_service.train.rows import Example
from dpo_service.train.start import build_state
from dpo_service.train.step import train_step
from tests.unit.train.families import PACKED, family
from tests.unit.train.training_kit import make_job

BATCH = collate(
    [
        Example(prompt=list(range(2, 14)), chosen=list(range(20, 29)), rejected=list(range(40, 45))),
        Example(prompt=[3, 8, 1], chosen=[7, 5], rejected=[2, 6, 9, 1, 5, 4]),
    ]
)
TOKENS, ANSWERS = 26 + 11, 14 + 8


PRODUCTS = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.mkldnn._linear_pointwise,
    lora_linear.lora_linear._opoverload.overloadpacket,
    lora_linear._input_grad._opoverload.overloadpacket,
)


def linear_flops(states, weight, *_, **__) -> int:
    return 2 * math.prod(states) * weight[0]


def counted(policy, *, backward: bool = True) -> float:
    """Matrix products of a pass, as torch saw them; attention's are not among these."""
    with (
        torch.set_grad_enabled(backward),
        FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: linear_flops}) as counter,
    ):
        logps = completion_logps(base_of(policy), BATCH).logps_S
        if backward:
            logps.sum().backward()
    return sum(counter.get_flop_counts()["Global"].get(product, 0) for product in PRODUCTS)


def prepared(name, added):
    model = family(name, added)
    split_head(model)
    assert use_packing(model)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_weights_cost_what_torch_counts_when_all_are_trained(name):
    model = prepared(name, PACKED[name])
    cost = Cost.of(model)
    head = model.get_output_embeddings().weight.numel()
    assert cost.predicted == 6 * head
    assert cost.token * TOKENS + cost.predicted * ANSWERS == counted(model)


def test_frozen_weights_under_an_adapter_have_no_gradient_of_their_own():
    model = prepared("llama", PACKED["llama"])
    policy = add_adapter(model, LoraSpec(rank=2), seed=0)
    head, base = 97 * 32, 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)
    adapter = sum(weight.numel() for weight in trained_parameters(policy).values())
    cost = Cost.of(policy)
    assert cost.token == 4 * base + 6 * adapter
    assert cost.predicted == 4 * head
    # The first layer reads embeddings that are not trained, so its q, k and v, and the adapter's A, pass nothing back.
    unneeded = 2 * (32 * (32 + 16 + 16) + 3 * 2 * 32)
    assert (cost.token - unneeded) * TOKENS + cost.predicted * ANSWERS == counted(policy)


def test_a_pass_forward_only_costs_what_torch_counts():
    policy = add_adapter(prepared("llama", PACKED["llama"]), LoraSpec(rank=2), seed=0)
    cost = Cost.of(policy, backward=False)
    assert cost.token * TOKENS + cost.predicted * ANSWERS == counted(policy, backward=False)
    assert cost.attended[0][0] * 3 == Cost.of(policy).attended[0][0]


def test_a_step_of_kto_counts_its_mismatched_answers_forward(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, loss="kto", validation=0)
    state = build_state(job.run, model_dir, None, Ranks(), 6, digest_of(model_dir))
    feed = Feed(job.run, job.dataset, job.store, Ranks())
    batches = feed.batches(0)
    feed.close()
    trained, aside = (
        sum(state.cost.of_pairs(b.segments) for b in some)
        for some in (batches, [batch.mismatched for batch in batches])
    )
    assert float(train_step(state, 0, batches, 8.0).sums["flops"]) == pytest.approx(trained + aside / 3)


def test_a_mixture_costs_the_experts_it_asks():
    dense, mixture = prepared("mistral", PACKED["mistral"]), prepared("mixtral", PACKED["mixtral"])
    router = 2 * 32 * 4
    assert mixture.config.num_experts_per_tok == 2
    assert Cost.of(mixture).token == Cost.of(dense).token + 6 * (router + 2 * 3 * 32 * 48)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attended_pairs_are_those_the_mask_lets_through(window):
    for segment in (Segment(0, 7, 5, 3), Segment(2, 3, 1, 9), Segment(0, 6, 4, 0)):
        seen = 0
        for asked, answer in ((segment.prompt + segment.chosen, 0), (segment.rejected, segment.prompt)):
            for query in range(answer, answer + asked):
                seen += sum(1 for key in range(query + 1) if window is None or query - key < window)
        assert flops._seen(segment, window) == seen


def test_layers_with_windows_are_counted_by_themselves():
    config = family("gemma3_text", PACKED["gemma3_text"]).config
    a_layer = 12 * 4 * 8
    assert flops._attention(config, 3) == ((a_layer, None), (a_layer, 4))
    assert flops._attention(family("llama", {}).config, 3) == ((2 * a_layer, None),)


def test_a_micro_batch_is_the_sum_of_its_parts():
    cost = Cost(token=10.0, predicted=100.0, attended=((1000.0, None), (1e6, 2)))
    segments = [Segment(0, 3, 2, 1), Segment(6, 1, 1, 0)]
    # pairs seen: 15 + 4, and 3; with a window of 2: 9 + 2, and 3
    assert cost.of_pairs(segments) == 10 * (6 + 2) + 100 * (3 + 1) + 1000 * 22 + 1e6 * 14


def test_the_matrix_rate_is_measured_once():
    rate = flops.matrix_rate(torch.device("cpu"), torch.float32)
    assert rate > 1e8
    assert flops.matrix_rate(torch.device("cpu"), torch.float32) == rate
