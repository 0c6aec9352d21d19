"""What a sharded model holds whole, and when. That it computes what one worker does is test_ranks.py's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dpo_service.train.batch import collate
from dpo_service.train.logprobs import completion_logps
from dpo_service.train.policy import autocast, load_model
from dpo_service.train.ranks import CPU, Ranks
from dpo_service.train.sharding import shard
from tests.unit.train.test_attention import random_pairs

BATCH = collate(random_pairs(3))


@pytest.fixture
def alone():
    """A group of one process: its share is the whole, and is gathered like any other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1)
    dist.destroy_process_group()


def whole_ones(model):
    return {name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)}


@pytest.mark.parametrize(
    ("precision", "gathered", "kept"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.float32),
        ("pure_bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_layer_is_whole_while_it_computes_in_the_arithmetics_precision(alone, model_dir, precision, gathered, kept):
    model = shard(load_model(model_dir, precision=precision), alone, precision)
    assert whole_ones(model) == set()
    seen = []
    layer = model.model.layers[0]
    layer.mlp.register_forward_hook(lambda *_: seen.append((layer.mlp.up_proj.weight.dtype, whole_ones(layer))))
    with autocast(CPU, precision):
        logps_S = completion_logps(model, BATCH).logps_S
    assert seen == [(gathered, set(dict(layer.named_parameters())))]
    assert whole_ones(model) == {"model.embed_tokens.weight", "model.norm.weight"}  # the head is the embedding
    logps_S.sum().backward()
    assert whole_ones(model) == set()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {kept}


def test_without_a_backward_pass_nothing_stays_whole(alone, model_dir):
    model = shard(load_model(model_dir), alone, "float32")
    with torch.no_grad():
        completion_logps(model, BATCH)
    assert whole_ones(model) == set()
