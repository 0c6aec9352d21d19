"""How large a model is: layers, widths, matrices, and the number of its parameters, exactly.

a family of FAMILIES                 config.json, by formula: decoders whose layers are attention and a gated MLP
any other, transformers at hand      the model itself without weights (inspection/size.py)
any other, without it                config.json under the names that families give its fields, and the headers of
                                     the weight files; without those the shares of the parts are Llama's
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_service.errors import ModelNotFound
from dpo_service.manifests.inspection import AdapterSize, LinearSize, ModelSize
from dpo_service.planning.stored import StoredSize, stored_size
from dpo_service.specs.adapter import CHOOSES

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "mixtral",
    "qwen3_moe",
)  # fmt: skip
"""Values of `model_type` whose parameters are counted exactly by formula."""
FOUR_NORMS = ("gemma2", "gemma3_text")
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text")
NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "d_ff"),
    "vocab_size": ("vocab_size",),
    "head_dim": ("head_dim",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_a_token": ("num_experts_per_tok", "num_experts_per_token", "moe_k"),
}
"""What families call a size, in the order in which the names are looked for."""


@dataclass(frozen=True)
class ModelShape:
    family: str
    layers: int
    hidden: int
    heads: int
    """0 where there is no attention."""
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP; of one expert in a mixture."""
    vocabulary: int
    tied: bool
    """The output head is the embedding."""
    linears: tuple[LinearSize, ...] = ()
    """The matrices of all layers by the names that adapters go by; a mixture's experts are not among them."""
    layer_vectors: int = 0
    """Parameters of a layer outside its matrices: norms and biases."""
    experts: int = 0
    experts_a_token: int = 0
    expert_parameters: int = 0
    """Of all layers' experts together."""
    packs: bool = True
    """Whether its attention takes packed rows; else every sequence is a row, padded."""
    counted: int | None = None
    """Parameters of the whole model where they were counted; None = the formula is exact, or all there is."""
    frozen: int = 0
    """Parameters outside the language model: loaded, never trained."""
    attention_layers: int | None = None
    """None = all."""
    kept_width: float = 0.0
    """Bytes that a layer keeps of a token in float32 as measured; 0 = by the formula of memory.py."""
    kept_square: float = 0.0
    """The same of a pair of tokens."""
    adapter: AdapterSize | None = None
    """As counted on the model."""
    guessed: bool = False
    """The parameters are neither counted nor by an exact formula."""

    @property
    def queries(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def active_experts(self) -> int:
        """MLPs that a token passes: 1 where there is no mixture."""
        return self.experts_a_token or 1

    @property
    def attending(self) -> int:
        """Layers with attention."""
        return self.layers if self.attention_layers is None else self.attention_layers

    @property
    def matrix_parameters(self) -> int:
        """Of all layers, without experts."""
        return sum(linear.into * linear.out * linear.count for linear in self.linears)

    @property
    def layer_parameters(self) -> int:
        """In the mean over layers."""
        return (self.matrix_parameters + self.expert_parameters) // self.layers + self.layer_vectors

    @property
    def active_layer_parameters(self) -> int:
        """Those a token is multiplied with, in the mean over layers."""
        chosen = self.expert_parameters * self.experts_a_token // self.experts if self.experts else 0
        return (self.matrix_parameters + chosen) // self.layers

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        if self.counted is not None:
            return self.counted
        in_layers = self.matrix_parameters + self.expert_parameters + self.layers * self.layer_vectors
        return in_layers + self.head_parameters * (1 if self.tied else 2) + self.hidden

    def lora_parameters(self, rank: int, targets: tuple[str, ...] | None) -> int:
        """Of adapters on `targets` in every layer; None = all matrices, where it was not counted on the model."""
        if self.adapter is not None and self.adapter.targets == targets:
            return self.adapter.parameters * rank // self.adapter.rank
        wanted = [linear for linear in self.linears if adapted(linear, targets)]
        return rank * sum((linear.into + linear.out) * linear.count for linear in wanted)


def adapted(linear: LinearSize, targets: tuple[str, ...] | None) -> bool:
    """Whether matrices of this kind get adapters; `targets` as in LoraSpec."""
    return linear.name in targets if targets is not None else CHOOSES.search(linear.name) is None


def read_shape(directory: Path, name: str, measured: ModelSize | None = None) -> ModelShape:
    """The shape of the model in `directory`; `measured` is what the inspection counted, if there was one.

    Raises:
        ModelNotFound: its config.json does not say how large it is.
    """
    config = json.loads((directory / "config.json").read_text())
    composite, stored = "text_config" in config, stored_size(directory)
    if measured is not None and measured.family not in FAMILIES:
        return _measured(measured)
    shape = shape_of(config, name)
    if shape.family not in FAMILIES:
        return _stored(shape, stored)
    if measured is not None:
        shape = _with(shape, adapter=measured.adapter)
    if composite and measured is not None:
        return _with(shape, counted=measured.parameters, frozen=measured.frozen)
    if composite and stored is not None:
        return _with(shape, counted=stored.parameters, frozen=stored.frozen)
    return shape


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a config.json describes. Raises ModelNotFound where it leaves a size out."""
    text = config.get("text_config") or config
    family = str(text.get("model_type") or config.get("model_type") or "")
    hidden = _size(text, "hidden_size", name)
    heads = _optional(text, "num_attention_heads") or 0
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", family in TIED_BY_DEFAULT))
    shape = ModelShape(
        family=family,
        layers=_size(text, "num_hidden_layers", name),
        hidden=hidden,
        heads=heads,
        kv_heads=_optional(text, "num_key_value_heads") or (1 if text.get("multi_query") else heads),
        head_dim=_optional(text, "head_dim") or (hidden // heads if heads else 0),
        intermediate=_optional(text, "intermediate_size") or 4 * hidden,
        vocabulary=_size(text, "vocab_size", name),
        tied=bool(tied),
        experts=_optional(text, "experts") or 0,
        experts_a_token=_optional(text, "experts_a_token") or 0,
        packs=heads > 0,
        guessed=family not in FAMILIES,
    )
    experts = shape.layers * shape.experts * 3 * hidden * shape.intermediate
    return _with(shape, linears=_linears(shape), layer_vectors=_vectors(shape, text), expert_parameters=experts)


def _measured(size: ModelSize) -> ModelShape:
    values = {name: getattr(size, name) for name in type(size).model_fields if name != "parameters"}
    return ModelShape(**values, counted=size.parameters)


def _stored(shape: ModelShape, stored: StoredSize | None) -> ModelShape:
    """With the matrices and the number of parameters that the weight files hold."""
    if stored is None:
        return shape
    return _with(
        shape,
        linears=stored.linears,
        layer_vectors=stored.vectors // shape.layers,
        expert_parameters=stored.expert_parameters,
        counted=stored.parameters,
        frozen=stored.frozen,
        guessed=False,
    )


def _size(text: Mapping[str, Any], field: str, name: str) -> int:
    """Raises ModelNotFound where the configuration has no such number."""
    found = _optional(text, field)
    if found is not None:
        return found
    names = NAMES[field]
    given = next((f"gives {n} as {text[n]!r}, which is no size" for n in names if text.get(n) is not None), None)
    why = given or f"does not give {names[0]}" + (f" (nor {', '.join(names[1:])})" if names[1:] else "")
    raise ModelNotFound(f"model {name!r} cannot be planned: its config.json {why}", param="model")


def _optional(text: Mapping[str, Any], field: str) -> int | None:
    """Under the first of its names that has a number; of a list with a size for each layer, the largest."""
    for alias in NAMES[field]:
        value = text.get(alias)
        values = value if isinstance(value, list) else [value]
        sizes = [size for size in values if isinstance(size, int) and not isinstance(size, bool)]
        if sizes and len(sizes) == len(values) and max(sizes) > 0:
            return max(sizes)
    return None


def _with(shape: ModelShape, **values: Any) -> ModelShape:
    return ModelShape(**{**vars(shape), **values})


def _linears(shape: ModelShape) -> tuple[LinearSize, ...]:
    hidden, queries, keys, wide = shape.hidden, shape.queries, shape.keys, shape.intermediate
    fused = shape.family == "phi3"
    sizes = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    if fused:
        sizes = {"qkv_proj": (hidden, queries + 2 * keys)}
    sizes["o_proj"] = (queries, hidden)
    if shape.experts:
        sizes["gate"] = (hidden, shape.experts)
    else:
        up = {"gate_proj": (hidden, wide), "up_proj": (hidden, wide)}
        sizes |= {"gate_up_proj": (hidden, 2 * wide)} if fused else up
        sizes["down_proj"] = (wide, hidden)
    return tuple(
        LinearSize(name=name, into=into, out=out, count=shape.layers) for name, (into, out) in sizes.items() if into
    )


def _vectors(shape: ModelShape, text: Mapping[str, Any]) -> int:
    """Norms and biases of one layer."""
    norms = shape.hidden * (4 if shape.family in FOUR_NORMS else 2)
    if shape.family in ("qwen3", "qwen3_moe", "gemma3_text"):
        norms += 2 * shape.head_dim
    if shape.family == "olmo2":
        norms += shape.queries + shape.keys
    biases = 0
    if shape.family == "qwen2":
        biases += shape.queries + 2 * shape.keys
    elif text.get("attention_bias"):
        biases += shape.queries + 2 * shape.keys + shape.hidden
    if text.get("mlp_bias"):
        biases += 2 * shape.intermediate + shape.hidden
    return norms + biases
