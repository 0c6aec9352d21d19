"""vLLM's settings for a sampler, by device and by how its weights come."""

import json

import pytest
from pydantic import ValidationError

from dpo_service.online.engine import cache_bytes, engine_options, environment
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec


@pytest.fixture
def model_dir(tmp_path):
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_on_the_cpu_weights_come_by_a_mapped_file(model_dir):
    options = engine_options(SamplerSpec(), model_dir)
    assert options["weight_transfer_config"] == {"backend": "dpo_file"}
    assert options["enforce_eager"]
    assert options["enable_prefix_caching"]
    assert "enable_lora" not in options


def test_an_adapter_gets_the_next_rank_vllm_has_and_the_base_stays(model_dir):
    options = engine_options(SamplerSpec(lora_rank=20), model_dir)
    assert (options["enable_lora"], options["max_lora_rank"], options["max_cpu_loras"]) == (True, 32, 2)
    assert "weight_transfer_config" not in options


@pytest.mark.parametrize(("shares", "backend"), [(True, "ipc"), (False, "nccl")])
def test_on_gpus_the_transfer_follows_the_placement(model_dir, shares, backend):
    options = engine_options(SamplerSpec(gpus=1, shares_device=shares, dtype="bfloat16"), model_dir)
    assert options["weight_transfer_config"] == {"backend": backend}
    assert options["enable_sleep_mode"] is shares
    assert options["distributed_executor_backend"] == "uni", "no workers of Ray's"
    assert "enforce_eager" not in options


def test_the_cache_holds_all_answers_within_bounds(model_dir):
    token = 2 * 2 * 2 * 32 * 4
    assert cache_bytes(SamplerSpec(max_num_seqs=512), model_dir) == 512 * (512 + 256) * token
    assert cache_bytes(SamplerSpec(max_num_seqs=1), model_dir) == 64 << 20
    assert cache_bytes(SamplerSpec(max_num_seqs=4096), model_dir) == 1 << 30
    long = SamplerSpec(max_num_seqs=1, max_model_len=1 << 21)
    assert cache_bytes(long, model_dir) == ((1 << 21) + 256) * token
    assert engine_options(SamplerSpec(kv_cache_bytes=1 << 20), model_dir)["kv_cache_memory_bytes"] == 1 << 20


def test_beside_a_trainer_the_cache_is_what_the_answers_need_and_nothing_is_claimed(model_dir):
    shared = SamplerSpec(gpus=1, shares_device=True, dtype="bfloat16", max_num_seqs=4096)
    options = engine_options(shared, model_dir)
    assert options["kv_cache_memory_bytes"] == 4096 * (512 + 256) * 2 * 2 * 2 * 32 * 2
    assert options["gpu_memory_utilization"] == 0.01
    assert "gpu_memory_utilization" not in engine_options(SamplerSpec(gpus=2), model_dir)
    assert engine_options(SamplerSpec(gpus=2), model_dir)["distributed_executor_backend"] == "mp"
    assert environment(shared)["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1", "IPC handles are Python objects"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment(SamplerSpec(gpus=1))


def test_an_adapter_is_a_file_on_gpus_too(model_dir):
    for shares in (True, False):
        spec = SamplerSpec(gpus=1, shares_device=shares, lora_rank=8)
        assert spec.sync == "file"
        assert "weight_transfer_config" not in engine_options(spec, model_dir)


def test_a_samplers_threads_are_what_it_books():
    assert environment(SamplerSpec(cpus=3))["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in environment(SamplerSpec(gpus=1))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="shares_device is for a GPU"):
        SamplerSpec(shares_device=True)
    for wrong in ({"n": 0}, {"temperature": 0}):
        with pytest.raises(ValidationError):
            SamplingSpec(**wrong)
