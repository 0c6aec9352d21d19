"""Small random models that read images beside text, in the layout in which such models are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.unit.train.families import TINY
from tests.unit.train.training_kit import VOCAB, build_model

TEXT = TINY | {"vocab_size": VOCAB}
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SIGLIP, CLIP = VISION | {"model_type": "siglip_vision_model"}, VISION | {"model_type": "clip_vision_model"}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
PLACES = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}

COMPOSITES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT
        | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 290,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": CLIP,
        "image_token_index": 290,
        "tie_word_embeddings": False,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 290,
    },
    "qwen2_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        **PLACES,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN | {"patch_size": 14, "fullatt_block_indexes": [0]},
        **PLACES,
    },
    "qwen3_vl": {
        "text_config": TEXT | {"head_dim": 8, "rope_parameters": ROPE | {"mrope_interleaved": True}},
        "vision_config": QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **PLACES,
    },
    "qwen3_5": {
        "text_config": TEXT
        | {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "vision_config": QWEN | {"num_position_embeddings": 16},
        "image_token_id": 290,
    },
    "llama4": {
        "text_config": TEXT
        | {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": [0, 1]},
        "vision_config": VISION
        | {"intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": 290,
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION,
        "image_token_id": 290,
    },
    "aya_vision": {
        "text_config": TEXT | {"model_type": "cohere2"},
        "vision_config": SIGLIP,
        "image_token_index": 290,
    },
    "glm4v": {
        "text_config": TEXT
        | {"head_dim": 8, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1]}},
        "vision_config": QWEN | {"image_size": 28},
        "image_token_id": 290,
    },
}
PALIGEMMA: dict[str, Any] = {
    "text_config": TEXT | {"model_type": "gemma", "head_dim": 8},
    "vision_config": SIGLIP | {"projection_dim": 32},
    "projection_dim": 32,
    "image_token_index": 290,
}
"""Whose prompts are attended to both ways."""


def composite(name: str, sizes: dict[str, Any] | None = None) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(COMPOSITES[name] if sizes is None else sizes))
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def save_composite(name: str, directory: Path, sizes: dict[str, Any] | None = None) -> Path:
    """With a tokenizer and the settings of an image processor."""
    build_model(directory)
    composite(name, sizes).save_pretrained(directory)
    for file in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        (directory / file).write_text('{"do_resize": true}')
    return directory
