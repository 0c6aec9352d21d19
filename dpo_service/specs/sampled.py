"""What a job says of the answers it samples, and what goes together: for methods whose pairs are samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dpo_service.specs.base import AUTO, Auto, Spec
from dpo_service.specs.judge import JudgeSpec, SelfRewardingJudgeSpec, only_compares
from dpo_service.specs.method import RsoHyperparameters

if TYPE_CHECKING:
    from dpo_service.specs.job import JobSpec

JUDGED = ("online", "rso", "sppo", "self_rewarding")
"""The methods whose answers are judged; SPIN takes the row's own answer for the better one."""
PAIRED = ("online", "self_rewarding")
"""The methods whose pairs are made of scores by `pairing`; the others have a rule of their own."""


class AnswersSpec(Spec):
    """The answers to each prompt, and the engines that sample them."""

    n: Auto[Annotated[int, Field(ge=1, le=64)]] = AUTO
    """Answers to a prompt; auto: 4, `rso` 64 candidates, `sppo` 5, `spin` 1."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Auto[Annotated[int, Field(ge=1, le=131072)]] = AUTO
    """An answer that reaches it is cut off. Auto: 256, at most half of max_length. A prompt has the room it leaves."""
    staleness: Auto[Annotated[int, Field(ge=0, le=64)]] = AUTO
    """How many steps older than the policy the weights may be that answers were sampled with; 0 = strictly on-policy:
    sampling and training take turns. Auto: 1. Of `online` only."""
    iteration_steps: Auto[Annotated[int, Field(ge=1)]] = AUTO
    """Every so many steps the policy becomes what samples, and the reference: of `sppo`, `spin` and `self_rewarding`.
    Auto: once through the prompts."""
    samplers: Annotated[int, Field(ge=1, le=256)] = 1
    gpus_per_sampler: Auto[Annotated[int, Field(ge=0, le=8)]] = AUTO
    """0 samples on the CPU. Auto: as many as a worker has."""
    cpus_per_sampler: Annotated[int, Field(ge=1, le=256)] = 1
    shares_device: bool = False
    """Trainer and sampler take turns on one GPU."""
    dtype: Auto[Literal["float32", "bfloat16"]] = AUTO
    """Of the samplers' weights; auto: bfloat16 on GPUs, float32 on CPUs."""
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 32
    """Answers that one sampler makes at once."""
    kv_cache_bytes: Annotated[int, Field(ge=1 << 20)] | None = None


class MixSpec(Spec):
    """Pairs of a file among the sampled ones."""

    file: Annotated[str, Field(min_length=1, max_length=512)]
    """A file of preference pairs."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of each step's pairs; at least one is of the file, and at least one is sampled."""


def judge_of(job: JobSpec) -> JudgeSpec | None:
    """The job's judge: self-rewarding's is the policy, without being said."""
    if job.judge is None and job.method.type == "self_rewarding":
        return SelfRewardingJudgeSpec()
    return job.judge


def refusal(job: JobSpec) -> str | None:
    """Why the job's samples, judge and pairs do not go together, with the mend; None where they do."""
    found = _of_samples(job) if job.method.row.pairs == "samples" else _of_a_dataset(job)
    return next(found, None)


def _of_a_dataset(job: JobSpec) -> Iterator[str]:
    for field in ("sampling", "judge", "pairing", "mix"):
        if getattr(job, field) is not None:
            yield (
                f"method {job.method.type!r} trains on the pairs of its file; remove `{field}`, or sample answers with "
                "method 'online'"
            )


def _of_samples(job: JobSpec) -> Iterator[str]:
    yield from _of_the_judge(job)
    yield from _of_the_answers(job)
    yield from _of_the_pairs(job)
    yield from _of_the_training(job)


def _of_the_judge(job: JobSpec) -> Iterator[str]:
    method, judge = job.method.type, job.judge
    if method == "spin" and judge is not None:
        yield "method 'spin' takes the file's answers for the better ones and judges none; remove `judge`"
    if judge is None and method in JUDGED and method != "self_rewarding":
        yield f"method {method!r} needs a judge of its answers; give `judge`, as {{kind: rules, rules: [...]}}"
    if judge is not None and method == "self_rewarding" and not isinstance(judge, SelfRewardingJudgeSpec):
        yield "method 'self_rewarding' is judged by the policy itself; remove `judge`, or use method 'online'"
    if method == "sppo" and isinstance(judge, SelfRewardingJudgeSpec):
        yield "method 'sppo' needs a judge that does not move with the policy; give another kind of judge"
    if method == "rso" and (only_compares(judge) or isinstance(judge, SelfRewardingJudgeSpec)):
        yield (
            "method 'rso' accepts answers by their reward, and this judge only compares; give a judge of kind "
            "reward_model, rules, or scoring with mode score"
        )


