"""What a job that samples its pairs needs: verifiers, answers to compare with, room for the samplers."""

from __future__ import annotations

from dpo_service.cluster.port import Capacity
from dpo_service.errors import InvalidSpec
from dpo_service.jobs import choices, sampled_choices
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.specs.job import JobSpec
from dpo_service.specs.judge import RewardModelJudgeSpec, RulesJudgeSpec, only_compares
from dpo_service.specs.verifiers import Arithmetic, ExactMatch, WordsInForm


def require_verifiers(spec: JobSpec) -> None:
    """Raises InvalidSpec where a rule names a verifier that is not installed."""
    missing = spec.judge.unregistered() if isinstance(spec.judge, RulesJudgeSpec) else ()
    if missing:
        raise InvalidSpec(
            f"no package that is installed where the service runs registers the verifier {missing[0]!r}; install it "
            "there and on the cluster's machines, or use a built-in rule",
            param="judge.rules",
        )


def require_references(spec: JobSpec, report: DatasetReport) -> None:
    """Raises InvalidSpec where rules compare with the rows' own answers and there are none."""
    if report.references == 0 and (rule := _compares_with_the_row(spec)):
        raise InvalidSpec(
            f"the rule {rule!r} compares with the row's own answer, and no row of the file has one; give the "
            "rows an `answer`, or name another column in the rule's `expected`",
            param="judge.rules",
        )


def require_comparable(spec: JobSpec, references: int, param: str) -> None:
    """`references` of the held-out prompts of field `param` come with an answer.

    Raises:
        InvalidSpec: none does, and the judge could say nothing of a sampled answer alone.
    """
    if not sampled_choices.sampled(spec) or references:
        return
    if rule := _compares_with_the_row(spec):
        judge = f"the rule {rule!r}"
    elif only_compares(spec.judge):
        judge = "a judge that compares"
    else:
        return
    raise InvalidSpec(
        f"{judge} sets each sampled answer against the row's own, and no held-out prompt has one; give the rows an "
        f"`answer`, or remove {param}",
        param=param,
    )


def _compares_with_the_row(spec: JobSpec) -> str | None:
    """The first rule that does."""
    rules = spec.judge.rules if isinstance(spec.judge, RulesJudgeSpec) else ()
    compared = (rule for rule in rules if isinstance(rule, ExactMatch | WordsInForm | Arithmetic))
    return next((rule.rule for rule in compared if rule.expected is None), None)


def require_room(spec: JobSpec, capacity: Capacity) -> None:
    """Raises InvalidSpec unless workers, samplers and the judge's own process, which run at the same time, find room in
    the cluster."""
    wanted, samplers = spec.resources, sampled_choices.samplers(spec, spec.max_length or choices.DEFAULT_MAX_LENGTH)
    judge = spec.judge if isinstance(spec.judge, RewardModelJudgeSpec) and spec.judge.engine == "vllm" else None
    gpus = wanted.workers * wanted.gpus_per_worker + samplers.booked_gpus + (judge.gpus if judge else 0)
    cpus = wanted.workers * wanted.cpus_per_worker + samplers.booked_cpus + (judge.cpus if judge else 0)
    beside = " beside the judge's process" if judge else ""
    for kind, needed, there in (("GPU", gpus, capacity.gpus), ("CPU", cpus, capacity.cpus)):
        if needed > there:
            raise InvalidSpec(
                f"{wanted.workers} workers and {samplers.samplers} samplers{beside} need {needed} {kind}s together; "
                f"the cluster has {there:.0f}; use fewer of them, or set {_lower(kind, judge)} lower",
                param="sampling.samplers",
            )


def _lower(kind: str, judge: RewardModelJudgeSpec | None) -> str:
    return f"sampling.{kind.lower()}s_per_sampler" + (f" or judge.{kind.lower()}s" if judge else "")
