"""Twenty steps beside TRL's DPOTrainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.trl_parity import COMPARED, Curve, Setting, largest_difference, run_trl
from dpo_service.specs.optim import OptimSpec
from tests.unit.train.training_kit import Recorder, make_job, random_rows

TOLERANCE = dict.fromkeys(COMPARED, 1e-3) | {"loss": 1e-4, "learning_rate": 1e-9, "num_tokens": 0}


def repeated_rows(setting: Setting) -> dict[str, list]:
    """Random rows seen four times each, so that there is something to learn and the losses move."""
    distinct = random_rows(setting.steps * setting.batch_size // 4)
    return {name: values * 4 for name, values in distinct.items()}


def run_ours(root: Path, model_dir: Path, columns: dict[str, list], setting: Setting) -> Curve:
    job = make_job(
        root,
        model_dir,
        reference=setting.reference,
        columns=columns,
        validation=0,
        steps=setting.steps,
        batch_size=setting.batch_size,
        micro_batch_size=setting.micro_batch_size,
        shuffle=False,
        keep_checkpoints=1,
    )
    optim = OptimSpec(
        learning_rate=setting.learning_rate,
        lr_schedule=setting.lr_schedule,
        warmup_ratio=setting.warmup_ratio,
        weight_decay=setting.weight_decay,
        max_grad_norm=setting.max_grad_norm,
    )
    job.run = job.run.model_copy(update={"optim": optim})
    recorded = Recorder()
    job.train(reports=recorded)
    return [recorded.values["train", step] for step in range(1, setting.steps + 1)]


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_losses_equal_trl_step_by_step(tmp_path, model_dir, monkeypatch, reference):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    setting = replace(Setting(), reference=reference)
    columns = repeated_rows(setting)
    ours = run_ours(tmp_path, model_dir, columns, setting)
    theirs = run_trl(model_dir, columns, setting)
    assert theirs[-1]["loss"] < 0.5 < theirs[0]["loss"], "a run that learns nothing compares nothing"
    for name, tolerance in TOLERANCE.items():
        assert largest_difference(ours, theirs, name) <= tolerance, name
