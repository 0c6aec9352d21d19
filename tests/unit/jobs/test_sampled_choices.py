"""What the service decides of sampled pairs."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_service.errors import InvalidSpec
from dpo_service.jobs import choices
from dpo_service.registry.tables import File
from dpo_service.specs.run import ModelSource, RunSpec
from tests.unit.jobs.world import job_spec

RULES = {"kind": "rules", "rules": [{"rule": "finished"}]}


def decided(method: str, own: dict[str, Any] | None = None, *, rows: int = 100, max_length: int = 256, **fields: Any):
    if method in ("online", "rso", "sppo"):
        fields = {"judge": RULES, **fields}
    spec = job_spec(method={"type": method, method: {"hyperparameters": own or {}}}, **fields)
    run = choices.decide(
        spec,
        job_id="ftjob-1",
        source=ModelSource(name="base", path="/base"),
        training=File(id="file-1", name="a.jsonl", key="files/a.jsonl"),
        validation=None,
        mix=File(id="file-2", name="b.jsonl", key="files/b.jsonl") if spec.mix else None,
        rows=rows,
        max_length=max_length,
        layer_width=0,
        router_coef=None,
        seed=0,
    )
    assert RunSpec.model_validate_json(run.model_dump_json()) == run
    assert "auto" not in run.model_dump_json()
    return run


def test_online_samples_follow_every_step():
    run = decided("online", {"batch_size": 4})
    assert run.online is not None
    assert (run.online.sync, run.online.staleness, run.online.iteration_steps) == ("step", 1, None)
    assert (run.online.sampling.n, run.online.sampling.max_tokens, run.data.answer_room) == (4, 128, 128)
    assert run.online.pairing is not None
    assert (run.online.samplers.dtype, run.online.samplers.max_model_len) == ("float32", 256)
    assert (run.reference.mode, run.reference.refresh, run.batch.n_epochs) == ("live", None, 1)
    assert (run.data.rows, run.trained_rows) == ("prompts", "pairs")


@pytest.mark.parametrize(("method", "n"), [("sppo", 5), ("spin", 1), ("self_rewarding", 4)])
def test_an_iteration_is_once_through_the_prompts_and_moves_the_reference(method, n):
    run = decided(method, {"batch_size": 8})
    assert run.online is not None
    assert run.reference.refresh is not None
    assert (run.online.sync, run.online.iteration_steps, run.online.staleness) == ("iteration", 12, 0)
    assert (run.reference.refresh.every_steps, run.reference.refresh.alpha, run.batch.n_epochs) == (12, 1.0, 3)
    assert run.online.sampling.n == n
    assert (run.online.pairing is not None) == (method == "self_rewarding")
    assert decided(method, sampling={"iteration_steps": 3}).reference.refresh.every_steps == 3


def test_rso_never_moves_its_samplers():
    run = decided("rso", {"accepted": 4, "rejection_beta": 2.0})
    assert run.online is not None
    assert (run.online.sync, run.online.sampling.n, run.batch.n_epochs) == ("never", 64, 1)
    assert (run.online.accepted, run.online.rejection_beta, run.loss.name) == (4, 2.0, "hinge")


def test_samplers_are_like_the_workers():
    run = decided("online", resources={"gpus_per_worker": 1}, lora={"rank": 4}, sampling={"shares_device": True})
    assert run.online is not None
    engines = run.online.samplers
    assert (engines.gpus, engines.dtype, engines.lora_rank, engines.sync) == (1, "bfloat16", 4, "file")
    assert run.online.staleness == 0, "who shares a device takes turns"


@pytest.mark.parametrize(("share", "batch", "pairs"), [(0.25, 8, 2), (0.01, 8, 1), (0.99, 8, 7)])
def test_a_mix_has_pairs_of_both_kinds(share, batch, pairs):
    run = decided("online", {"batch_size": batch}, mix={"file": "file-2", "share": share})
    assert run.online is not None
    assert (run.online.mixed_pairs, run.data.mix_file) == (pairs, "files/b.jsonl")


def test_a_mix_needs_two_pairs_a_step():
    assert decided("online", rows=10, mix={"file": "file-2"}).batch.batch_size == 2
    with pytest.raises(InvalidSpec, match="set batch_size to 2 or more") as refused:
        decided("online", {"batch_size": 1}, mix={"file": "file-2"})
    assert refused.value.param == "method.online.hyperparameters.batch_size"


def test_answers_leave_the_prompt_room():
    with pytest.raises(InvalidSpec, match="use at most 255") as refused:
        decided("online", sampling={"max_tokens": 256})
    assert refused.value.param == "sampling.max_tokens"
