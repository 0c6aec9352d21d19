"""A replica's temporary files go with it."""

import os
import tempfile
from pathlib import Path

import pytest

from dpo_service.serve import scratch


@pytest.fixture
def temp(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_is_made_there_goes_with_it(temp):
    own = scratch.use_own()
    assert Path(tempfile.gettempdir()) == own
    assert os.environ["TMPDIR"] == str(own)
    Path(tempfile.gettempdir(), "vllm_dist_1").touch()
    scratch.remove_own()
    assert list(temp.iterdir()) == []
    assert tempfile.gettempdir() == str(temp)


def test_removing_twice_removes_nothing_else(temp):
    (temp / "other").touch()
    scratch.use_own()
    scratch.remove_own()
    scratch.remove_own()
    assert [path.name for path in temp.iterdir()] == ["other"]


def test_a_killed_replicas_folder_is_swept_and_a_living_ones_is_not(temp):
    dead, alive, other = (temp / name for name in ("dpo-replica-99999999", f"dpo-replica-{os.getppid()}", "dpo-x"))
    for folder in (dead, alive, other):
        folder.mkdir()
    scratch.use_own()
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()
