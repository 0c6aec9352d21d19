"""Log-probabilities of completions, float32, without ever holding a whole [tokens, vocabulary] array.

Shapes: S sequences, C completion tokens, H hidden size, V vocabulary, B x L input.

Hidden states reach the output head only where a completion token is predicted; `head.py` says how they pass it.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_service.errors import TrainingError
from dpo_service.train.attention import interface as attention
from dpo_service.train.attention.layout import Layout, Trial
from dpo_service.train.batch import MicroBatch, collate, padded
from dpo_service.train.head import Head, head_logps, logit_logps
from dpo_service.train.language import is_composite, language_body
from dpo_service.train.rope import own_frequencies, shares_prompts
from dpo_service.train.router import router_loss
from dpo_service.train.rows import Example

log = logging.getLogger(__name__)

PROBE_TOLERANCE = 1e-3
"""Packed against padded, relative: float32 noise is far below, a token that sees the wrong one far above."""
COARSE_TOLERANCE = 5e-2
"""The same for weights in half precision."""

REFUSED, REFUSED_COARSE = 1e-2, 0.2
"""From where a model is refused for it: a mixture in half precision may send a token to other experts by rounding."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What families call the bound of their logits."""


class Completions(NamedTuple):
    logps_S: Tensor
    """Sum over the completion's tokens of log p(token | what precedes it), float32."""
    correct_S: Tensor
    """Completion tokens that were the model's first choice; no gradient."""
    tail_S: Tensor
    """The part of `logps_S` that lies past the length of the pair's shorter answer."""
    aligned_S: Tensor | None = None
    """Sum over the completion's tokens of log p(token) - log sum_v p(v)^2; no gradient."""
    router_loss: Tensor | None = None
    """Load-balancing loss of a mixture of experts (`router`), a scalar."""


def completion_logps(
    model: nn.Module, batch: MicroBatch, *, chunk: int | None = None, aligned: bool = False, routed: bool = False
) -> Completions:
    """Log-probability of each sequence's completion under a causal language model of transformers.

    A `batch` is padded first where the model cannot compute it as it is (`packed`). The output head takes `chunk`
    tokens at a time, by default as many as `specs/room.py` allows. `aligned` asks for `aligned_S`,
    `routed` for `router_loss`.
    """
    compute = getattr(model, "_dpo_logps", None) or partial(computed_logps, model)
    completions: Completions = compute(batch, chunk=chunk, aligned=aligned, routed=routed)
    return completions


def computed_logps(
    model: nn.Module, batch: MicroBatch, *, chunk: int | None, aligned: bool, routed: bool
) -> Completions:
    """`completion_logps` of a model whose weights are all here; a sharded one gathers them around it (`sharding`)."""
    batch = batch if packed(model, batch) else padded(batch)
    head = split_head(model)
    options: dict[str, Any] = {"output_router_logits": True} if routed else {}
    output = _run(model, batch, split=head is not None, **options)
    hidden_CH = _predicting(output, batch, split=head is not None)
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
        router_loss(model, output.router_logits, batch) if routed else None,
    )


def _run(model: nn.Module, batch: MicroBatch, *, split: bool, layout: Layout | None = None, **options: Any) -> Any:
    """What the model says of `batch`, or its body alone where the head is split off."""
    arguments: dict[str, Any] = {"attention_mask": batch.attention_mask_BL}
    if batch.attention_mask_BL is None:
        layout = layout or attention.row_layout(batch.segments, batch.input_ids_BL.device)
        arguments = attention.forward_arguments(layout)
    ids, positions = batch.input_ids_BL, batch.position_ids_BL
    module = language_body(model) if split else model
    return module(input_ids=ids, position_ids=positions, use_cache=False, **arguments, **options)


def _predicting(output: Any, batch: MicroBatch, *, split: bool) -> Tensor:
    """What predicts the completion tokens: hidden states [C, H], or logits [C, V] of a model that is not split."""
    return _states(output, split=split).flatten(0, 1)[batch.source_C]


def _states(output: Any, *, split: bool) -> Tensor:
    """Hidden states [B, L, H], or logits [B, L, V] of a model that is not split."""
    states: Tensor = output.last_hidden_state if split else output.logits
    return states


def packs(model: nn.Module) -> bool:
    """Whether `use_packing` found that `model` computes packed rows; False for a model it was never asked of."""
    return bool(getattr(model, "_dpo_packs", False))


def packed(model: nn.Module, batch: MicroBatch) -> bool:
    """Whether `model` computes this `batch` packed: not where a prompt has other frequencies with either answer."""
    return packs(model) and shares_prompts(model, batch.segments)


def padded_because(model: nn.Module) -> str:
    """What `use_packing` found against it."""
    return str(getattr(model, "_dpo_padded_because", "it was never tried"))


