"""A replica's check of what it serves, with an engine that answers from a table. The real one is asked end to end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dpo_service.checkpoint.probe import Probe
from dpo_service.errors import PublishedModelDiffers, TrainingError
from dpo_service.serve.verify import verify

pytest.importorskip("vllm")
PROBE = Probe.model_validate(
    {
        "arithmetic": "float32",
        "sequences": [
            {"prompt": [5, 6], "answer": [7, 8], "logp": -3.0},
            {"prompt": [5], "answer": [9], "logp": -1.5},
        ],
    }
)


class Engine:
    """Gives every token the same log-probability; None = it cannot compute."""

    def __init__(self, logp, dtype="torch.float32", length=128):
        self.logp, self.asked = logp, []
        self.model_config = SimpleNamespace(dtype=dtype, max_model_len=length)

    async def generate(self, prompt, options, request_id):
        if self.logp is None:
            raise RuntimeError("outer") from ValueError("heads of 7 are not supported")
        ids = prompt["prompt_token_ids"]
        self.asked.append(ids)
        tokens = [None, *({token: SimpleNamespace(logprob=self.logp)} for token in ids[1:])]
        yield SimpleNamespace(prompt_logprobs=tokens if options.prompt_logprobs is not None else None)


async def test_the_trained_model_passes():
    engine = Engine(-1.5)
    await verify(engine, PROBE)
    assert engine.asked == [[5, 6, 7, 8], [5, 9]]


async def test_another_one_does_not():
    with pytest.raises(PublishedModelDiffers, match="the served model is not the model that was trained"):
        await verify(Engine(-1.51), PROBE)


async def test_in_half_precision_rounding_is_allowed():
    await verify(Engine(-1.51, dtype="torch.bfloat16"), PROBE)
    with pytest.raises(PublishedModelDiffers):
        await verify(Engine(-1.7, dtype="torch.bfloat16"), PROBE)


async def test_a_model_without_a_probe_makes_a_token():
    engine = Engine(-9.0)
    await verify(engine, None)
    assert engine.asked == [[0]]


@pytest.mark.parametrize(("length", "asked"), [(5, [[5, 6, 7, 8], [5, 9]]), (4, [[5, 9]]), (2, [[0]])])
async def test_a_short_context_is_asked_for_what_it_has_room_for(length, asked):
    engine = Engine(-1.5, length=length)
    await verify(engine, PROBE)
    assert engine.asked == asked


@pytest.mark.parametrize("probe", [PROBE, None])
async def test_an_engine_that_cannot_compute_says_why(probe):
    with pytest.raises(TrainingError, match="cannot run it: heads of 7 are not supported"):
        await verify(Engine(None), probe)
