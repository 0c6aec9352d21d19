"""Two-layer random models of the common decoder families, built from their configurations."""

from __future__ import annotations

from typing import Any

import torch

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

PACKED: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}
"""Families whose attention is replaced, and what their configurations add."""

PADDED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
}
"""Families that are computed padded."""


def family(name: str, added: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **TINY | added), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
