"""A reward model computed by vLLM: its pooling runner, which gives a classifier's raw output for token ids.

On the CPU the engine's core is on a thread of this process (`serve/inprocess.py`); on GPUs it is vLLM's own process.
Answers to one prompt share their beginning, which is computed once where the attention is causal (prefix caching).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self

from dpo_service.errors import JudgeCallFailed, JudgeError
from dpo_service.online.judges.reward_model import Ids, longest
from dpo_service.online.together import all_of
from dpo_service.serve import engine as serving
from dpo_service.serve import inprocess
from dpo_service.specs.judge import RewardModelJudgeSpec

AT_ONCE = 64
"""Sequences of one forward pass, at most."""
LOST = "engine_lost"


def environment(spec: RewardModelJudgeSpec) -> dict[str, str]:
    """Environment of the engine's process."""
    threads = {} if spec.gpus else {"OMP_NUM_THREADS": str(spec.cpus)}
    return serving.environment(spec.gpus) | threads


def engine_options(spec: RewardModelJudgeSpec, model_dir: Path) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs."""
    length = longest(model_dir, spec)
    tokens = max(spec.batch_tokens, length)
    options: dict[str, Any] = {
        "model": str(model_dir),
        "runner": "pooling",
        "convert": "classify",
        "dtype": spec.precision,
        "max_model_len": length,
        "max_num_batched_tokens": tokens,
        "max_num_seqs": min(AT_ONCE, tokens),
        "trust_remote_code": False,
        "load_format": "safetensors",
        "disable_log_stats": True,
    }
    if spec.gpus:
        return options | {"tensor_parallel_size": spec.gpus}
    cache = serving.cache_bytes(serving.read_config(model_dir), spec.precision, length)
    return options | {"enforce_eager": True, "kv_cache_memory_bytes": cache}


class VllmScorer:
    """A Scorer. Made by `start`, in the event loop that uses it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._names = count()

    @classmethod
    async def start(cls, spec: RewardModelJudgeSpec, model_dir: Path) -> Self:
        options = engine_options(spec, model_dir)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**options)
        return cls(AsyncLLM.from_engine_args(arguments) if spec.gpus else inprocess.async_llm(arguments))

    async def scores(self, sequences: Sequence[Ids]) -> list[float]:
        return await all_of(self._score(ids) for ids in sequences)

    async def _score(self, ids: Ids) -> float:
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        # Without its activation, which is a sigmoid: a reward is the model's own output.
        raw = PoolingParams(task="classify", use_activation=False)
        try:
            asked = self._engine.encode(TokensPrompt(prompt_token_ids=ids), raw, f"{next(self._names)}")
            return float([output async for output in asked][-1].outputs.data.item())
        except (EngineDeadError, EngineGenerateError) as error:  # the latter where this was under way when it died
            raise JudgeCallFailed(f"the reward model's engine died: {error}", reason=LOST, passing=True) from error
        except Exception as error:
            raise JudgeError(f"vLLM cannot score this answer: {error}") from error

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.shutdown)
