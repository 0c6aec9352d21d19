"""What the service decides of sampled pairs where a job says "auto" or nothing. Pure.

n               4; the authors' 64 candidates for rso, 5 for sppo, and 1 for spin
max_tokens      256, at most half of max_length
samplers        a GPU each where the workers have one; bfloat16 on GPUs, float32 on CPUs
staleness       1 step where samplers follow every step; 0 where they share the trainer's device
iteration       as many steps as go once through the prompts
judge           of self_rewarding the policy; else it is the job's to say
pairing         the best and the worst, for online and self_rewarding
mix             its share of the batch, at least one pair and at most all but one
"""

from __future__ import annotations

from dpo_service.errors import InvalidSpec
from dpo_service.specs.base import chosen_or
from dpo_service.specs.job import JobSpec
from dpo_service.specs.method import RefreshSpec, RsoHyperparameters, SppoHyperparameters
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.run import BatchSpec, ModelSource, OnlineSpec
from dpo_service.specs.sampled import PAIRED, AnswersSpec, judge_of
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec

ANSWERS = {"rso": 64, "sppo": 5, "spin": 1}
DEFAULT_ANSWERS = 4
MAX_TOKENS = 256


def sampled(spec: JobSpec) -> bool:
    return spec.method.row.pairs == "samples"


def answer_room(spec: JobSpec, max_length: int) -> int:
    """Tokens a sampled answer may have; 0 where none is sampled. Raises InvalidSpec where they leave no prompt."""
    if not sampled(spec):
        return 0
    room = chosen_or(_asked(spec).max_tokens, min(MAX_TOKENS, max_length // 2))
    if room >= max_length:
        raise InvalidSpec(
            f"sampling.max_tokens {room:,} leaves the prompt no room in max_length {max_length:,}; "
            f"use at most {max_length - 1:,}",
            param="sampling.max_tokens",
        )
    return room


def online(
    spec: JobSpec, batch: BatchSpec, *, rows: int, max_length: int, reward_model: ModelSource | None
) -> OnlineSpec | None:
    """Where the pairs come from; None = the job's file has them. `rows` is the number of prompts."""
    sync = spec.method.row.sync
    if sync is None:
        return None
    asked, own = _asked(spec), spec.method.hyperparameters
    return OnlineSpec.model_validate(
        {
            "source": spec.method.type,
            "sampling": _sampling(spec, max_length),
            "samplers": samplers(spec, max_length),
            "judge": judge_of(spec),
            "reward_model": reward_model,
            "pairing": (spec.pairing or PairingSpec()) if spec.method.type in PAIRED else None,
            "sync": sync,
            "staleness": chosen_or(asked.staleness, 0 if asked.shares_device else 1) if sync == "step" else 0,
            "iteration_steps": iteration_steps(spec, batch, rows),
            "accepted": own.accepted if isinstance(own, RsoHyperparameters) else 0,
            "rejection_beta": own.rejection_beta if isinstance(own, RsoHyperparameters) else 0.0,
            "win_scale": own.win_scale if isinstance(own, SppoHyperparameters) else 0.0,
            "mixed_pairs": _mixed_pairs(spec, batch),
        }
    )


def refresh(spec: JobSpec, batch: BatchSpec, rows: int) -> RefreshSpec | None:
    """How the reference moves: to the previous iterate, or as the job says."""
    steps = iteration_steps(spec, batch, rows)
    return RefreshSpec(every_steps=steps) if steps is not None else spec.reference_refresh


def iteration_steps(spec: JobSpec, batch: BatchSpec, rows: int) -> int | None:
    if spec.method.row.sync != "iteration":
        return None
    return chosen_or(_asked(spec).iteration_steps, max(1, rows // batch.batch_size))


def samplers(spec: JobSpec, max_length: int) -> SamplerSpec:
    asked, gpus = _asked(spec), gpus_of_a_sampler(spec)
    return SamplerSpec(
        samplers=asked.samplers,
        gpus=gpus,
        cpus=asked.cpus_per_sampler,
        shares_device=asked.shares_device,
        dtype=chosen_or(asked.dtype, "bfloat16" if gpus else "float32"),
        max_num_seqs=asked.max_num_seqs,
        max_model_len=max_length,
        kv_cache_bytes=asked.kv_cache_bytes,
        lora_rank=spec.lora.rank if spec.lora else None,
    )


def gpus_of_a_sampler(spec: JobSpec) -> int:
    return chosen_or(_asked(spec).gpus_per_sampler, spec.resources.gpus_per_worker)


def _asked(spec: JobSpec) -> AnswersSpec:
    return spec.sampling or AnswersSpec()


def _sampling(spec: JobSpec, max_length: int) -> SamplingSpec:
    asked = _asked(spec)
    return SamplingSpec(
        n=chosen_or(asked.n, ANSWERS.get(spec.method.type, DEFAULT_ANSWERS)),
        temperature=asked.temperature,
        top_p=asked.top_p,
        max_tokens=answer_room(spec, max_length),
    )


def _mixed_pairs(spec: JobSpec, batch: BatchSpec) -> int:
    if spec.mix is None:
        return 0
    if batch.batch_size < 2:
        raise InvalidSpec(
            "mix needs a pair of the file and a sampled one in each step; set batch_size to 2 or more",
            param=f"method.{spec.method.type}.hyperparameters.batch_size",
        )
    return min(max(round(spec.mix.share * batch.batch_size), 1), batch.batch_size - 1)
