"""Log-probabilities of completions, float32, without ever holding a whole [tokens, vocabulary] array.

Shapes: S sequences, C completion tokens, K tokens of a chunk, H hidden size, V vocabulary, B x L input.

Hidden states reach the output head only where a completion token is predicted; there they are taken in chunks whose
logits are thrown away and computed again in the backward pass.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_service.train import attention
from dpo_service.train.batch import MicroBatch, collate, padded
from dpo_service.train.rows import Example

log = logging.getLogger(__name__)

CHUNK = 1024
"""Completion tokens whose logits exist at one time."""

PROBE_TOLERANCE = 1e-3
"""Packed against padded, relative: float32 noise is far below, a token that sees the wrong one far above."""


class Completions(NamedTuple):
    logps_S: Tensor
    """Sum over the completion's tokens of log p(token | what precedes it), float32."""
    correct_S: Tensor
    """Completion tokens that were the model's first choice; no gradient."""


def completion_logps(model: nn.Module, batch: MicroBatch, *, chunk: int = CHUNK) -> Completions:
    """Log-probability of each sequence's completion under a causal language model of transformers.

    A packed `batch` is padded first where the model cannot compute it as it is (`packs`).
    """
    batch = batch if packs(model) else padded(batch)
    head = split_head(model)
    hidden_CH = _hidden(model, batch, split=head is not None)
    parts = [
        checkpoint(_token_logps, hidden_KH, target_K, head, use_reentrant=False)
        for hidden_KH, target_K in zip(torch.split(hidden_CH, chunk), torch.split(batch.target_C, chunk), strict=True)
    ]
    logps_C = torch.cat([logps_K for logps_K, _ in parts])
    correct_C = torch.cat([correct_K for _, correct_K in parts])
    zeros_S = torch.zeros(batch.sequences, dtype=logps_C.dtype, device=logps_C.device)
    return Completions(
        zeros_S.index_add(0, batch.owner_C, logps_C),
        zeros_S.index_add(0, batch.owner_C, correct_C.to(logps_C.dtype)),
    )


def _token_logps(hidden_KH: Tensor, target_K: Tensor, head: nn.Module | None) -> tuple[Tensor, Tensor]:
    logits_KV = (hidden_KH if head is None else head(hidden_KH)).float()
    chosen_K = logits_KV.gather(1, target_K[:, None]).squeeze(1)
    return chosen_K - logits_KV.logsumexp(1), logits_KV.argmax(1) == target_K


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


def split_head(model: nn.Module) -> nn.Module | None:
    """The output head, if logits are nothing but head(hidden states); None where the model does more to them.

    Some do (soft-capping, scaling), so it is tried on two tokens rather than read off the configuration. The answer is
    remembered on the model; `load_model` asks first, while no dropout is on.
    """
    if not hasattr(model, "_dpo_split_head"):
        model._dpo_split_head = _head_is_all(model)  # type: ignore[assignment]
    return model.get_output_embeddings() if model._dpo_split_head else None  # type: ignore[operator]


@torch.no_grad()
def _head_is_all(model: nn.Module) -> bool:
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or _body(model) is model:
        return False
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    try:
        split = head(_body(model)(input_ids=ids, use_cache=False).last_hidden_state)
        whole = model(input_ids=ids, use_cache=False).logits
    except (AttributeError, TypeError):
        return False
    return bool(torch.allclose(split, whole, rtol=1e-4, atol=1e-5))


def _body(model: nn.Module) -> nn.Module:
    return getattr(model, str(getattr(model, "base_model_prefix", "")), model)
