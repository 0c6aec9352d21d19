"""Weights & Biases is an extra, so a small double stands for it; what matters is that it can never hurt a run."""

import sys
from types import ModuleType

import pytest

from dpo_service.reports import Reporter, read_spool, spool_files
from dpo_service.specs.job import Integration, WandbIntegration
from dpo_service.train.tracking import Tracked
from tests.unit.train.training_kit import make_job


class Board(ModuleType):
    """Takes what wandb.init and a run of it take."""

    def __init__(self):
        super().__init__("wandb")
        self.opened, self.logged, self.finished, self.broken = [], [], 0, False

    def init(self, **options):
        self.opened.append(options)
        return self

    def log(self, values, step):
        if self.broken:
            raise ConnectionError("no route to the board")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def board(monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    return board


def tracked(tmp_path, model_dir):
    asked = Integration(type="wandb", wandb=WandbIntegration(project="p", tags=("a",)))
    run = make_job(tmp_path / "store", model_dir, reference="live", integrations=(asked,)).run
    return Tracked(Reporter(tmp_path, "train", url=None, token="t"), run), run


def spooled(directory):
    return [report for file in spool_files(directory) for batch, _ in read_spool(file) for report in batch]


def test_metrics_go_to_both_and_the_run_there_is_the_job(tmp_path, board, model_dir):
    reports, run = tracked(tmp_path, model_dir)
    reports.metrics("train", 1, {"loss": 0.5}, "step 1")
    reports.close()
    assert board.logged == [(1, {"train/loss": 0.5})]
    assert board.finished == 1
    assert (board.opened[0]["project"], board.opened[0]["id"], board.opened[0]["tags"]) == ("p", run.job_id, ["a"])
    assert [report.key for report in spooled(tmp_path)] == ["metrics:train:1"]


def test_a_broken_tracker_is_told_once_and_costs_nothing(tmp_path, board, model_dir):
    board.broken = True
    reports, _ = tracked(tmp_path, model_dir)
    for step in (1, 2):
        reports.metrics("train", step, {"loss": 0.5}, "step")
    reports.close()
    said = spooled(tmp_path)
    assert [r.key for r in said if r.type == "metrics"] == ["metrics:train:1", "metrics:train:2"]
    assert [r.level for r in said if r.type == "message"] == ["warn"]
    assert "no route" in next(r.message for r in said if r.type == "message")
