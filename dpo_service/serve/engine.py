"""vLLM's settings for a device. Plain arithmetic on the model's config.json; vLLM itself is imported nowhere here.

On a CPU the aim is a quick start and a small footprint beside a running training job: no compilation, no worker process
of its own, a key-value cache of the size that a few conversations need. On GPUs vLLM's own defaults are good.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dpo_service.specs.serve import EngineSpec, ServeSpec

CPUS_OF_A_REPLICA = 0
"""What a replica books on a cluster without GPUs. Ray's CPUs are tickets, not cores: a served model idles most of the
time, and on a laptop with two cores any part of a ticket would leave training with two workers waiting for ever."""

CACHE_MIN_BYTES = 64 << 20
CACHE_MAX_BYTES = 1 << 30
CACHE_SEQUENCES = 4
"""Sequences of full length the CPU's key-value cache holds; shorter ones fit in larger numbers."""
CACHE_DEFAULT_BYTES = 256 << 20
"""For a model whose config.json does not say what a token costs."""
BLOCK = 128
"""Tokens of a cache block on the CPU."""
BYTES_OF = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


def environment(gpus: int) -> dict[str, str]:
    """Environment of a replica's process; vLLM and OpenMP read it when they are imported."""
    common = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if gpus:
        return common
    threads = str(max(1, min(8, (os.cpu_count() or 2) // 2)))
    return common | {
        # In process and uncompiled: 2 s to load instead of 17-26, no second process to watch and to clean up.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
        # Half of the cores, so that training beside it keeps the others.
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def actor_options(engine: EngineSpec) -> dict[str, Any]:
    """Ray's options for a replica."""
    resources = {"num_cpus": 1, "num_gpus": engine.gpus} if engine.gpus else {"num_cpus": CPUS_OF_A_REPLICA}
    return {**resources, "runtime_env": {"env_vars": environment(engine.gpus)}}


def engine_options(spec: ServeSpec, model_dir: Path) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs for `spec`, whose model lies in `model_dir`."""
    options: dict[str, Any] = {
        "model": str(model_dir),
        "served_model_name": [spec.model_id],
        "dtype": spec.engine.dtype,
        "max_model_len": spec.engine.max_model_len,
        "max_num_seqs": spec.engine.max_num_seqs,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "disable_log_stats": True,
    }
    if spec.engine.gpus:
        return options | {"tensor_parallel_size": spec.engine.gpus}
    config = read_config(model_dir)
    dtype = spec.engine.dtype if spec.engine.dtype != "auto" else own_dtype(config)
    return options | {
        # -1: the model's own length, or as much of it as the cache holds.
        "max_model_len": spec.engine.max_model_len or -1,
        "dtype": dtype,
        "enforce_eager": True,
        "kv_cache_memory_bytes": cache_bytes(config, dtype, spec.engine.max_model_len),
    }


def read_config(model_dir: Path) -> dict[str, Any]:
    """The part of config.json that describes the language model."""
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    text: dict[str, Any] = config.get("text_config") or {}
    return config | text


def own_dtype(config: dict[str, Any]) -> str:
    """The precision the weights were saved in. vLLM's "auto" rounds float32 to bfloat16: on a CPU that is slower, and
    the answers would not be those of the weights that were trained."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "auto").removeprefix("torch.")
    return dtype if dtype in BYTES_OF else "auto"


def cache_bytes(config: dict[str, Any], dtype: str, max_model_len: int | None) -> int:
    """Size of the key-value cache: a few sequences of full length within bounds, but always one of `max_model_len`."""
    token = token_bytes(config, dtype)
    if token is None:
        return CACHE_DEFAULT_BYTES
    length = max_model_len or int(config.get("max_position_embeddings") or 4096)
    # One block is vLLM's own, and a sequence may end in a block begun for one token.
    sequence = (length + 2 * BLOCK) * token
    wanted = max(CACHE_MIN_BYTES, min(CACHE_MAX_BYTES, CACHE_SEQUENCES * sequence))
    return max(wanted, sequence) if max_model_len else wanted


def token_bytes(config: dict[str, Any], dtype: str) -> int | None:
    """Bytes one token takes in the cache: keys and values of every layer; None = the config does not say."""
    heads, layers = config.get("num_attention_heads"), config.get("num_hidden_layers")
    hidden = config.get("hidden_size")
    if not (isinstance(heads, int) and isinstance(layers, int) and isinstance(hidden, int)):
        return None
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    return 2 * layers * int(kv_heads) * int(head_dim) * BYTES_OF.get(dtype, 2)
