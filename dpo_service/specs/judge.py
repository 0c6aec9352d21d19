"""What judges the answers that the policy samples: rules, a language model, the policy itself, a reward model."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dpo_service.specs.base import Spec
from dpo_service.specs.verifiers import Registered, RuleSpec, installed_verifiers

VLLM_REWARD_MODELS = tuple(
    f"{family}ForSequenceClassification" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2")
)
"""Those that vLLM scores as transformers does; a test holds it to each."""
VLLM_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM computes on a CPU."""

Samples = Annotated[int, Field(ge=1, le=64)]
Temperature = Annotated[float, Field(ge=0, le=2)]


class PriceSpec(Spec):
    """What a million tokens cost, in any one currency."""

    prompt: Annotated[float, Field(ge=0)]
    completion: Annotated[float, Field(ge=0)]


class LimitsSpec(Spec):
    """How long to wait for an endpoint, how often to ask again, and when to leave it alone for a while."""

    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Of one call, without the wait for a free place among `concurrency`."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 5
    """Calls in all, where one fails in a way that passes (429, 5xx, no connection, a timeout)."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16
    breaker_failures: Annotated[int, Field(ge=1)] = 10
    """After so many failures in a row nothing is asked for `breaker_seconds`, and then one call first."""
    breaker_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0


class EndpointSpec(Spec):
    """An endpoint that speaks OpenAI's chat completions: OpenAI's own, vLLM's, this service's."""

    base_url: Annotated[str, Field(max_length=2048)]
    """With its version, as `https://api.openai.com/v1`; `/chat/completions` is added."""
    model: Annotated[str, Field(min_length=1, max_length=300)]
    api_key_env: Annotated[str, Field(pattern=r"^DPO_JUDGE_[A-Z0-9_]+$")] | None = None
    """The environment variable that holds the key, on the machines that run the job. The prefix keeps a job from
    sending other secrets of the service to an address it chose."""
    structured: Literal["json_schema", "json_object", "text"] = "json_schema"
    """How far the endpoint can be held to JSON. Replies are read with the same tolerance in each case."""
    temperature: Temperature | None = 0.0
    """None = the endpoint's own; some models take no other."""
    max_tokens: Annotated[int, Field(ge=1, le=131072)] = 1024
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The field of the request that says so; OpenAI's reasoning models know the second only."""
    limits: LimitsSpec = LimitsSpec()
    price: PriceSpec | None = None
    spend_cap: Annotated[float, Field(gt=0)] | None = None
    """The job ends when its judge has cost as much; calls under way are still paid for."""

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is no base address; write it like https://api.openai.com/v1")
        if parts.port == 0:  # reading it refuses what is no port
            raise ValueError(f"{url!r} names the port 0; give the port that the endpoint listens on")
        if parts.username is not None or parts.password is not None:
            raise ValueError("the address holds a user or password; name a variable in api_key_env instead")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _cap_has_a_price(self) -> Self:
        if self.spend_cap is not None and (self.price is None or not self.price.prompt + self.price.completion):
            raise ValueError("spend_cap needs the price of a million tokens; set price.prompt and price.completion")
        return self


class RulesJudgeSpec(Spec):
    """Rules and verifiers, their scores' weighted mean: 0 to 1."""

    kind: Literal["rules"] = "rules"
    rules: Annotated[tuple[RuleSpec, ...], Field(min_length=1, max_length=32)]

    def unregistered(self) -> tuple[str, ...]:
        """The verifiers it names that no package of this machine registers."""
        named = [rule.name for rule in self.rules if isinstance(rule, Registered)]
        return tuple(sorted(set(named) - installed_verifiers()))


class _Asked(Spec):
    endpoint: EndpointSpec
    rubric: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None
    """What makes an answer good; None = the service's own rubric of helpfulness, truth and clarity."""
    show_reference: bool = False
    """Show the judge the row's reference answer, where it has one."""
    cache: bool = True
    """A verdict on the same answers is not asked for twice."""


class PairwiseJudgeSpec(_Asked):
    """A language model that says which of two answers is better, asked in both orders; every pair of the answers."""

    kind: Literal["pairwise"] = "pairwise"


class ScoringJudgeSpec(_Asked):
    """A language model that scores each answer from 1 to 10, or ranks all of a prompt's answers at once."""

    kind: Literal["scoring"] = "scoring"
    mode: Literal["score", "ranking"] = "score"
    samples: Samples = 1
    """Asked so often: the median of the scores, the mean of the ranks. Rankings show the answers in turned order."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.mode == "score" and self.samples > 1 and self.endpoint.temperature == 0:
            raise ValueError("at temperature 0 every sample is the same; set endpoint.temperature, or samples to 1")
        return self


class SelfRewardingJudgeSpec(Spec):
    """The policy scores its own answers from 0 to 5 (Self-Rewarding, arXiv:2401.10020, figure 2)."""

    kind: Literal["self_rewarding"] = "self_rewarding"
    samples: Samples = 3
    """The score is the mean of so many."""
    temperature: Temperature = 0.7
    max_tokens: Annotated[int, Field(ge=1, le=131072)] = 512
    limits: LimitsSpec = LimitsSpec(timeout_seconds=600, concurrency=256)
    """The sampler makes batches itself, so it is given many at once."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 every sample is the same; set temperature, or samples to 1")
        return self


class RewardModelJudgeSpec(Spec):
    """A sequence-classification checkpoint with one output."""

    kind: Literal["reward_model"] = "reward_model"
    model: Annotated[str, Field(min_length=1, max_length=300)]
    engine: Literal["transformers", "vllm"] = "transformers"
    """What computes it: transformers, on a CPU in the process that asks; or vLLM in a process of its own, for the
    architectures of `VLLM_REWARD_MODELS`. The scores are the same."""
    cpus: Annotated[int, Field(ge=1, le=256)] = 1
    """Of vLLM's process: what it books, and its threads where it computes on the CPU."""
    gpus: Annotated[int, Field(ge=0, le=8)] = 0
    """Of vLLM's process; 0 computes on the CPU."""
    batch_tokens: Annotated[int, Field(ge=1)] = 16384
    """At most so many tokens a forward pass, padding included; a longer answer goes alone."""
    max_length: Annotated[int, Field(ge=1)] = 4096
    """Prompt and answer in tokens; a longer one gets no score, because a part of it has another one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; scores are float32."""
    cache: bool = True

    @model_validator(mode="after")
    def _process_is_vllms(self) -> Self:
        if self.engine == "transformers" and (self.gpus or self.cpus > 1):
            raise ValueError("cpus and gpus are those of vLLM's process; set engine to vllm, or remove them")
        return self


JudgeSpec: TypeAlias = Annotated[
    RulesJudgeSpec | PairwiseJudgeSpec | ScoringJudgeSpec | SelfRewardingJudgeSpec | RewardModelJudgeSpec,
    Field(discriminator="kind"),
]


def only_compares(judge: JudgeSpec | None) -> bool:
    """It says which answer is better, and not how good one is."""
    ranks = isinstance(judge, ScoringJudgeSpec) and judge.mode == "ranking"
    return ranks or isinstance(judge, PairwiseJudgeSpec)
