"""The language model within a model: all of it for a causal one, a part where images or sound are read too.

    Gemma3ForConditionalGeneration ── model ─┬─ vision_tower, multi_modal_projector    frozen, published as they are
                                             └─ language_model                         trained
                                   └─ lm_head                                          trained

Rows are text, so the language model is called by itself: what its wrapper adds is the place of images among the tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dpo_service.errors import TrainingError


def loader_of(config: Any) -> Any:
    """The auto class of transformers that a checkpoint is loaded by: the one that gives the class it was saved from.

    Raises:
        TrainingError: that is no language model, and has none within.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    kind, named = type(config), set(config.architectures or ())
    causal, multimodal = kind in MODEL_FOR_CAUSAL_LM_MAPPING, kind in MODEL_FOR_MULTIMODAL_LM_MAPPING
    if multimodal and (not causal or MODEL_FOR_MULTIMODAL_LM_MAPPING[kind].__name__ in named):
        return AutoModelForMultimodalLM
    if causal:
        return AutoModelForCausalLM
    what = ", ".join(sorted(named)) or config.model_type
    raise TrainingError(
        f"{what} is no causal language model, and has none within that is trained here; give one (…ForCausalLM, or "
        "…ForConditionalGeneration of a model that reads images beside text)"
    )


def is_composite(model: Any) -> bool:
    """Whether `model` has parts beside its language model, by its configuration."""
    config = getattr(model, "config", None)
    return config is not None and config.get_text_config() is not config


def language_body(model: Any) -> nn.Module:
    """What gives hidden states for token ids: the language model without its output head."""
    body, head = model, model.get_output_embeddings()
    while is_composite(model) and (inner := body.get_decoder()) is not body:
        body = inner
    if body is model or (head is not None and any(module is head for module in body.modules())):
        inner = getattr(body, str(getattr(body, "base_model_prefix", "")), None)
        body = inner if inner is not None else getattr(body, "model", body)
    found: nn.Module = body
    return found


def language_modules(model: Any) -> list[nn.Module]:
    """Every module of the language model, the output head among them."""
    if not is_composite(model):
        return list(model.modules())
    head = model.get_output_embeddings()
    return [*language_body(model).modules(), *([] if head is None else head.modules())]


def require_language(model: Any) -> Any:
    """`model` itself; of one that is more than a language model, that part alone is left to be trained.

    Raises:
        TrainingError: it has no part that is a language model.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise TrainingError(f"{name} is a sequence-to-sequence model; give a causal language model")
    if not is_composite(model):
        return model
    if language_body(model) is model or model.get_output_embeddings() is None:
        raise TrainingError(
            f"{name} has no language model that can be trained by itself; save its language model alone "
            "(…ForCausalLM) and give that"
        )
    trained = {id(p) for module in language_modules(model) for p in module.parameters(recurse=False)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained and parameter.is_floating_point())
    return model


def outside(model: Any) -> list[str]:
    """The paths of the largest modules that hold nothing of the language model."""
    if not is_composite(model):
        return []
    inside = {id(module) for module in language_modules(model)}
    found: list[str] = []
    for path, module in model.named_modules():
        covered = any(path.startswith(f"{above}.") for above in found)
        if path and not covered and not any(id(part) in inside for part in module.modules()):
            found.append(path)
    return found
