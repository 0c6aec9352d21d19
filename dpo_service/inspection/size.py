"""What planning needs of a model, counted on its shell: parameters, matrices, and what a layer keeps of a token."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from dpo_service.inspection.activations import attention_is_shared, kept_bytes
from dpo_service.inspection.subject import Subject
from dpo_service.manifests.inspection import AdapterSize, LinearSize, ModelSize
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.language import language_body, language_modules
from dpo_service.train.policy import add_adapter, empty_model

log = logging.getLogger(__name__)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
WIDTHS = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size")
NO_ATTENTION = ("mamba", "mamba2", "recurrent", "linear_attention", "conv", "moe", "mlp")
"""Values of `layer_types` and their like, in lower case, for layers whose tokens do not attend to each other."""


def look(subject: Subject) -> None:
    """The size, where it is asked for. A model that does not show it is planned by its config.json."""
    if not subject.request.sized:
        return
    try:
        subject.size = size_of(subject.shell)
        if subject.request.lora is not None:
            adapter = adapter_size(empty_model(subject.directory), subject.request.lora)
            subject.size = subject.size.model_copy(update={"adapter": adapter})
    except (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        log.warning("%s is not measured: %s", type(subject.shell).__name__, error)


def size_of(model: Any) -> ModelSize:
    """Of a model, which may lie on the meta device."""
    config = model.config.get_text_config()
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    parts = _parts(model, layers, _first(config, EXPERTS) or 0)
    total = sum(p.numel() for p in model.parameters())
    trained = {id(p): p.numel() for module in language_modules(model) for p in _own(module)}
    width, square = kept_bytes(model)
    head = model.get_output_embeddings()
    return ModelSize(
        family=str(config.model_type),
        parameters=total,
        frozen=total - sum(trained.values()),
        layers=layers,
        attention_layers=_attention_layers(config, layers, heads),
        hidden=hidden,
        heads=heads,
        kv_heads=_first(config, KEY_HEADS) or (1 if getattr(config, "multi_query", False) else heads),
        head_dim=int(getattr(config, "head_dim", None) or (hidden // heads if heads else 0)),
        intermediate=_first(config, WIDTHS) or 4 * hidden,
        vocabulary=int(config.vocab_size),
        tied=head is None or head.weight is model.get_input_embeddings().weight,
        linears=_linears(model),
        layer_vectors=parts.rest // layers,
        experts=(_first(config, EXPERTS) or 0) if parts.experts else 0,
        experts_a_token=(_first(config, CHOSEN) or 1) if parts.experts else 0,
        expert_parameters=parts.experts,
        packs=_may_pack(model, config, heads),
        kept_width=width / layers,
        kept_square=square / layers,
    )


def adapter_size(model: Any, spec: LoraSpec) -> AdapterSize:
    """The adapter that a job of `spec` trains, made on `model`."""
    adapted = add_adapter(model, spec, 0)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return AdapterSize(rank=spec.rank, targets=spec.target_modules, parameters=trained)


class _Parts(NamedTuple):
    """Parameters of all layers."""

    experts: int
    rest: int
    """Neither in experts nor in linear modules."""


def _parts(model: Any, layers: int, experts: int) -> _Parts:
    modules = [module for layer in _layers(model, layers) for module in layer.modules()]
    in_experts = sum(p.numel() for module in modules for p in _own(module) if _is_expert(p, experts))
    in_linears = sum(rows * columns for rows, columns in (_sides(m) for m in modules if is_linear(m)))
    return _Parts(in_experts, sum(p.numel() for module in modules for p in _own(module)) - in_linears - in_experts)


def is_linear(module: nn.Module) -> bool:
    """Matrices that adapters can go on, as peft has it."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _sides(module: Any) -> tuple[int, int]:
    """Inputs and outputs; the Conv1D of GPT-2 lies the other way."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _linears(model: Any) -> tuple[LinearSize, ...]:
    """All of the language model but its output head."""
    inside = {id(module) for module in language_body(model).modules()}
    found: Counter[tuple[str, int, int]] = Counter()
    for name, module in model.named_modules():
        if id(module) in inside and is_linear(module) and module is not model.get_output_embeddings():
            found[(name.rpartition(".")[2], *_sides(module))] += 1
    return tuple(LinearSize(name=n, into=i, out=o, count=count) for (n, i, o), count in found.items())


def _layers(model: Any, layers: int) -> nn.ModuleList:
    """The decoder layers: of the lists that are as long, the one with the most parameters."""
    lists = [m for m in language_body(model).modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _is_expert(parameter: nn.Parameter, experts: int) -> bool:
    """All experts of a layer lie in one array of three dimensions."""
    return experts > 1 and parameter.dim() == 3 and parameter.shape[0] == experts


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    """Of the fields that the configuration has, the first; of a list, its largest."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            value = max(value)
        if isinstance(value, int) and value:
            return value
    return None


def _attention_layers(config: Any, layers: int, heads: int) -> int:
    if not heads:
        return 0
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return sum(str(kind).lower() not in NO_ATTENTION for kind in kinds) if kinds else layers


def _may_pack(model: Any, config: Any, heads: int) -> bool:
    """False for what the trial of `use_packing` is sure to refuse: another mixing of tokens than attention, or beside
    it, attention in chunks or with sinks, or attention that is not of transformers' registry."""
    body = language_body(model)
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    others = any(name.endswith(("sinks", "A_log")) for name, _ in body.named_parameters())
    layers = int(config.num_hidden_layers)
    return (
        attention_is_shared(body) and not chunked and not others and _attention_layers(config, layers, heads) == layers
    )
