"""Before it answers anyone, a replica computes the probe of the checkpoint that it serves, and one token.

An engine that cannot run the model, or runs another one than was trained, never gets a request.
"""

from __future__ import annotations

import asyncio
from typing import Any

from dpo_service.checkpoint.probe import Probe, require_same
from dpo_service.errors import TrainingError

HALVES = ("bfloat16", "float16")


async def verify(engine: Any, probe: Probe | None) -> None:
    """Have vLLM's `engine` (an AsyncLLM) make a token, and compare its log-probabilities with those of `probe`, where
    its context is long enough for them.

    Raises:
        TrainingError: it cannot run the model; the sentence says why.
        PublishedModelDiffers: it gives other log-probabilities than the policy had.
    """
    probe = None if probe is None else probe.within(engine.model_config.max_model_len)
    sequences = [] if probe is None else [([*s.prompt, *s.answer], len(s.answer)) for s in probe.sequences]
    try:
        logps = await asyncio.gather(*(_logp(engine, ids, length) for ids, length in sequences or [([0], 0)]))
    except Exception as error:
        raise TrainingError(f"vLLM loads this model but cannot run it: {_root_cause(error)}") from error
    if probe is not None:
        half = str(engine.model_config.dtype).removeprefix("torch.") in HALVES
        require_same(probe, logps, "the served model", arithmetic="half" if half else "float32")


async def _logp(engine: Any, ids: list[int], answer: int) -> float:
    """Sum of the log-probabilities of the last `answer` of `ids`, each after those before it."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    options = SamplingParams(max_tokens=1, prompt_logprobs=0 if answer else None)
    request = f"verify-{hash(tuple(ids))}"
    tokens = None
    async for output in engine.generate(TokensPrompt(prompt_token_ids=ids), options, request_id=request):
        tokens = output.prompt_logprobs or tokens
    if tokens is None:
        return 0.0
    return sum(float(tokens[place][ids[place]].logprob) for place in range(len(ids) - answer, len(ids)))


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
