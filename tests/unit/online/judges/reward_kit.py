"""Random reward models, and what they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_service.online.judges.build import RewardModelFiles, Surroundings, build_judge
from dpo_service.online.judges.metrics import Counted
from dpo_service.online.judges.port import Answer, JudgeRequest
from dpo_service.specs.judge import RewardModelJudgeSpec
from tests.models import save_tokenizer

TEXTS = ("the red cat", "a boat", "blue or green, it may be so", "1234567890 " * 6, "hello world")
CONVERSATION = ({"role": "user", "content": "Which colour?"},)
SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 256, "num_labels": 1}
CAUSAL = {"num_key_value_heads": 1, "head_dim": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
"""Its padding token is the one that ends every message, as many published reward models have it."""


def save_reward_model(directory: Path, architecture: str = "LlamaForSequenceClassification", **own: Any) -> Path:
    """A random decoder of two layers with one output; `own` are fields of its configuration."""
    import torch
    import transformers

    save_tokenizer(directory)
    torch.manual_seed(1)
    model = getattr(transformers, architecture)
    model(model.config_class(**SIZES | HEADS | CAUSAL | own)).save_pretrained(directory)
    return directory


def judge(directory: Path, digest: str = "d", cache_file: Path | None = None, **fields: Any) -> Counted:
    placed = {name: fields.pop(name) for name in ("placement", "bundle") if name in fields}
    spec = RewardModelJudgeSpec(model="rm", **fields)
    return build_judge(spec, Surroundings(cache_file, reward_model=RewardModelFiles(directory, digest, **placed))).judge


def request(prompt: Any, texts: Any = TEXTS) -> JudgeRequest:
    return JudgeRequest(prompt, tuple(map(Answer, texts)))
