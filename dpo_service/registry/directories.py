"""What a model directory in the Hugging Face layout says of itself. Reads JSON, never weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_service.errors import InvalidSpec, ModelNotFound, ModelRefused
from dpo_service.specs.judge import VLLM_CPU_HEADS, VLLM_REWARD_MODELS, RewardModelJudgeSpec
from dpo_service.storage.weights import stored_weights, weight_files

REWARD_SUFFIX = "ForSequenceClassification"
CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
COMPOSITE_SUFFIX = "ForConditionalGeneration"
"""Of a model that reads images or sound beside text, and of sequence-to-sequence ones."""
LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
LAYER_FIELDS, WIDTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers"), ("hidden_size", "n_embd", "d_model")
ROUTED = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "olmoe",
    "flex_olmo",
    "granitemoe",
    "phimoe",
    "minimax",
    "minimax_m2",
    "gpt_oss",
    "jamba",
    "ernie4_5_moe",
)
"""Mixtures of experts whose load-balancing loss can be trained, by `model_type`."""
DEFAULT_ROUTER_COEF = 0.001
NO_LENGTH = 1 << 20
"""`max_length` of a model that names no limit."""


@dataclass(frozen=True)
class DirectoryFacts:
    architecture: str
    max_length: int
    """Tokens the model can attend to."""
    layer_width: int
    """Layers times hidden size: what a token's activations grow with; 0 where the configuration does not say."""
    vocab_size: int
    has_chat_template: bool
    router_coef: float | None
    """Weight that the model gives the load-balancing loss of its experts; None = it has no such loss."""
    weight_bytes: int
    """Size of the weight files; 0 where they are not here yet (hub)."""


def inspect(directory: Path, name: str, *, weights_here: bool = True) -> DirectoryFacts:
    """Read the model's configuration.

    Raises:
        ModelNotFound: it is no directory of a causal language model with a fast tokenizer and safetensors weights.
        ModelRefused: weight files are missing or cut short.
    """
    config = _config(directory, name)
    weights = _weight_bytes(directory, name) if weights_here else 0
    if not (directory / "tokenizer.json").is_file():
        raise _refused(name, "it holds no tokenizer.json; save its fast tokenizer beside the weights")
    text = config.get("text_config") or config
    return DirectoryFacts(
        architecture=_architecture(config, name),
        max_length=next((int(text[f]) for f in LENGTH_FIELDS if isinstance(text.get(f), int)), NO_LENGTH),
        layer_width=_product(text, LAYER_FIELDS, WIDTH_FIELDS),
        vocab_size=int(text.get("vocab_size") or 0),
        has_chat_template=_has_chat_template(directory),
        router_coef=_router_coef(text),
        weight_bytes=weights,
    )


def require_reward_model(directory: Path, judge: RewardModelJudgeSpec) -> None:
    """
    Raises:
        ModelNotFound: it is no directory of a sequence-classification model with one output.
        InvalidSpec: the judge's engine does not compute it.
    """
    name = judge.model
    config = _config(directory, name)
    architectures = [str(a) for a in config.get("architectures") or ()]
    if not any(architecture.endswith(REWARD_SUFFIX) for architecture in architectures):
        named = ", ".join(architectures) or "no architecture"
        raise _refused(name, f"its config.json names {named}; a reward model (…{REWARD_SUFFIX}) is needed")
    # transformers writes the labels, and not their number; two of them are its default.
    outputs = len(config.get("id2label") or ()) or config.get("num_labels") or 2
    if outputs != 1:
        raise _refused(name, f"it has {outputs} outputs; a reward model has one")
    if judge.engine == "vllm":
        _require_vllm(config, architectures, judge)


def _require_vllm(config: dict[str, Any], architectures: list[str], judge: RewardModelJudgeSpec) -> None:
    if not set(architectures) & set(VLLM_REWARD_MODELS):
        raise InvalidSpec(
            f"judge.engine vllm computes {', '.join(VLLM_REWARD_MODELS)}, and {judge.model!r} is "
            f"{', '.join(architectures)}; set judge.engine to transformers",
            param="judge.engine",
        )
    text = config.get("text_config") or config
    head = text.get("head_dim") or text.get("hidden_size", 0) // (text.get("num_attention_heads") or 1)
    if not judge.gpus and head not in VLLM_CPU_HEADS:
        raise InvalidSpec(
            f"on a CPU vLLM computes attention heads of {', '.join(map(str, VLLM_CPU_HEADS))}, and those of "
            f"{judge.model!r} are of {head}; set judge.engine to transformers, or judge.gpus to 1",
            param="judge.engine",
        )


def _config(directory: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise _refused(name, "it holds no config.json; a model is a directory in the Hugging Face layout") from None
    except (ValueError, OSError) as error:
        raise _refused(name, f"its config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise _refused(name, "its config.json is no JSON object")
    return config


def _weight_bytes(directory: Path, name: str) -> int:
    try:
        stored_weights(directory)
        return sum(file.stat().st_size for file in weight_files(directory))
    except ModelRefused as error:
        raise ModelRefused(f"model {name!r} cannot be used: {error.message}", param="model") from None


def _router_coef(config: dict[str, Any]) -> float | None:
    if config.get("model_type") not in ROUTED:
        return None
    value = config.get("router_aux_loss_coef")
    return float(value) if isinstance(value, int | float) else DEFAULT_ROUTER_COEF


def _product(config: dict[str, Any], *choices: tuple[str, ...]) -> int:
    """Of the first field of each choice that the configuration has; 0 where it lacks one."""
    return math.prod(next((config[f] for f in fields if isinstance(config.get(f), int)), 0) for fields in choices)


def _architecture(config: dict[str, Any], name: str) -> str:
    architectures = [str(a) for a in config.get("architectures") or ()]
    if config.get("is_encoder_decoder"):
        raise _refused(name, f"it is a sequence-to-sequence model ({', '.join(architectures)}); give a causal one")
    for architecture in architectures:
        if architecture.endswith(CAUSAL_SUFFIXES) or (architecture.endswith(COMPOSITE_SUFFIX) and _composite(config)):
            return architecture
    raise _refused(
        name,
        f"its config.json names {', '.join(architectures) or 'no architecture'}; "
        "a causal language model (…ForCausalLM), or one that reads images or sound beside text "
        f"(…{COMPOSITE_SUFFIX} with a text_config), is needed",
    )


def _composite(config: dict[str, Any]) -> bool:
    """Whether a language model is a part of it: the parts have configurations of their own."""
    return any(name.endswith("_config") and isinstance(part, dict) for name, part in config.items())


def _has_chat_template(directory: Path) -> bool:
    if any((directory / file).is_file() for file in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((directory / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _refused(name: str, why: str) -> ModelNotFound:
    return ModelNotFound(f"model {name!r} cannot be used: {why}", param="model")
