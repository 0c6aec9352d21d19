"""On a CUDA device: the losses of the CPU, in float32 to rounding and in bfloat16 roughly."""

from __future__ import annotations

import socket

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dpo_service.checkpoint.format import digest_of
from dpo_service.checkpoint.load import newest_valid
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.train.feed import Feed
from dpo_service.train.head import Head, head_logps
from dpo_service.train.ranks import BACKENDS, Ranks
from dpo_service.train.start import build_state
from dpo_service.train.step import train_step
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


@pytest.mark.parametrize("options", [{"lora": LoraSpec(rank=4)}, {"compile": True}, {"activation_checkpointing": True}])
def test_what_a_job_may_ask_for_follows_the_cpu_run_too(tmp_path, options):
    model_dir = build_model(tmp_path / "model")
    cpu, gpu = Recorder(), Recorder()
    asked = {"reference": "live", "precision": "bfloat16"}
    make_job(tmp_path / "cpu", model_dir, **asked, **(options | {"compile": False})).train(reports=cpu)
    make_job(tmp_path / "gpu", model_dir, **asked, **options).train(
        ranks=Ranks(device=torch.device("cuda")), reports=gpu
    )
    assert gpu.losses() == pytest.approx(cpu.losses(), rel=5e-2)


def test_the_head_for_gpus_gives_the_plain_heads_log_probabilities_and_gradients():
    """Compiled, in bfloat16, over two chunks of different lengths; the logits of a vocabulary that no block divides."""
    torch.manual_seed(0)
    module = nn.Linear(256, 5003, bias=True, device="cuda")
    hidden = torch.randn(700, 256, device="cuda", requires_grad=True)
    target, weights_C = torch.randint(5003, (700,), device="cuda"), torch.randn(700, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = head_logps(Head(module), hidden, target, 512, squares=True)
    logps = module(hidden).log_softmax(-1)
    expected = logps.gather(1, target[:, None]).squeeze(1)
    leaves = [hidden, *module.parameters()]
    assert (found.logps_C - expected).norm() <= 1e-2 * expected.norm()
    assert (found.square_C - (2 * logps).logsumexp(-1)).norm() <= 1e-2 * found.square_C.norm()
    own = torch.autograd.grad((found.logps_C * weights_C).sum(), leaves)
    for mine, theirs in zip(own, torch.autograd.grad((expected * weights_C).sum(), leaves), strict=True):
        assert (mine - theirs).norm() <= 2e-2 * theirs.norm()


def on_the_gpu(rank, port, job, ranks):
    torch.distributed.init_process_group(
        BACKENDS["cuda"], init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    torch.cuda.set_device(rank)
    job.train(ranks=Ranks(rank, ranks, torch.device("cuda", rank)))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_follow_one_rank(tmp_path, strategy):
    model_dir = build_model(tmp_path / "model")
    options = {"reference": "live", "resources": ResourceSpec(workers=2, gpus_per_worker=1, strategy=strategy)}
    one, two = (make_job(tmp_path / name, model_dir, save_every_steps=2, **options) for name in ("one", "two"))
    one.train()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(on_the_gpu, (port, two, 2), nprocs=2)
    left, right = (load_file(newest_valid(job.store, "j").model / "model.safetensors") for job in (one, two))
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=1e-2, atol=1e-3)


def test_a_step_that_is_not_logged_does_not_wait_for_the_device(tmp_path):
    """The second step is held to it: the first allocates and compiles."""
    job = make_job(tmp_path / "job", build_model(tmp_path / "model"), reference="live")
    ranks, device = Ranks(device=torch.device("cuda")), torch.device("cuda")
    feed = Feed(job.run, job.dataset, job.store, ranks)
    state = build_state(job.run, job.model_dir, None, ranks, 6, digest_of(job.model_dir))
    train_step(state, 0, feed.batches(0), feed.divisor(0))
    batches, divisor = feed.batches(1), feed.divisor(1)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, 1, batches, divisor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        feed.close()
    state.guard.check()


def test_gpu_run_resumes(tmp_path):
    job = make_job(tmp_path / "job", build_model(tmp_path / "model"), reference="live", save_every_steps=2)
    ranks = Ranks(device=torch.device("cuda"))
    asked = iter([False, False, False, True])
    assert job.train(ranks=ranks, stop=lambda: next(asked)).steps == 3
    assert job.train(ranks=ranks).steps == 6
