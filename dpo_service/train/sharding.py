"""Fully sharded data parallelism (FSDP2; ZeRO 3, arXiv 1910.02054): each rank holds a share of every weight, gradient
and optimizer state, and the whole of one layer at a time.

    forward:   gather layer ─> compute ─> drop
    backward:  gather layer ─> compute ─> drop, sum gradients over ranks, keep own share

A decoder layer is a unit; embeddings, last norm and output head are one more, which stays whole from the forward to the
backward pass, so that `head.py` sees the head's weight as a plain tensor. Gradients are summed and not averaged, as in
`Ranks.sum_gradients`. Every rank must make the same forward passes: see `MicroBatch.blank`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dpo_service.train.batch import MicroBatch
from dpo_service.train.layers import decoder_layers
from dpo_service.train.logprobs import Completions, computed_logps
from dpo_service.train.ranks import Ranks


def shard(model: Any, ranks: Ranks, precision: str) -> Any:
    """Spread a transformers model (adapters in its layers or not) over `ranks`, in place; returns it.

    The model lies on the CPU, the same on every rank; each layer goes to the device and is cut there, so the device
    holds one whole layer at most. In bfloat16 the layers' weights are gathered in bfloat16; what is kept is float32.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    gathered = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # An expert that no token of this rank chose takes part in the sum with zeros.
    model.set_reduce_scatter_unused_params(True)
    _enter_by_completion_logps(model)
    return model


def _enter_by_completion_logps(model: Any) -> None:
    """`completion_logps` runs the model's parts one by one; its whole computation is what FSDP takes as a forward."""

    def inner(batch: MicroBatch, **options: Any) -> Completions:
        return computed_logps(model, batch, **options)

    model._dpo_inner_logps = inner
    register_fsdp_forward_method(model, "_dpo_inner_logps")

    def logps(batch: MicroBatch, **options: Any) -> Completions:
        completions: Completions = model._dpo_inner_logps(batch, **options)
        if not torch.is_grad_enabled():
            model.reshard()  # else the backward pass does it
        return completions

    model._dpo_logps = logps
