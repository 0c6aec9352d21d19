"""On a CUDA device: the losses of the CPU, in float32 to rounding and in bfloat16 roughly."""

from __future__ import annotations

import pytest
import torch

from dpo_service.train.ranks import Ranks
from tests.unit.train.training_kit import Recorder, build_model, make_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_gpu_run_follows_the_cpu_run(tmp_path, precision, tolerance):
    model_dir = build_model(tmp_path / "model")
    cpu, gpu = Recorder(), Recorder()
    make_job(tmp_path / "cpu", model_dir, reference="live").train(reports=cpu)
    job = make_job(tmp_path / "gpu", model_dir, reference="live", precision=precision)
    outcome = job.train(ranks=Ranks(device=torch.device("cuda")), reports=gpu)
    assert outcome.steps == 6
    assert gpu.losses() == pytest.approx(cpu.losses(), rel=tolerance)


def test_gpu_run_resumes(tmp_path):
    job = make_job(tmp_path / "job", build_model(tmp_path / "model"), reference="live", save_every_steps=2)
    ranks = Ranks(device=torch.device("cuda"))
    asked = iter([False, False, False, True])
    assert job.train(ranks=ranks, stop=lambda: next(asked)).steps == 3
    assert job.train(ranks=ranks).steps == 6
