"""A reward model in vLLM as a Ray actor: a process of its own, restarted when it dies, placed where the job says.

    RewardModelJudge ──> RayScorer ── again, three times ──> RewardActor (its process) ──> VllmScorer ──> vLLM

What a dead process was asked is asked again of the restarted one, and where that fails too the answers have no score.
Nothing outlives the job: the actor is that of whoever asks, and `close` ends it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dpo_service.errors import DpoServiceError, JudgeCallFailed, JudgeError
from dpo_service.online.judges.resilience import Retry, Timeout
from dpo_service.online.judges.reward_model import Ids
from dpo_service.online.judges.reward_vllm import LOST, VllmScorer, environment
from dpo_service.specs.judge import JudgeSpec, RewardModelJudgeSpec

ATTEMPTS = 3
SECONDS = 600.0
"""Of one attempt; the first one waits for the model to be loaded."""
MAX_RESTARTS = 3
CALLS_AT_ONCE = 256
CLOSING_S = 10.0
DIED = 1
"""Exit status of a process whose engine died."""


class RewardActor:
    """The process of a reward model."""

    async def __init__(self, spec: str, model_dir: str) -> None:  # type: ignore[misc]  # Ray awaits it
        """`spec` is a RewardModelJudgeSpec as JSON. Ray calls it again with the same when it restarts the actor."""
        from dpo_service.serve import scratch
        from dpo_service.telemetry import log

        scratch.use_own()
        log.quiet()
        self._scorer = await VllmScorer.start(RewardModelJudgeSpec.model_validate_json(spec), Path(model_dir))

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    async def ready(self) -> None:
        """Asked of an actor that is being restarted, it waits for it."""

    async def scores(self, sequences: Sequence[Ids]) -> list[float]:
        try:
            return await self._scorer.scores(sequences)
        except JudgeCallFailed:
            os._exit(DIED)  # Ray starts it again, with another engine

    async def close(self) -> None:
        from dpo_service.serve import scratch

        await self._scorer.close()
        scratch.remove_own()


class RayScorer:
    """A Scorer whose engine is in an actor."""

    def __init__(self, handle: Any, model: str, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """`model` is what the job calls it."""
        self.handle = handle
        self._model = model
        self._asked = Retry(Timeout(self._ask, SECONDS), ATTEMPTS, sleep)

    async def scores(self, sequences: Sequence[Ids]) -> list[float]:
        return await self._asked(sequences)

    async def _ask(self, sequences: Sequence[Ids]) -> list[float]:
        try:
            await self.handle.ready.remote()
            scores: list[float] = await self.handle.scores.remote(sequences)
        except RayActorError as error:
            raise self._lost(error) from error
        except RayTaskError as error:
            if isinstance(error.cause, DpoServiceError):
                raise error.cause from error
            raise JudgeError(f"the reward model failed: {error.cause!r}") from error
        return scores

    def _lost(self, error: RayActorError) -> JudgeError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if error.actor_init_failed:
            return JudgeError(
                f"vLLM cannot load the reward model {self._model!r} ({lines[-1]}); set judge.engine to transformers"
            )
        return JudgeCallFailed(f"the reward model's process has died: {lines[0]}", reason=LOST, passing=True)

    async def close(self) -> None:
        """End the actor, whatever it does, so that Ray does not restart it."""
        try:
            async with asyncio.timeout(CLOSING_S):
                await self.handle.close.remote()
        except (TimeoutError, RayActorError, RayTaskError):
            pass
        ray.kill(self.handle, no_restart=True)


def start_scorer(spec: RewardModelJudgeSpec, model_dir: Path, placement: Any = None, bundle: int = -1) -> RayScorer:
    """A reward model in an actor, placed in `bundle` of the placement group `placement`; without one Ray chooses.
    Returns before it has loaded: the first scores wait for it."""
    strategy = PlacementGroupSchedulingStrategy(placement, bundle) if placement is not None else "DEFAULT"
    options = {
        "num_cpus": spec.cpus,
        "num_gpus": spec.gpus,
        "max_restarts": MAX_RESTARTS,
        "max_concurrency": CALLS_AT_ONCE,
        "scheduling_strategy": strategy,
        "runtime_env": {"env_vars": environment(spec)},
    }
    handle = ray.remote(**options)(RewardActor).remote(spec.model_dump_json(), str(model_dir))
    return RayScorer(handle, spec.model)


def bundles(judge: JudgeSpec | None) -> list[dict[str, float]]:
    """What the judge's process takes, as a bundle of a placement group; none where it has no process of its own."""
    if not isinstance(judge, RewardModelJudgeSpec) or judge.engine != "vllm":
        return []
    gpus = {"GPU": float(judge.gpus)} if judge.gpus else {}
    return [{"CPU": float(judge.cpus), **gpus}]
