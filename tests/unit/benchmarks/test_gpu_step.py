"""The GPU benchmark runs on a CPU with a tiny model, TRL included, so that it works where it matters."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from benchmarks import gpu_step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device runs the whole of it")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_step", *arguments])
    gpu_step.main()


def test_tiny_prints_one_table_and_writes_one_file(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--tiny", "--steps", "2", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    for part in found["parts"]:
        assert "failed" not in part
        assert part["milliseconds"] > 0
    assert {part["part"] for part in found["parts"]} == {"attention", "head", "adapter", "adamw"}
    not_compiled = {
        "tiny": {name for name, way in gpu_step.WHOLE_WAYS.items() if not way.compiled},
        "tiny-lora": {name for name, way in gpu_step.LORA_WAYS.items() if not way.compiled},
    }
    for model, ways in not_compiled.items():
        assert {entry["way"] for entry in found["entries"] if entry["model"] == model} == ways | {"TRL"}
    for entry in found["entries"]:
        assert "failed" not in entry
        assert len(entry["seconds"]) == 2
        assert entry["pairs"] == 2 * [gpu_step.Case(entry["model"], 32, 2, "cpu").pairs]
        assert 0 < entry["utilisation"] < 1
        assert entry["tokens_per_second"] > entry["pairs_per_second"] > 0
    assert "tiny-lora     32 our adapter layers" in capsys.readouterr().out


def test_without_a_device_it_says_why_it_does_nothing(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--json", str(tmp_path / "found.json"))
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "found.json").exists()


def cases():
    """One that no CPU computes, and one that it does."""
    case = gpu_step.Case("tiny", 32, 1, "cpu")
    yield case, "varlen", gpu_step.Way(backend="varlen")
    yield case, "plain", gpu_step.Way()


def test_a_way_that_fails_leaves_the_others_their_turn():
    varlen, plain = gpu_step.measurements(cases(), math.inf)
    assert "failed" in varlen
    assert plain["pairs_per_second"] > 0


def test_when_the_time_is_up_no_case_is_begun():
    assert {entry["failed"] for entry in gpu_step.measurements(cases(), 0.0)} == {"not begun: the time is up"}
