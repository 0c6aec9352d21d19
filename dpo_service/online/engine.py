"""vLLM's settings for a sampler. Plain arithmetic; vLLM itself is imported nowhere here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_service.serve import engine as serving
from dpo_service.specs.sampling import LORA_RANKS, SamplerSpec

FILE_BACKEND = "dpo_file"
EXTENSION = "dpo_service.online.file_transfer.Registered"


def environment(spec: SamplerSpec) -> dict[str, str]:
    """Environment of a sampler's process."""
    threads = {} if spec.gpus else {"OMP_NUM_THREADS": str(spec.cpus)}
    return serving.environment(spec.gpus) | threads


def engine_options(spec: SamplerSpec, model_dir: Path) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs."""
    options: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": spec.dtype,
        "max_num_seqs": spec.max_num_seqs,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "disable_log_stats": True,
        "enable_prefix_caching": True,
    }
    return options | _weights(spec) | (_on_gpus(spec) if spec.gpus else _on_cpu(spec, model_dir))


def _weights(spec: SamplerSpec) -> dict[str, Any]:
    """How new weights come: an adapter beside the base, or the whole in its place."""
    if spec.lora_rank is not None:
        # Two in memory: the old one goes when the new one is there.
        rank = next(rank for rank in LORA_RANKS if rank >= spec.lora_rank)
        return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": rank}
    if spec.sync == "file":
        return {"weight_transfer_config": {"backend": FILE_BACKEND}, "worker_extension_cls": EXTENSION}
    return {"weight_transfer_config": {"backend": spec.sync}}


def _on_gpus(spec: SamplerSpec) -> dict[str, Any]:
    options: dict[str, Any] = {"tensor_parallel_size": spec.gpus, "enable_sleep_mode": spec.shares_device}
    if spec.kv_cache_bytes is not None:
        options["kv_cache_memory_bytes"] = spec.kv_cache_bytes
    if spec.max_model_len is not None:
        options["max_model_len"] = spec.max_model_len
    return options


def _on_cpu(spec: SamplerSpec, model_dir: Path) -> dict[str, Any]:
    return {
        # -1: the model's own length, or as much of it as the cache holds.
        "max_model_len": spec.max_model_len or -1,
        "enforce_eager": True,
        "kv_cache_memory_bytes": spec.kv_cache_bytes or cache_bytes(spec, model_dir),
    }


def cache_bytes(spec: SamplerSpec, model_dir: Path) -> int:
    """Room for `max_num_seqs` sequences of full length, within bounds, but always for one of `max_model_len`."""
    config = serving.read_config(model_dir)
    token = serving.token_bytes(config, spec.dtype)
    if token is None:
        return serving.CACHE_DEFAULT_BYTES
    length = spec.max_model_len or int(config.get("max_position_embeddings") or 4096)
    # One block is vLLM's own, and a sequence may end in a block begun for one token.
    sequence = (length + 2 * serving.BLOCK) * token
    wanted = max(serving.CACHE_MIN_BYTES, min(serving.CACHE_MAX_BYTES, spec.max_num_seqs * sequence))
    return max(wanted, sequence) if spec.max_model_len else wanted
