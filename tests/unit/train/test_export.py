"""What a checkpoint's model/ holds loads elsewhere and says what was trained."""

from __future__ import annotations

import json

import pytest
import torch

from dpo_service.checkpoint.load import newest_valid
from dpo_service.errors import TrainingError
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.policy import load_model
from dpo_service.train.saving import load_policy
from tests.unit.train.training_kit import build_model, make_job


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_model_directory_is_whole(tmp_path, tied, precision):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = build_model(tmp_path / "base", tied=tied)
    job = make_job(tmp_path / "job", base, reference="live", precision=precision)
    job.train()
    checkpoint = newest_valid(job.store, "j")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.model)
    prompt = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(prompt, tokenize=False) == "<|user|>abc<|end|>"
    config = json.loads((checkpoint.model / "config.json").read_text())
    assert config["dtype"] == precision
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (checkpoint.model / "generation_config.json").is_file()
    exported = AutoModelForCausalLM.from_pretrained(checkpoint.model, dtype=torch.float32)
    trained = load_policy(job.run, base, checkpoint, torch.device("cpu"))
    assert (logits(exported) - logits(trained)).abs().max() <= (0 if precision == "float32" else 0.1)
    assert not torch.allclose(logits(exported), logits(load_model(base)), atol=1e-3)
    masters = checkpoint.state / "weights.safetensors"
    assert masters.exists() == (precision == "bfloat16")


def test_lora_exports_merged_model_and_adapter(tmp_path, model_dir):
    from peft import PeftModel

    job = make_job(tmp_path, model_dir, reference="live", lora=LoraSpec(rank=4), learning_rate=1e-2)
    job.train()
    checkpoint = newest_valid(job.store, "j")
    merged = load_model(checkpoint.model)
    adapted = PeftModel.from_pretrained(load_model(model_dir), str(checkpoint.adapter)).eval()
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-4)
    assert not torch.allclose(logits(merged), logits(load_model(model_dir)), atol=1e-2)
    adapter = json.loads((checkpoint.adapter / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "tiny"
    assert "lm_head" not in adapter["target_modules"]
    assert not (checkpoint.state / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "d_model": 8}, "no causal language model"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "code that a model brings is never run"),
        ({"model_type": "never heard of"}, "not one of transformers' own"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_what_it_is(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(TrainingError, match=message):
        load_model(tmp_path)
