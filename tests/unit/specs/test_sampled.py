"""Methods that sample their pairs: what goes together, and what each refusal says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dpo_service.specs.job import JobSpec
from dpo_service.specs.method import METHODS
from dpo_service.specs.sampled import judge_of

RULES = {"kind": "rules", "rules": [{"rule": "finished"}]}
ENDPOINT = {"base_url": "http://localhost:8000/v1", "model": "judge"}
PAIRWISE = {"kind": "pairwise", "endpoint": ENDPOINT}
RANKING = {"kind": "scoring", "mode": "ranking", "endpoint": ENDPOINT}
SELF = {"kind": "self_rewarding"}
BEST = {"eval": {"split": 0.2}, "checkpoint": {"keep_best": 1}}
SAMPLED = tuple(name for name, row in METHODS.items() if row.pairs == "samples")


def job(method: str, own: dict[str, Any] | None = None, **fields: Any) -> JobSpec:
    block = {"type": method, method: {"hyperparameters": own or {}}}
    return JobSpec.model_validate({"model": "base", "training_file": "file-1", "method": block, **fields})


def judged(method: str) -> dict[str, Any]:
    return {"judge": RULES} if method in ("online", "rso", "sppo") else {}


@pytest.mark.parametrize("method", SAMPLED)
def test_a_job_says_its_method_and_its_judge(method):
    spec = job(method, **judged(method))
    assert spec.method.row.pairs == "samples"
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert (judge_of(spec) is None) == (method == "spin")


@pytest.mark.parametrize("field", [{"sampling": {"n": 2}}, {"judge": RULES}, {"pairing": {}}, {"mix": {"file": "f"}}])
def test_a_method_on_a_file_takes_nothing_of_samples(field):
    (name,) = field
    with pytest.raises(ValidationError, match=f"remove `{name}`, or sample answers with method 'online'"):
        job("dpo", **field)


@pytest.mark.parametrize("method", SAMPLED)
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"reference": "cached"}, "computed live; remove `reference`"),
        ({"eval": {"split": 0.1}, "checkpoint": {"keep_best": 1, "metric": "eval_loss"}}, "eval_loss|keep_best"),
        ({"checkpoint": {"keep_best": 1}}, "needs rows to evaluate on"),
        ({"eval": {"every_steps": 2}}, "needs rows to evaluate on"),
        ({"resources": {"strategy": "fsdp", "workers": 2}}, "set resources.strategy to ddp"),
        ({"precision": "pure_bfloat16"}, "float32 or bfloat16"),
        ({"lora": {"dora": True}}, "remove lora.dora"),
        ({"sampling": {"max_tokens": 64}, "max_length": 64}, "no room in max_length 64"),
        ({"sampling": {"shares_device": True}}, "give both a GPU"),
        ({"sampling": {"n": 0}}, "greater than or equal to 1"),
    ],
)
def test_no_sampled_method_takes_it(method, fields, says):
    with pytest.raises(ValidationError, match=says):
        job(method, **{**judged(method), **fields})


@pytest.mark.parametrize(
    ("method", "fields", "says"),
    [
        ("online", {}, "needs a judge"),
        ("rso", {}, "needs a judge"),
        ("sppo", {}, "needs a judge"),
        ("online", {"judge": RULES, "sampling": {"n": 1}}, "set sampling.n to 2 or more"),
        ("online", {"judge": RULES, "sampling": {"iteration_steps": 5}}, "remove sampling.iteration_steps"),
        ("spin", {"judge": RULES}, "remove `judge`"),
        ("spin", {"sampling": {"n": 2}}, "set sampling.n to 1"),
        ("spin", {"pairing": {}}, "remove `pairing`"),
        ("spin", {"mix": {"file": "f"}}, "remove `mix`"),
        ("rso", {"judge": PAIRWISE}, "only compares"),
        ("rso", {"judge": RANKING}, "only compares"),
        ("rso", {"judge": RULES, "pairing": {}}, "at random; remove `pairing`"),
        ("rso", {"judge": RULES, "sampling": {"n": 4}}, "set sampling.n to 8 or more"),
        ("rso", {"judge": RULES, "sampling": {"staleness": 1}}, "remove sampling.staleness"),
        ("sppo", {"judge": SELF}, "does not move with the policy"),
        ("sppo", {"judge": RULES, "pairing": {}}, "likeliest.*remove `pairing`"),
        ("sppo", {"judge": RULES, "sampling": {"staleness": 0}}, "remove sampling.staleness"),
        ("sppo", {"judge": RULES, "reference_refresh": {"every_steps": 5}}, "with sampling.iteration_steps"),
        ("self_rewarding", {"judge": RULES}, "judged by the policy itself"),
        ("self_rewarding", BEST, "this judge is each of them in turn; remove checkpoint.keep_best"),
        ("online", {"judge": SELF, **BEST}, "this judge is each of them in turn; remove checkpoint.keep_best"),
        ("spin", BEST, "judges no answers.*remove checkpoint.keep_best"),
    ],
)
def test_what_a_source_cannot_use_is_refused_with_the_mend(method, fields, says):
    with pytest.raises(ValidationError, match=says):
        job(method, **fields)


@pytest.mark.parametrize(
    ("sampling", "workers", "says"),
    [({"samplers": 1}, 2, "one sampler of one GPU"), ({"staleness": 1}, 1, "set sampling.staleness to 0")],
)
def test_a_shared_device_is_one_worker_and_one_sampler_in_turns(sampling, workers, says):
    resources = {"workers": workers, "gpus_per_worker": 1}
    with pytest.raises(ValidationError, match=says):
        job("online", judge=RULES, resources=resources, sampling={"shares_device": True, **sampling})


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({}, True),
        ({"lora": {"rank": 4}, "sampling": {"shares_device": True}}, True),
        ({"lora": {"rank": 4}}, False),
        ({"sampling": {"gpus_per_sampler": 0}}, False),
    ],
)
def test_held_out_prompts_are_for_samplers_that_can_be_lent_weights(fields, refused):
    asked = {"judge": RULES, "resources": {"gpus_per_worker": 1}, "eval": {"split": 0.1}, **fields}
    if not refused:
        assert job("online", **asked).eval.split == 0.1
        return
    with pytest.raises(ValidationError, match=r"remove validation_file and eval\.split"):
        job("online", **asked)


@pytest.mark.parametrize(
    ("method", "own", "says"),
    [
        ("online", {"loss": "sppo"}, "sigmoid"),
        ("rso", {"loss": "ipo"}, "hinge"),
        ("sppo", {"loss": "sigmoid"}, "loss"),
        ("spin", {"beta": 3}, "less than or equal to 2"),
        ("rso", {"accepted": 1}, "accepted"),
    ],
)
def test_each_method_has_its_own_numbers(method, own, says):
    with pytest.raises(ValidationError, match=says):
        job(method, own, **judged(method))


@pytest.mark.parametrize(
    ("method", "own", "loss", "beta"),
    [
        ("online", {}, "sigmoid", 0.1),
        ("online", {"loss": "ipo", "beta": 0.3}, "ipo", 0.3),
        ("rso", {"accepted": 4, "rejection_beta": 2.0}, "hinge", 0.1),
        ("sppo", {"win_scale": 3.0}, "sppo", 1e-3),
        ("spin", {}, "sigmoid", 0.1),
        ("self_rewarding", {}, "sigmoid", 0.1),
    ],
)
def test_the_training_step_gets_a_loss_and_no_method(method, own, loss, beta):
    decided = job(method, own, **judged(method)).method.loss
    assert (decided.name, decided.beta) == (loss, beta)


@pytest.mark.parametrize("method", SAMPLED)
def test_prompts_can_be_held_out(method):
    assert job(method, **judged(method), eval={"split": 0.2, "every_steps": 5}).eval.split == 0.2
    assert job(method, **judged(method), validation_file="file-2").validation_file == "file-2"


@pytest.mark.parametrize("method", ["online", "rso", "sppo"])
def test_the_best_checkpoint_is_that_of_the_highest_reward(method):
    best = {"checkpoint": {"keep_best": 2, "metric": "valid/reward", "publish": "best"}}
    assert job(method, **judged(method), **(BEST | best)).checkpoint.metric == "valid/reward"
    moving = {"reference_refresh": {"every_steps": 5}} if method == "online" else {}
    assert job(method, **judged(method), **BEST, **moving).checkpoint.keep_best == 1, "a judge's score has no reference"
