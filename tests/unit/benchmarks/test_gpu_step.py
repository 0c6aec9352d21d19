"""The GPU benchmark runs on a CPU with a tiny model, TRL included, so that it works where it matters."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import gpu_step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device runs the whole of it")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_step", *arguments])
    gpu_step.main()


def test_tiny_prints_one_table_and_writes_one_file(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--tiny", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert {(entry["length"], entry["way"]) for entry in found["entries"]} == {
        (length, way) for length in (32, 64) for way in ("sdpa", "TRL")
    }
    for entry in found["entries"]:
        assert "failed" not in entry
        assert len(entry["seconds"]) == 2
        assert entry["pairs"] == 2 * gpu_step.Case("tiny", entry["length"], 2, "cpu").pairs
        assert 0 < entry["utilisation"] < 1
        assert entry["tokens_per_second"] > entry["pairs_per_second"] > 0
    assert "tiny     64     TRL" in capsys.readouterr().out


def test_without_a_device_it_says_why_it_does_nothing(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--json", str(tmp_path / "found.json"))
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "found.json").exists()


def test_a_way_that_fails_leaves_the_others_their_turn(monkeypatch):
    monkeypatch.setattr(gpu_step.importlib.util, "find_spec", lambda _: None)
    case = gpu_step.Case("tiny", 32, 1, "cpu")
    varlen, sdpa = gpu_step.measurements([case], ["varlen", "sdpa"])
    assert "failed" in varlen
    assert sdpa["pairs_per_second"] > 0
