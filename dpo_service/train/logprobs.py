"""Log-probabilities of completions, float32, without ever holding a whole [tokens, vocabulary] array.

Shapes: S sequences, C completion tokens, H hidden size, V vocabulary, B x L input.

Hidden states reach the output head only where a completion token is predicted; `head.py` says how they pass it.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_service.train import attention
from dpo_service.train.batch import MicroBatch, collate, padded
from dpo_service.train.head import Head, head_logps, logit_logps
from dpo_service.train.rows import Example

log = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-3
"""Packed against padded, relative: float32 noise is far below, a token that sees the wrong one far above."""


class Completions(NamedTuple):
    logps_S: Tensor
    """Sum over the completion's tokens of log p(token | what precedes it), float32."""
    correct_S: Tensor
    """Completion tokens that were the model's first choice; no gradient."""
    tail_S: Tensor
    """The part of `logps_S` that lies past the length of the pair's shorter answer."""
    aligned_S: Tensor | None = None
    """Sum over the completion's tokens of log p(token) - log sum_v p(v)^2; no gradient."""


def completion_logps(
    model: nn.Module, batch: MicroBatch, *, chunk: int | None = None, aligned: bool = False
) -> Completions:
    """Log-probability of each sequence's completion under a causal language model of transformers.

    A packed `batch` is padded first where the model cannot compute it as it is (`packs`). The output head takes `chunk`
    tokens at a time, by default as many as `head.CHUNK_LOGITS` allows. `aligned` asks for `aligned_S`.
    """
    batch = batch if packs(model) else padded(batch)
    head = split_head(model)
    hidden_CH = _hidden(model, batch, split=head is not None)
    if head is None:
        logps_C, first_C, square_C = logit_logps(hidden_CH, batch.target_C, squares=aligned)
    else:
        logps_C, first_C, square_C = head_logps(head, hidden_CH, batch.target_C, chunk, squares=aligned)
    zeros_S = torch.zeros(batch.sequences, dtype=logps_C.dtype, device=logps_C.device)

    def by_sequence(values_C: Tensor) -> Tensor:
        return zeros_S.index_add(0, batch.owner_C, values_C.to(zeros_S.dtype))

    return Completions(
        by_sequence(logps_C),
        by_sequence(first_C),
        by_sequence(logps_C * batch.tail_C),
        None if square_C is None else by_sequence(logps_C.detach() - square_C),
    )


def _hidden(model: nn.Module, batch: MicroBatch, *, split: bool) -> Tensor:
    """What predicts the completion tokens: hidden states [C, H], or logits [C, V] of a model that is not split."""
    arguments = {"attention_mask": batch.attention_mask_BL}
    if batch.attention_mask_BL is None:
        arguments = attention.forward_arguments(batch.segments, batch.input_ids_BL.device)
    module = _body(model) if split else model
    output = module(input_ids=batch.input_ids_BL, position_ids=batch.position_ids_BL, use_cache=False, **arguments)
    states_BLH: Tensor = output.last_hidden_state if split else output.logits
    return states_BLH.flatten(0, 1)[batch.source_C]


def packs(model: nn.Module) -> bool:
    """Whether `use_packing` found that `model` computes packed rows; False for a model it was never asked of."""
    return bool(getattr(model, "_dpo_packs", False))


def use_packing(model: Any) -> bool:
    """Give `model` the attention that computes packed rows, if with it the model gives what it gives padded.

    It is tried on two short pairs rather than read off the configuration: a sliding window, soft-capping, linear
    attention, positions of the model's own, or attention that cannot be replaced all show there. A model that fails
    keeps its own attention and is computed padded.
    """
    batch = _probe().to(next(model.parameters()).device)
    split = split_head(model) is not None
    own = model.config._attn_implementation
    with torch.no_grad():
        expected_CH = _hidden(model, padded(batch), split=split)
        reason = "its attention cannot be replaced"
        try:
            attention.register()
            model.set_attn_implementation(attention.NAME)
            found_CH = _hidden(model, batch, split=split)
            if (found_CH - expected_CH).norm() <= PROBE_TOLERANCE * expected_CH.norm():
                model._dpo_packs = True
                return True
            reason = "it does not give the same result packed"
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{reason}: {error}"
    model.set_attn_implementation(own)
    log.warning("%s is computed padded, which is slower: %s", type(model).__name__, reason)
    return False


def _probe() -> MicroBatch:
    """Two pairs, so that there is something to leak from one to the other."""
    first = Example(prompt=[5, 6, 7, 8, 9], chosen=[1, 2, 3, 4], rejected=[4, 9, 2])
    return collate([first, Example(prompt=[3, 8, 1], chosen=[7, 5], rejected=[2, 6, 9, 1, 5])])


def split_head(model: Any) -> Head | None:
    """The output head, if logits are nothing but head(hidden states); None where the model does more to them.

    What the configuration says of scales and soft-capping is taken in, and the whole tried on two tokens rather than
    believed. The answer is remembered on the model; `load_model` asks first, while no dropout is on.
    """
    if not hasattr(model, "_dpo_split_head"):
        model._dpo_split_head = _head_is_all(model)
    return _head(model) if model._dpo_split_head else None


def _head(model: Any) -> Head:
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _head_is_all(model: Any) -> bool:
    if model.get_output_embeddings() is None or _body(model) is model:
        return False
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    try:
        split = _head(model)(_body(model)(input_ids=ids, use_cache=False).last_hidden_state)
        whole = model(input_ids=ids, use_cache=False).logits
    except (AttributeError, TypeError):
        return False
    return bool(torch.allclose(split, whole, rtol=1e-4, atol=1e-5))


def _body(model: nn.Module) -> nn.Module:
    return getattr(model, str(getattr(model, "base_model_prefix", "")), model)