def _of_the_answers(job: JobSpec) -> Iterator[str]:
    method, asked, sync = job.method.type, job.sampling or AnswersSpec(), job.method.row.sync
    if asked.n == 1 and method in JUDGED:
        yield f"sampling.n is 1, and method {method!r} compares answers with each other; set sampling.n to 2 or more"
    if asked.n not in (1, AUTO) and method == "spin":
        yield "method 'spin' sets one answer against the file's; set sampling.n to 1, or remove it"
    accepted = job.method.hyperparameters
    if isinstance(accepted, RsoHyperparameters) and asked.n != AUTO and asked.n < accepted.accepted:
        yield (
            f"method 'rso' is to accept {accepted.accepted} of {asked.n} candidates; "
            f"set sampling.n to {accepted.accepted} or more, or accepted to {asked.n} or less"
        )
    if asked.staleness != AUTO and sync != "step":
        yield (
            f"sampling.staleness is for samplers that follow every step, and those of {method!r} do not; "
            "remove sampling.staleness"
        )
    if asked.iteration_steps != AUTO and sync != "iteration":
        yield f"method {method!r} has no iterations; remove sampling.iteration_steps"
    if asked.max_tokens != AUTO and job.max_length is not None and asked.max_tokens >= job.max_length:
        yield (
            f"sampling.max_tokens {asked.max_tokens} leaves the prompt no room in max_length {job.max_length}; "
            "set max_length higher, or sampling.max_tokens lower"
        )


def _of_the_pairs(job: JobSpec) -> Iterator[str]:
    method = job.method.type
    if job.pairing is not None and method not in PAIRED:
        rule = {
            "rso": "pairs the accepted candidates at random",
            "sppo": "takes the likeliest and the unlikeliest winner",
            "spin": "pairs the file's answer with the sampled one",
        }[method]
        yield f"method {method!r} {rule}; remove `pairing`"
    if job.mix is not None and method == "spin":
        yield "method 'spin' has an answer of the file in each of its pairs; remove `mix`"


def _of_the_training(job: JobSpec) -> Iterator[str]:
    method = job.method.type
    if job.reference == "cached":
        yield (
            f"method {method!r} trains on answers that are not there yet, so its reference is computed live; "
            "remove `reference`, or set it to live"
        )
    if job.reference_refresh is not None and job.method.row.reference == "previous":
        yield (
            f"the reference of method {method!r} is its previous iterate; remove reference_refresh, and say how often "
            "with sampling.iteration_steps"
        )
    if job.checkpoint.keep_best and isinstance(judge_of(job), SelfRewardingJudgeSpec):
        yield (
            "checkpoint.keep_best compares what the judge says of checkpoints, and this judge is each of them in turn; "
            "remove checkpoint.keep_best, or use method 'online' with another kind of judge"
        )
    if job.resources.strategy == "fsdp":
        yield f"method {method!r} hands whole weights to its samplers; set resources.strategy to ddp"
    if job.precision == "pure_bfloat16":
        yield f"method {method!r} is trained in float32 or bfloat16; set precision to one of these"
    if job.lora is not None and (job.lora.dora or job.lora.quantize != "none"):
        yield "samplers load plain adapters over a whole base; remove lora.dora and lora.quantize"
    yield from _of_the_devices(job)


def _of_the_devices(job: JobSpec) -> Iterator[str]:
    asked = job.sampling or AnswersSpec()
    gpus = job.resources.gpus_per_worker if asked.gpus_per_sampler == AUTO else asked.gpus_per_sampler
    held_out = job.validation_file is not None or job.eval.split > 0
    if held_out and gpus and (asked.shares_device or job.lora is None):
        yield (
            "samplers on GPUs answer held-out prompts only where they have their own and the policy is an adapter; "
            "remove validation_file and eval.split, set lora without sampling.shares_device, or set "
            "sampling.gpus_per_sampler to 0"
        )
    if not asked.shares_device:
        return
    if not gpus or not job.resources.gpus_per_worker:
        yield "sampling.shares_device is for a GPU that trainer and sampler share; remove it, or give both a GPU"
    if gpus > 1 or asked.samplers != job.resources.workers:
        yield (
            "a worker shares its GPU with one sampler of one GPU; set sampling.samplers to resources.workers and "
            "sampling.gpus_per_sampler to 1"
        )
    if asked.staleness not in (AUTO, 0):
        yield "who shares a device takes turns, so nothing is sampled ahead; set sampling.staleness to 0"