def use_packing(model: Any) -> bool:
    """Give `model` the attention that computes packed rows, if with it the model gives what it gives padded.

    It is tried on two short pairs rather than read off the configuration: linear attention, positions of the model's
    own, or attention that cannot be replaced show there. A model that fails keeps its own attention and is computed
    padded. Either way a sequence is computed as if it were alone (`rope`).

    Raises:
        TrainingError: padded, it does not compute a sequence as it does alone, or its tokens see those after them.
    """
    own_frequencies(model)
    _require_plain(model)
    reason = _try_packing(model)
    model._dpo_packs = reason is None
    if reason is not None:
        model._dpo_padded_because = reason
        log.warning("%s is computed padded, which is slower: %s", type(model).__name__, reason)
    return reason is None


@torch.no_grad()
def _require_plain(model: Any) -> None:
    """See `use_packing`. The probe's shortest sequence beside the others is compared with it alone, as transformers
    computes it when nothing but its ids is given, and that with the same but for the last token."""
    split = split_head(model) is not None
    batch = padded(_probe().to(next(model.parameters()).device))
    assert batch.attention_mask_BL is not None
    lengths = batch.attention_mask_BL.sum(1)
    row, length = int(lengths.argmin()), int(lengths.min())
    ids_1L = batch.input_ids_BL[row : row + 1, :length]

    def states(ids: Tensor) -> Tensor:
        return _states((language_body(model) if split else model)(input_ids=ids, use_cache=False), split=split)[0]

    alone_LH, cut_LH = states(ids_1L), states(ids_1L[:, :-1])
    beside_LH = _states(_run(model, batch, split=split), split=split)[row, :length]
    tolerance = REFUSED if alone_LH.dtype in (torch.float32, torch.float64) else REFUSED_COARSE
    if (beside_LH - alone_LH).norm() > tolerance * alone_LH.norm():
        raise TrainingError(
            f"{type(model).__name__} does not compute a sequence beside longer ones as it does alone, so what it "
            "learns from a row would depend on its neighbours; use a model that takes right padding and position_ids"
        )
    if (alone_LH[:-1] - cut_LH).norm() > tolerance * cut_LH.norm():
        raise TrainingError(
            f"the tokens of this {type(model).__name__} see those after them, so it gives no probabilities of answers; "
            "use a causal model (of an encoder, is_decoder in config.json makes one)"
        )


@torch.no_grad()
def _try_packing(model: Any) -> str | None:
    """Why `model` cannot compute packed rows, or None, and then it is set to."""
    batch = _probe().to(next(model.parameters()).device)
    trial = Trial(batch.segments, batch.input_ids_BL.device, "sdpa")
    split = split_head(model) is not None
    # Parts that read images keep their own attention.
    target: Any = language_body(model) if is_composite(model) else model
    own = target.config._attn_implementation
    plain = padded(batch)
    expected_CH = _predicting(_run(model, plain, split=split), plain, split=split)
    reason: str | None = "it does not give the same result packed"
    try:
        attention.register()
        target.set_attn_implementation(attention.NAME)
        found_CH = _predicting(_run(model, batch, split=split, layout=trial), batch, split=split)
        tolerance = PROBE_TOLERANCE if found_CH.dtype in (torch.float32, torch.float64) else COARSE_TOLERANCE
        if (found_CH - expected_CH).norm() <= tolerance * expected_CH.norm():
            reason = _hidden_masks(model, trial)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"its attention cannot be replaced: {error}"
    if reason is not None:
        target.set_attn_implementation(own)
    return reason


def _hidden_masks(model: Any, trial: Trial) -> str | None:
    """What a short trial cannot show: masks that reach further than it, and of which the layers say nothing."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in kinds or (not kinds and getattr(config, "attention_chunk_size", None)):
        return "its attention is chunked"
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if ((windowed and not kinds) or "sliding_attention" in kinds) and trial.windows <= {None}:
        return "its layers do not say how far their attention reaches"
    return None


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
        model._dpo_split_head = _bounds(model)
    bounds: tuple[float, float | None] | None = model._dpo_split_head
    return None if bounds is None else Head(model.get_output_embeddings(), *bounds)


@torch.no_grad()
def _bounds(model: Any) -> tuple[float, float | None] | None:
    """The scale and the soft-capping with which the head gives the model's logits; None where none does."""
    if model.get_output_embeddings() is None or language_body(model) is model:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = next((bound for name in SOFTCAPS if (bound := getattr(config, name, None))), None)
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    try:
        states = language_body(model)(input_ids=ids, use_cache=False).last_hidden_state
        whole = model(input_ids=ids, use_cache=False).logits
    except (AttributeError, TypeError):
        return None
    tolerance = 1e-4 if whole.dtype in (torch.float32, torch.float64) else COARSE_TOLERANCE
    # Around a language model that scales its logits there are wrappers that do not (Aya Vision).
    for bounds in ((scale, softcap), (1.0, None)):
        split = Head(model.get_output_embeddings(), *bounds)(states)
        if torch.allclose(split, whole, rtol=tolerance, atol=1e-5):
            return bounds
    return None
