"""Every loss through the whole loop: three steps of the tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dpo_service.checkpoint.load import newest_valid
from dpo_service.cli.jobfile import load
from dpo_service.specs.job import JobSpec
from dpo_service.specs.loss import LOSS_TABLE
from dpo_service.specs.method import METHODS
from dpo_service.train.losses import LOSSES
from tests.unit.train.training_kit import Recorder, make_job

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
PREFERENCES = sorted(set(LOSSES) - {"sft"})
FIRST = {
    "sigmoid": math.log(2),
    "robust": math.log(2),
    "hinge": 1.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "ipo": 25.0,
    "kto": 0.5,
}
"""What the first step must say, where policy and reference are still the same."""


@pytest.mark.parametrize("loss", PREFERENCES)
def test_every_loss_trains(tmp_path, model_dir, loss):
    recorded = Recorder()
    job = make_job(tmp_path, model_dir, loss=loss, steps=3)
    assert job.run.reference.mode == ("cached" if LOSS_TABLE[loss].reference else "none")
    assert job.train(reports=recorded).steps == 3
    losses = recorded.losses()
    assert all(math.isfinite(value) for value in losses)
    assert losses[0] == pytest.approx(FIRST.get(loss, losses[0]), rel=1e-4)
    assert recorded.values["eval", 3]["loss"] != recorded.values["eval", 0]["loss"], "the weights moved"
    expected = "rewards/chosen", "rewards/rejected", "rewards/margins", "kl" if loss == "kto" else "rewards/accuracies"
    assert all(math.isfinite(recorded.values["train", 3][name]) for name in expected)
    digest = newest_valid(job.store, "j").manifest.reference_digest
    assert (digest is not None) == LOSS_TABLE[loss].reference


@pytest.mark.parametrize("loss", PREFERENCES)
def test_every_loss_is_the_same_however_a_step_is_cut(tmp_path, model_dir, loss):
    whole, parts = Recorder(), Recorder()
    make_job(tmp_path / "a", model_dir, loss=loss, steps=2, validation=0, micro_batch_size=8).train(reports=whole)
    make_job(tmp_path / "b", model_dir, loss=loss, steps=2, validation=0, micro_batch_size=3).train(reports=parts)
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("robust", {"label_smoothing": 0.2}),
        ("sigmoid", {"rpo_alpha": 1.0}),
        ("sigmoid", {"length_penalty": 0.1}),
        ("ipo", {"length_normalize": False}),
        ("hinge", {"ld_alpha": 0.2}),
        ("nca_pair", {"wpo": True}),
    ],
)
def test_an_option_changes_what_is_trained(tmp_path, model_dir, loss, options):
    plain, changed = Recorder(), Recorder()
    make_job(tmp_path / "a", model_dir, loss=loss, steps=3).train(reports=plain)
    make_job(tmp_path / "b", model_dir, loss=loss, steps=3, loss_options=options).train(reports=changed)
    assert plain.values["eval", 3]["rewards/margins"] != changed.values["eval", 3]["rewards/margins"]


@pytest.mark.parametrize("options", [{"ld_alpha": 0.3}, {"wpo": True, "ld_alpha": 0.0}], ids=str)
def test_weights_of_tokens_and_pairs_hold_however_a_step_is_cut_and_for_every_reference(tmp_path, model_dir, options):
    recorded = {}
    for reference, size in (("cached", 8), ("cached", 3), ("live", 8)):
        kept = recorded[reference, size] = Recorder()
        job = make_job(
            tmp_path / f"{reference}{size}",
            model_dir,
            reference=reference,
            steps=2,
            micro_batch_size=size,
            loss_options=options,
        )
        job.train(reports=kept)
        assert kept.values["eval", 0]["rewards/chosen"] == pytest.approx(0, abs=1e-5), (
            "the reference has the same tails"
        )
    first, *others = [kept.losses() for kept in recorded.values()]
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


def test_every_method_has_an_example():
    assert {JobSpec.model_validate(load(path)).method.type for path in CONFIGS} == set(METHODS)
