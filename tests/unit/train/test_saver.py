"""A checkpoint is written while training goes on: it holds the step it was taken at, or is not there."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from dpo_service.checkpoint.load import newest_valid, opened, step_directories
from dpo_service.errors import CheckpointError
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.eval import BestSpec, ranking_metrics
from dpo_service.storage import paths
from dpo_service.train import saving
from tests.unit.train.training_kit import Recorder, make_job, same, weights

KINDS = {
    "full": {},
    "bfloat16": {"precision": "bfloat16"},
    "lora": {"reference": "live", "lora": LoraSpec(rank=4)},
}
KILLED_WHILE_WRITING = """
import sys, time
from pathlib import Path
from dpo_service.checkpoint import format
from tests.unit.train.training_kit import make_job

sync = format._sync_tree

def stuck(directory):
    sync(directory)
    if "step-00000004" in directory.name:
        print("writing", flush=True)
        time.sleep(600)

format._sync_tree = stuck
make_job(Path(sys.argv[1]), Path(sys.argv[2]), save_every_steps=2).train()
"""


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_late_is_the_state_as_it_was(tmp_path, model_dir, monkeypatch, kind):
    whole = make_job(tmp_path / "whole", model_dir, steps=6, save_every_steps=3, **KINDS[kind])
    whole.train()
    moved, write = threading.Event(), saving.write

    def late(*args, **options):
        assert moved.wait(60)
        write(*args, **options)

    asked = iter(range(10))

    def stop():
        if next(asked) == 5:
            moved.set()
        return False

    monkeypatch.setattr(saving, "write", late)
    job = make_job(tmp_path / "late", model_dir, steps=6, save_every_steps=3, **KINDS[kind])
    job.train(stop=stop)
    for step in (3, 6):
        for left, right in zip(weights(whole, step), weights(job, step), strict=True):
            assert same(left, right)


def test_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, save_every_steps=3)
    job.store.write(paths.checkpoints_dir("j"), b"a file where the directory goes")
    recorded = Recorder()
    with pytest.raises(CheckpointError, match=r"could not be written: .*Not a directory"):
        job.train(reports=recorded)
    assert len(recorded.losses()) == 6
    assert recorded.checkpoints == []


def test_killed_while_writing_leaves_the_checkpoint_before(tmp_path, model_dir):
    whole = make_job(tmp_path / "whole", model_dir, save_every_steps=2)
    recorded = Recorder()
    whole.train(reports=recorded)
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / "killed"), str(model_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
    job = make_job(tmp_path / "killed", model_dir, save_every_steps=2)
    assert newest_valid(job.store, "j").manifest.step == 2
    resumed = Recorder()
    job.train(reports=resumed)
    assert "resuming from step 2" in resumed.messages[0]
    assert resumed.losses() == recorded.losses()[2:]
    assert resumed.checkpoints == [4, 6]
    for left, right in zip(weights(whole), weights(job), strict=True):
        assert same(left, right)


@pytest.mark.parametrize("publish", [True, False])
def test_the_best_stays_and_is_published_where_asked(tmp_path, model_dir, publish):
    """By the highest loss, so that the best is not the last."""
    best = BestSpec(keep=1, metric="eval_loss", better="higher", publish=publish)
    options = {"keep_best": best, "keep_checkpoints": 1, "save_every_steps": 2, "learning_rate": 0.03, "steps": 10}
    job = make_job(tmp_path, model_dir, **options)
    recorded = Recorder()
    outcome = job.train(reports=recorded)
    losses = {step: values["loss"] for (split, step), values in recorded.values.items() if split == "eval" and step}
    winner = max(losses, key=losses.__getitem__)
    assert set(losses) == {2, 4, 6, 8, 10}
    assert winner != 10
    assert [int(path.name[-8:]) for path in step_directories(job.store, "j")] == [winner, 10]
    assert outcome.checkpoint == paths.checkpoint_dir("j", winner if publish else 10)
    assert opened(job.store, "j", winner if publish else 10).manifest.digest == outcome.digest
    assert any(f"best checkpoint is that of step {winner}" in text for text in recorded.messages) == publish
    assert job.train() == outcome


@pytest.mark.parametrize(("rows", "loss"), [("pairs", "sigmoid"), ("answers", "sft")])
def test_metrics_that_rank_are_metrics_of_a_run(tmp_path, model_dir, rows, loss):
    outcome = make_job(tmp_path, model_dir, loss=loss, steps=1).train()
    assert ranking_metrics(rows).keys() <= outcome.metrics.keys()
