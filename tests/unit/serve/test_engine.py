"""vLLM's settings for a device: arithmetic on config.json."""

import json

import pytest

from dpo_service.serve import engine
from dpo_service.specs.serve import EngineSpec, ServeSpec

LLAMA = {
    "dtype": "float32",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def options(tmp_path, config=LLAMA, **settings):
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = ServeSpec(
        deployment_id="dep-1", model_id="m", model_path=str(tmp_path), engine=EngineSpec.model_validate(settings)
    )
    return engine.engine_options(spec, tmp_path)


def test_a_token_costs_its_keys_and_values_in_every_layer():
    # 2 (k and v) x 2 layers x 2 heads x 16 wide x 4 bytes
    assert engine.token_bytes(LLAMA, "float32") == 512
    assert engine.token_bytes(LLAMA | {"head_dim": 32}, "bfloat16") == 512
    assert engine.token_bytes({"hidden_size": 64}, "float32") is None


def test_the_cache_holds_a_few_sequences_within_bounds():
    assert engine.cache_bytes(LLAMA, "float32", None) == engine.CACHE_MIN_BYTES
    big = LLAMA | {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert engine.cache_bytes(big | {"max_position_embeddings": 131072}, "bfloat16", None) == engine.CACHE_MAX_BYTES
    middle = engine.cache_bytes(big | {"max_position_embeddings": 512}, "bfloat16", None)
    assert middle == engine.CACHE_SEQUENCES * (512 + 2 * engine.BLOCK) * 2 * 32 * 8 * 128 * 2


def test_a_length_that_was_asked_for_always_fits():
    big = LLAMA | {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    token = engine.token_bytes(big, "float32")
    assert engine.cache_bytes(big, "float32", 8192) > 8192 * token > engine.CACHE_MAX_BYTES


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "auto"),
        ({}, "auto"),
    ],
)
def test_on_a_cpu_the_weights_keep_their_precision(tmp_path, config, dtype):
    rest = {name: value for name, value in LLAMA.items() if name != "dtype"}
    assert options(tmp_path, rest | config)["dtype"] == dtype


def test_on_a_cpu_the_engine_is_small_and_starts_quickly(tmp_path):
    made = options(tmp_path)
    assert made["served_model_name"] == ["m"]
    assert made["enforce_eager"]
    assert made["kv_cache_memory_bytes"] == engine.CACHE_MIN_BYTES
    assert made["max_model_len"] == -1
    assert options(tmp_path, max_model_len=128)["max_model_len"] == 128


def test_on_gpus_vllms_own_defaults_hold(tmp_path):
    made = options(tmp_path, gpus=2)
    assert made["tensor_parallel_size"] == 2
    assert not made.keys() & {"enforce_eager", "kv_cache_memory_bytes"}
    assert made["dtype"] == "auto"
    assert made["max_model_len"] is None


def test_remote_code_is_never_run_and_weights_are_data(tmp_path):
    for gpus in (0, 1):
        made = options(tmp_path, gpus=gpus)
        assert made["trust_remote_code"] is False
        assert made["load_format"] == "safetensors"


def test_a_replica_books_no_cpu_that_training_needs_or_whole_gpus():
    cpu, gpu = engine.actor_options(EngineSpec()), engine.actor_options(EngineSpec(gpus=2))
    assert cpu["num_cpus"] == 0
    assert "num_gpus" not in cpu
    assert gpu["num_gpus"] == 2
    assert "TORCHDYNAMO_DISABLE" not in gpu["runtime_env"]["env_vars"]


def test_nested_configs_are_read(tmp_path):
    outer = {"architectures": ["X"], "text_config": LLAMA}
    assert options(tmp_path, outer)["kv_cache_memory_bytes"] == engine.CACHE_MIN_BYTES
    assert options(tmp_path, outer)["dtype"] == "float32"
