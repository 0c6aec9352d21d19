"""Log-probabilities of completions, float32, without ever holding a whole [tokens, vocabulary] array.

Shapes: S sequences, C completion tokens, K tokens of a chunk, H hidden size, V vocabulary, B x L input.

Hidden states reach the output head only where a completion token is predicted; there they are taken in chunks whose
logits are thrown away and computed again in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_service.train.batch import MicroBatch

CHUNK = 1024
"""Completion tokens whose logits exist at one time."""


class Completions(NamedTuple):
    logps_S: Tensor
    """Sum over the completion's tokens of log p(token | what precedes it), float32."""
    correct_S: Tensor
    """Completion tokens that were the model's first choice; no gradient."""


def completion_logps(model: nn.Module, batch: MicroBatch, *, chunk: int = CHUNK) -> Completions:
    """Log-probability of each sequence's completion under a causal language model of transformers."""
    head = split_head(model)
    if head is None:
        hidden_CH = _forward(model, batch).logits.flatten(0, 1)[batch.source_C]
    else:
        hidden_CH = _forward(_body(model), batch).last_hidden_state.flatten(0, 1)[batch.source_C]
    parts = [
        checkpoint(_token_logps, hidden_KH, target_K, head, use_reentrant=False)
        for hidden_KH, target_K in zip(torch.split(hidden_CH, chunk), torch.split(batch.target_C, chunk), strict=True)
    ]
    logps_C = torch.cat([logps_K for logps_K, _ in parts])
    correct_C = torch.cat([correct_K for _, correct_K in parts])
    zeros_S = torch.zeros(batch.sequences, dtype=torch.float32, device=logps_C.device)
    return Completions(
        zeros_S.index_add(0, batch.owner_C, logps_C),
        zeros_S.index_add(0, batch.owner_C, correct_C.float()),
    )


def _token_logps(hidden_KH: Tensor, target_K: Tensor, head: nn.Module | None) -> tuple[Tensor, Tensor]:
    logits_KV = (hidden_KH if head is None else head(hidden_KH)).float()
    chosen_K = logits_KV.gather(1, target_K[:, None]).squeeze(1)
    return chosen_K - logits_KV.logsumexp(1), logits_KV.argmax(1) == target_K


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


def _forward(module: nn.Module, batch: MicroBatch):  # type: ignore[no-untyped-def]  # noqa: ANN202 - transformers' output types
    return module(
        input_ids=batch.input_ids_BL,
        attention_mask=batch.attention_mask_BL,
        position_ids=batch.position_ids_BL,
        use_cache=False,
    )
