"""vLLM's settings for a sampler. Plain arithmetic; vLLM itself is imported nowhere here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_service.serve import engine as serving
from dpo_service.specs.sampling import LORA_RANKS, SamplerSpec

FILE_BACKEND = "dpo_file"
EXTENSION = "dpo_service.online.file_transfer.Registered"
CLAIMED = 0.01
"""Of a shared device's memory, at the start; its cache is given in bytes, and then vLLM asks for nothing else by it."""


def environment(spec: SamplerSpec) -> dict[str, str]:
    """Environment of a sampler's process."""
    if not spec.gpus:
        return serving.environment(0) | {"OMP_NUM_THREADS": str(spec.cpus)}
    # Handles of device memory (never the weights themselves) reach the engine's process pickled, over a local socket.
    handles = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if spec.sync == "ipc" else {}
    return serving.environment(spec.gpus) | handles


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
    return options | _weights(spec) | (_on_gpus(spec, model_dir) if spec.gpus else _on_cpu(spec, model_dir))


def _weights(spec: SamplerSpec) -> dict[str, Any]:
    """How new weights come: an adapter beside the base, or the whole in its place."""
    if spec.lora_rank is not None:
        # Two in memory: the old one goes when the new one is there.
        rank = next(rank for rank in LORA_RANKS if rank >= spec.lora_rank)
        return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": rank}
    if spec.sync == "file":
        return {"weight_transfer_config": {"backend": FILE_BACKEND}, "worker_extension_cls": EXTENSION}
    return {"weight_transfer_config": {"backend": spec.sync}}


def _on_gpus(spec: SamplerSpec, model_dir: Path) -> dict[str, Any]:
    options: dict[str, Any] = {
        "tensor_parallel_size": spec.gpus,
        "enable_sleep_mode": spec.shares_device,
        # Named, because in an actor of a placement group vLLM would ask Ray for workers of its own.
        "distributed_executor_backend": "mp" if spec.gpus > 1 else "uni",
    }
    if spec.kv_cache_bytes is not None:
        options["kv_cache_memory_bytes"] = spec.kv_cache_bytes
    if spec.max_model_len is not None:
        options["max_model_len"] = spec.max_model_len
    return options | (_beside_a_trainer(spec, model_dir) if spec.shares_device else {})


def _beside_a_trainer(spec: SamplerSpec, model_dir: Path) -> dict[str, Any]:
    """On a device whose memory is another's too, vLLM must neither claim a share of all of it, which is not free, nor
    give to its cache what is free before the optimizer's state is there."""
    cache = spec.kv_cache_bytes or wanted_cache_bytes(spec, model_dir)
    return {"gpu_memory_utilization": CLAIMED, "kv_cache_memory_bytes": cache}


def _on_cpu(spec: SamplerSpec, model_dir: Path) -> dict[str, Any]:
    return {
        # -1: the model's own length, or as much of it as the cache holds.
        "max_model_len": spec.max_model_len or -1,
        "enforce_eager": True,
        "kv_cache_memory_bytes": spec.kv_cache_bytes or cache_bytes(spec, model_dir),
    }


def cache_bytes(spec: SamplerSpec, model_dir: Path) -> int:
    """Room for `max_num_seqs` sequences of full length, within bounds, but always for one of `max_model_len`."""
    wanted = wanted_cache_bytes(spec, model_dir)
    bounded = max(serving.CACHE_MIN_BYTES, min(serving.CACHE_MAX_BYTES, wanted))
    return max(bounded, wanted // spec.max_num_seqs) if spec.max_model_len else bounded


def wanted_cache_bytes(spec: SamplerSpec, model_dir: Path) -> int:
    """Room for `max_num_seqs` sequences of full length."""
    config = serving.read_config(model_dir)
    token = serving.token_bytes(config, spec.dtype)
    if token is None:
        return serving.CACHE_DEFAULT_BYTES
    length = spec.max_model_len or int(config.get("max_position_embeddings") or 4096)
    # One block is vLLM's own, and a sequence may end in a block begun for one token.
    return spec.max_num_seqs * (length + 2 * serving.BLOCK) * token
