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
    "qwen2/windowed": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "mistral/windowed": {"sliding_window": 4},
    "mistral/window too long to matter": {"sliding_window": 200},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "head_dim": 8,
        "intermediate_size": [48, 48],
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
"""Families whose attention is replaced, and what their configurations add; a name may say more after a slash."""

PADDED: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "intermediate_size": 64, "layer_norm_epsilon": 1e-5},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 64},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "deepseek_v32": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 40,
        "index_n_heads": 16,  # few of them leave ties among the keys
        "index_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 64},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 100,
        "max_window_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
"""Families that are computed padded: state spaces, linear or sparse attention, attention sinks, unnamed windows."""


ADAPTED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
    },
    "minimax": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "block_size": 16,
    },
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
        "layer_types": ["full_attention", "full_attention"],
        "moe_layers": [0, 1],
        "no_rope_layers": [1, 0],
    },
    "mamba2": {
        "state_size": 4,
        "num_heads": 8,
        "head_dim": 8,
        "expand": 2,
        "n_groups": 1,
        "chunk_size": 8,
        "layer_norm_epsilon": 1e-05,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
        "mamba_chunk_size": 8,
        "head_dim": 8,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "phi": {},
    "stablelm": {},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4, "n_ctx": 256},
    "cohere": {"logit_scale": 0.5},
    "olmo": {},
    "starcoder2": {},
    "nemotron": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "smollm3": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "head_dim": 8},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gemma": {"head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
        "mamba_chunk_size": 8,
        "attn_layer_indices": [1],
    },
    "rwkv": {"attention_hidden_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}
"""More families, to try adapters and exports on."""


MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
"""Multi-head latent attention."""

OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "opt/projected": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "falcon/multi-query": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "persimmon": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "glm4_moe": MIXTURE | {"n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8},
    "deepseek_v2": MIXTURE | LATENT | {"n_routed_experts": 4, "first_k_dense_replace": 1, "q_lora_rank": 16},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "helium": {"head_dim": 8},
    "falcon_mamba": {"state_size": 4, "layer_norm_epsilon": 1e-5},
}
"""More families that train; docs/models.md says which of them are packed."""

EVERY = PACKED | PADDED | ADAPTED | OTHERS


def family(name: str, added: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name.partition("/")[0], **TINY | added), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
