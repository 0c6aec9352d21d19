import json

import pytest
import torch

from dpo_service.errors import ModelNotFound
from dpo_service.planning.shape import FAMILIES, read_shape, shape_of
from tests.models import save_tiny_llama

SIZES = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
EXTRAS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "granite": {"attention_bias": True, "mlp_bias": True},
}


def meta_model(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_to_the_parameter(family, tied):
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **SIZES, **EXTRAS.get(family, {}), tie_word_embeddings=tied)
    shape = shape_of(config.to_dict(), "m")
    assert shape.parameters == meta_model(config).num_parameters()


def test_adapters_are_counted_as_peft_makes_them():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", **SIZES)
    for targets in (None, ("q_proj", "v_proj")):
        made = get_peft_model(
            meta_model(config),
            LoraConfig(r=4, target_modules=list(targets or ()) or "all-linear", task_type="CAUSAL_LM"),
        )
        trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
        assert shape_of(config.to_dict(), "m").lora_parameters(4, targets) == trained


def test_the_weight_files_count_an_unknown_family(tmp_path):
    directory = save_tiny_llama(tmp_path / "m")
    known = read_shape(directory, "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "somebody_elses"}))
    assert read_shape(directory, "m").counted == known.parameters


def test_a_config_without_sizes_is_refused():
    with pytest.raises(ModelNotFound, match="hidden_size"):
        shape_of({"model_type": "llama"}, "m")
