"""Every file in configs/ is a job the service would take, or settings it would start with."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_service.cli.jobfile import load
from dpo_service.settings import Settings
from dpo_service.specs.job import JobSpec

CONFIGS = Path(__file__).parents[2] / "configs"
JOBS = sorted(CONFIGS.glob("*.yaml"))
SETTINGS = sorted(CONFIGS.glob("*.env"))


def test_no_file_is_left_out():
    assert {path for path in CONFIGS.iterdir() if path.is_file()} == {*JOBS, *SETTINGS}
    assert len(JOBS) >= 7
    assert SETTINGS


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_file_is_a_job(path):
    spec = JobSpec.model_validate(load(path))
    assert spec.method.type in path.stem or path.stem == "demo-own"


def test_the_commented_job_shows_the_defaults_it_claims():
    """Fields whose comment gives no reason to differ are what the service does by itself."""
    shown, default = JobSpec.model_validate(load(CONFIGS / "dpo.yaml")), JobSpec.model_fields
    for name in (
        "lr_schedule",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "truncation",
        "deduplicate",
        "shuffle",
    ):
        assert getattr(shown, name) == default[name].default


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("commented", [False, True])
def test_every_setting_exists_and_is_taken(path, commented, monkeypatch):
    lines = [line.removeprefix("# ") if commented else line for line in path.read_text().splitlines()]
    values = dict(line.split("=", 1) for line in lines if line.startswith("DPO_"))
    unknown = {name for name in values if name.removeprefix("DPO_").lower() not in Settings.model_fields}
    assert values
    assert unknown == set()
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert Settings().port == 8000
