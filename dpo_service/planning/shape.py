"""What a model's config.json says of its size: layers, widths, and the number of its parameters, exactly.

The families counted by formula are the decoders of transformers whose layers are attention and a gated MLP: Llama,
Mistral, Qwen 2 and 3, Gemma 1 to 3, Phi-3, OLMo 2, Granite, and the mixtures of experts Mixtral and Qwen 3 MoE. For any
other the weight files' headers give the number, where they are at hand, and the shares of the parts are Llama's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_service.errors import ModelNotFound, ModelRefused
from dpo_service.storage.weights import stored_weights

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "mixtral",
    "qwen3_moe",
)  # fmt: skip
"""Values of `model_type` whose parameters are counted exactly."""
FOUR_NORMS = ("gemma2", "gemma3_text")
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text")


@dataclass(frozen=True)
class Linear:
    """A matrix of every layer: rows in, columns out."""

    into: int
    out: int


@dataclass(frozen=True)
class ModelShape:
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP; of one expert in a mixture."""
    vocabulary: int
    tied: bool
    """The output head is the embedding."""
    linears: Mapping[str, Linear] = field(default_factory=dict)
    """The matrices of one layer by the names that adapters go by; a mixture's experts are not among them."""
    layer_vectors: int = 0
    """Parameters of a layer outside its matrices: norms and biases."""
    experts: int = 0
    experts_a_token: int = 0
    packs: bool = True
    """Whether its attention takes packed rows; else every sequence is a row, padded."""
    counted: int | None = None
    """Parameters as the weight files' headers say; None = they are not at hand, or the formula is exact."""

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
    def expert_parameters(self) -> int:
        """Of one layer's mixture; 0 where there is none."""
        return self.experts * 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        matrices = sum(linear.into * linear.out for linear in self.linears.values())
        return matrices + self.expert_parameters + self.layer_vectors

    @property
    def active_layer_parameters(self) -> int:
        """Those a token is multiplied with."""
        idle = self.experts - self.experts_a_token
        return self.layer_parameters - self.layer_vectors - idle * 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        if self.counted is not None:
            return self.counted
        return self.layers * self.layer_parameters + self.head_parameters * (1 if self.tied else 2) + self.hidden

    def lora_parameters(self, rank: int, targets: tuple[str, ...] | None) -> int:
        """Of adapters on `targets` in every layer; None = all matrices."""
        wanted = [v for name, v in self.linears.items() if targets is None or name in targets]
        return self.layers * rank * sum(linear.into + linear.out for linear in wanted)


def read_shape(directory: Path, name: str) -> ModelShape:
    """The shape of the model in `directory`.

    Raises:
        ModelNotFound: its config.json does not say how large it is.
    """
    config = json.loads((directory / "config.json").read_text())
    shape = shape_of(config, name)
    if shape.family in FAMILIES:
        return shape
    return _with(shape, counted=_stored_parameters(directory))


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a config.json describes. Raises ModelNotFound where it leaves a size out."""
    text = config.get("text_config") or config
    family = str(text.get("model_type") or config.get("model_type") or "")
    try:
        hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
        heads, vocabulary = int(text["num_attention_heads"]), int(text["vocab_size"])
        intermediate = int(text.get("moe_intermediate_size") or text["intermediate_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelNotFound(
            f"model {name!r} cannot be planned: its config.json does not say {error}; "
            "hidden_size, num_hidden_layers, num_attention_heads, intermediate_size and vocab_size are needed",
            param="model",
        ) from None
    shape = ModelShape(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        intermediate=intermediate,
        vocabulary=vocabulary,
        tied=bool(config.get("tie_word_embeddings", family in TIED_BY_DEFAULT)),
        experts=int(text.get("num_local_experts") or text.get("num_experts") or 0),
        experts_a_token=int(text.get("num_experts_per_tok") or 0),
        packs=text.get("attn_logit_softcapping") is None,
    )
    return _with(shape, linears=_linears(shape), layer_vectors=_vectors(shape, text))


def _with(shape: ModelShape, **values: Any) -> ModelShape:
    return ModelShape(**{**vars(shape), **values})


def _linears(shape: ModelShape) -> dict[str, Linear]:
    hidden, queries, keys, wide = shape.hidden, shape.queries, shape.keys, shape.intermediate
    fused = shape.family == "phi3"
    attention = {"q_proj": Linear(hidden, queries), "k_proj": Linear(hidden, keys), "v_proj": Linear(hidden, keys)}
    if fused:
        attention = {"qkv_proj": Linear(hidden, queries + 2 * keys)}
    attention["o_proj"] = Linear(queries, hidden)
    if shape.experts:
        return attention | {"gate": Linear(hidden, shape.experts)}
    up = {"gate_proj": Linear(hidden, wide), "up_proj": Linear(hidden, wide)}
    return (
        attention | ({"gate_up_proj": Linear(hidden, 2 * wide)} if fused else up) | {"down_proj": Linear(wide, hidden)}
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


def _stored_parameters(directory: Path) -> int | None:
    """Elements of all tensors in the weight files, from their headers; None where there are none to read."""
    try:
        return sum(weight.numbers for weight in stored_weights(directory).values()) or None
    except ModelRefused:
        return None
