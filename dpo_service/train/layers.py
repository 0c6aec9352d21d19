"""What can be done to each decoder layer of a model: computing it again in the backward pass, and compiling it.

    layer.forward  ->  recomputed(compiled(layer.forward))

The model stays in evaluation mode (no dropout of its own), in which transformers' switches for either do nothing; so
the layers' `forward` is replaced on the instance. Hooks (adapters', FSDP's) stay outside and run once, names of
parameters stay as they are, and keyword arguments such as the layout of a packed row pass through.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpo_service.errors import TrainingError
from dpo_service.specs.run import RunSpec
from dpo_service.train.attention import interface as attention
from dpo_service.train.language import language_modules


def prepare_layers(policy: nn.Module, run: RunSpec) -> None:
    """Do to the layers of `policy` what `run` asks for.

    Raises:
        TrainingError: it asks for something, and the model shows no decoder layers.
    """
    if run.compile:
        compile_layers(policy)
    if run.activation_checkpointing:
        recompute_layers(policy, random=run.lora is not None and run.lora.dropout > 0)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the language model, as transformers marks them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in language_modules(model) if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise TrainingError(
            f"{type(model).__name__} has no decoder layers that transformers marks as such; "
            "set activation_checkpointing and compile to false, and resources.strategy to ddp"
        )
    return layers


def recompute_layers(model: nn.Module, *, random: bool) -> None:
    """Activation checkpointing: a layer keeps its input and is computed again in the backward pass.

    Memory for one layer's activations and each layer's input, against a third more arithmetic (arXiv 1604.06174).
    `random` says that layers draw random numbers, which must then be drawn again.
    """
    for layer in decoder_layers(model):
        layer.forward = _recomputed(layer.forward, random)


def compile_layers(model: nn.Module) -> None:
    """torch.compile of each layer with the row's length left open. One compilation serves all layers of a kind.

    Attention over a packed row is cut out: it takes as many calls as the row has pairs, and each other number of them
    would be compiled anew.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.segment_attention))  # type: ignore[no-untyped-call]
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def _recomputed(forward: Callable[..., Any], random: bool) -> Callable[..., Any]:
    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)

    return recomputed
