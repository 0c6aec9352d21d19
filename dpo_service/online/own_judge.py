"""The policy as a language model to ask, for a policy that judges its own answers."""

from __future__ import annotations

import hashlib

from dpo_service.errors import InvalidData, JudgeError
from dpo_service.online.judges.chat import ChatRequest, Complete, Completion
from dpo_service.online.judges.port import Usage
from dpo_service.online.port import SamplePrompt, Sampler, seed_of
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.sampling import SamplingSpec

LEAST_TEMPERATURE = 1e-3
"""What 0 is sampled at: engines of ours sample, and at this the likeliest token is all there is."""
DEFAULT_TEMPERATURE = 1.0


def ask_policy(sampler: Sampler, tokenizer: Tokenizer, seed: int) -> Complete:
    """Replies sampled from the policy as it is now. Their seeds are functions of `seed`, the messages and which sample
    it is, so that a run that is resumed hears what the unbroken one would have.

    Asked of a model without a chat template, it raises JudgeError.
    """

    async def complete(request: ChatRequest) -> Completion:
        messages = [{"role": said.role, "content": said.content} for said in request.messages]
        ids = tokenizer.encode(_rendered(tokenizer, messages), add_special_tokens=False)
        temperature = DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
        options = SamplingSpec(n=1, temperature=max(temperature, LEAST_TEMPERATURE), max_tokens=request.max_tokens)
        prompt = SamplePrompt(tuple(ids), seed_of(seed, _number(ids), 1 + request.sample))
        ((reply,),) = await sampler.sample([prompt], options)
        usage = Usage(1, len(ids), len(reply.token_ids))
        return Completion(tokenizer.decode(reply.token_ids, special_tokens=False), usage)

    return complete


def _number(ids: list[int]) -> int:
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:6])


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    try:
        return tokenizer.render(messages, add_generation_prompt=True, line=0)
    except InvalidData as error:
        raise JudgeError(f"the policy cannot be asked: {error.message}") from error
