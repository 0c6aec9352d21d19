"""The load-balancing loss of a mixture of experts, added to the loss of a job (Switch, arXiv 2101.03961, eq. 4 to 6).

    E * sum over experts e of  (share of assignments to e) * (mean probability of e)

over all tokens of a micro-batch and all its layers, each token once: a prompt counts once for its pair, padding not at
all. It is a product of two means, so it does not add over micro-batches; a step's is the mean of its micro-batches',
each weighted by its share of the step (rows, or answer tokens, as the loss counts). Sums over ranks then stay exact,
and another cut into micro-batches changes it a little.

Shapes: B input rows, L their length, S sequences, P pairs or answers.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from dpo_service.errors import TrainingError
from dpo_service.train.batch import MicroBatch


def require_router(model: nn.Module) -> None:
    """Raises TrainingError where `model` has no router loss."""
    if _function(model) is None:
        raise TrainingError(f"{type(model).__name__} has no router loss; set router_aux_loss_coef to 0")


def router_loss(model: nn.Module, router_logits: Any, batch: MicroBatch) -> Tensor:
    """A scalar, by the function of the model's own family; `router_logits` is a tuple, [B * L, experts] a layer."""
    function = _function(model)
    assert function is not None, "`require_router` comes first"
    loss: Tensor = function(router_logits, model.num_experts, model.num_experts_per_tok, _counted(batch))
    return loss


def _function(model: nn.Module) -> Any:
    # Of the base classes too: a sharded model's own class is FSDP's.
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    return next((found for module in modules if (found := getattr(module, "load_balancing_loss_func", None))), None)


def _counted(batch: MicroBatch) -> Tensor | None:
    """[B, L], 1 where a token counts; None = all do, as in a packed row."""
    if batch.attention_mask_BL is None:
        return None
    rejected = [segment.prompt for segment in batch.segments if segment.rejected]
    prompts_B = [0] * len(batch.segments) + rejected
    places_L = torch.arange(batch.attention_mask_BL.shape[1], device=batch.attention_mask_BL.device)
    begins_B = torch.tensor(prompts_B, device=places_L.device)
    return batch.attention_mask_BL * (places_L >= begins_B[:, None])
