"""Two gloo processes give the one-process result, replicated and sharded; a checkpoint of one goes on in the other."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from dpo_service.checkpoint.load import newest_valid
from dpo_service.checkpoint.state import OPTIMIZER, WEIGHTS, read_each
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.method import RefreshSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.storage.store import Store
from dpo_service.train.probe import verify_published
from dpo_service.train.ranks import Ranks, _buckets
from tests.unit.train.training_kit import Job, Recorder, make_job

DDP, FSDP = (ResourceSpec(workers=2, strategy=strategy) for strategy in ("ddp", "fsdp"))
LORA = LoraSpec(rank=4)
KINDS = {
    "ddp": {"resources": DDP, "reference": "live", "micro_batch_size": 2},
    "ddp-lora": {"resources": DDP, "reference": "live", "lora": LORA},
    "ddp-refresh": {"resources": DDP, "reference": "live", "refresh": RefreshSpec(every_steps=1, alpha=0.5)},
    "ddp-kto": {"resources": DDP, "reference": "live", "loss": "kto", "micro_batch_size": 2},
    "ddp-bco": {"resources": DDP, "loss": "bco_pair", "micro_batch_size": 2},
    "fsdp": {"resources": FSDP, "micro_batch_size": 1},
    "fsdp-live": {"resources": FSDP, "reference": "live", "activation_checkpointing": True},
    "fsdp-lora": {"resources": FSDP, "reference": "live", "lora": LORA, "micro_batch_size": 1},
    "fsdp-kto": {"resources": FSDP, "reference": "live", "loss": "kto", "micro_batch_size": 1},
    "fsdp-sft": {"resources": FSDP, "loss": "sft", "micro_batch_size": 1},
    "fsdp-mixture": {"resources": FSDP, "micro_batch_size": 1, "router_aux_loss_coef": 0.5},
    "ddp-composite": {"resources": DDP, "reference": "live", "micro_batch_size": 2},
    "fsdp-composite": {"resources": FSDP, "reference": "live", "micro_batch_size": 1},
}
HALF = {
    "fsdp-bfloat16": {"resources": FSDP, "reference": "live", "precision": "bfloat16"},
    "ddp-pure-bfloat16": {"resources": DDP, "reference": "live", "precision": "pure_bfloat16"},
    "fsdp-pure-bfloat16": {"resources": FSDP, "reference": "live", "precision": "pure_bfloat16"},
}
RESUMED = ("ddp-lora", "ddp-bco", "ddp-refresh", "fsdp", "fsdp-lora")
OPTIONS = {"batch_size": 7, "steps": 4, "save_every_steps": 2}
"""Batches of 7, so that the ranks' shares differ: with one row a micro-batch, a sharded rank computes a blank one."""


def run_rank(rank: int, port: int, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for job in jobs:
        recorded = Recorder()
        outcome = job.train(ranks=Ranks(rank, 2), reports=recorded)
        assert outcome.steps == job.run.batch.max_steps
        if rank == 0:
            entries = [[*key, values] for key, values in recorded.values.items()]
            job.store.path("recorded").write_text(json.dumps([recorded.messages, entries]))
        else:
            assert recorded.values == {}
    torch.distributed.destroy_process_group()
    # As Ray ends its workers and the runner itself: on a busy machine a library's thread now and then outlives the
    # interpreter, which aborts a process whose work is done ("terminate called without an active exception").
    os._exit(0)


def train_on_two(jobs: list[Job], meanwhile: Callable[[], None] | None = None) -> list[Recorder]:
    """All `jobs` in the same two processes, one after the other; `meanwhile` in this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = mp.spawn(run_rank, (port, jobs), nprocs=2, join=False)
    if meanwhile is not None:
        meanwhile()
    while not ranks.join():
        pass
    return [read_back(job) for job in jobs]


def read_back(job: Job) -> Recorder:
    recorded = Recorder()
    recorded.messages, entries = json.loads(job.store.path("recorded").read_text())
    recorded.values = {(split, step): values for split, step, values in entries}
    return recorded


def saved(job):
    checkpoint = newest_valid(job.store, "j")
    return load_file(checkpoint.model / "model.safetensors") | dict(read_each(checkpoint.state, OPTIMIZER))


def assert_close(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-4, atol=1e-5)


def of(values, split, name):
    return [metrics[name] for (kind, _), metrics in sorted(values.items()) if kind == split]


@dataclass
class Pair:
    """A run on one rank and the same on two."""

    one: Job
    alone: Recorder
    two: Job
    together: Recorder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, model_dir, mixture_dir, composite_dir) -> dict[str, Pair]:
    """Each kind, begun on two ranks, and (`resumed-...`) begun on one that was killed after step 2."""
    torch.set_num_threads(1)
    root, jobs, alone = tmp_path_factory.mktemp("ranks"), {}, {}
    for kind, options in (KINDS | HALF).items():
        model = {"mixture": mixture_dir, "composite": composite_dir}.get(kind.rpartition("-")[2], model_dir)
        one, *others = (make_job(root / kind / name, model, **OPTIONS | options) for name in ("one", "two", "cut"))
        alone[kind] = one, Recorder()
        jobs[kind] = others[0]
        if kind in RESUMED:
            others[1].train()
            others[1].store.delete("jobs/j/checkpoints/step-00000004")
            jobs[f"resumed-{kind}"] = others[1]

    def train_alone():
        for one, recorder in alone.values():
            one.train(reports=recorder)

    together = dict(zip(jobs, train_on_two(list(jobs.values()), train_alone), strict=True))
    return {name: Pair(*alone[name.removeprefix("resumed-")], jobs[name], together[name]) for name in jobs}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(pairs, kind):
    pair = pairs[kind]
    assert pair.together.messages[0] == "Training on 2 workers, 48 rows, 4 steps"
    values, expected = pair.together.values, pair.alone.values
    names = {"loss", "rewards/chosen", "logps/rejected", "rewards/accuracies", "kl", "mean_token_accuracy"}
    names |= {"router_loss"}
    for split in ("train", "eval"):
        for name in names & set(expected["train", 1]):
            noise = 1e-5 if name == "kl" else 1e-6  # a small mean of differences of large sums
            assert of(values, split, name) == pytest.approx(of(expected, split, name), rel=1e-5, abs=noise)
    assert of(values, "train", "grad_norm") == pytest.approx(of(expected, "train", "grad_norm"), rel=1e-4)
    assert of(values, "train", "num_tokens") == of(expected, "train", "num_tokens")
    assert_close(saved(pair.two), saved(pair.one))


@pytest.mark.parametrize("kind", KINDS | HALF)
def test_what_two_ranks_publish_is_what_they_trained(pairs, kind):
    """Sharded weights are gathered for the files a tensor at a time, and never for the probe."""
    job = pairs[kind].two
    adapted = job.model_dir if job.run.lora else None
    assert "give the policy's log-probabilities" in verify_published(newest_valid(job.store, "j").model, adapted)


def copied(job, place):
    shutil.copytree(job.store.root, place / "copy")
    return replace(job, store=Store(place / "copy"))


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_goes_on_where_two_stopped(pairs, kind, tmp_path):
    pair = pairs[kind]
    job = copied(pair.two, tmp_path)
    job.store.delete("jobs/j/checkpoints/step-00000004")
    resumed = Recorder()
    job.train(reports=resumed)
    assert resumed.losses() == pytest.approx(pair.alone.losses()[2:], rel=1e-5)
    assert_close(saved(job), saved(pair.one))


def test_buckets_hold_every_gradient_once_and_end_when_full(monkeypatch):
    """32 MB each, which a tiny model does not fill."""
    monkeypatch.setattr("dpo_service.train.ranks.BUCKET_BYTES", 100)
    gradients = [torch.full((size,), float(size)) for size in (10, 20, 5, 30, 1, 1, 400, 2)]
    buckets = _buckets(gradients)
    assert all(a is b for a, b in zip((g for bucket in buckets for g in bucket), gradients, strict=True))
    assert [[len(gradient) for gradient in bucket] for bucket in buckets] == [[10, 20], [5, 30], [1, 1, 400], [2]]


def test_sharded_ranks_write_what_they_hold(pairs):
    """No file holds the whole optimizer, all of them are in the manifest, and nothing is left beside them."""
    checkpoint = newest_valid(pairs["fsdp"].two.store, "j")
    assert sorted(path.name for path in checkpoint.state.iterdir()) == [
        "counters.json",
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
    ]
    assert {f"state/{path.name}" for path in checkpoint.state.iterdir()} <= {f.path for f in checkpoint.manifest.files}
    assert {path.name for path in checkpoint.path.parent.iterdir()} == {"step-00000002", "step-00000004"}


def test_sharded_float32_weights_are_put_together(pairs, tmp_path):
    """In bfloat16 the model goes out rounded, and the weights it was rounded from lie in shares."""
    pair = pairs["fsdp-bfloat16"]
    checkpoint = newest_valid(pair.two.store, "j")
    exported, weights = load_file(checkpoint.model / "model.safetensors"), dict(read_each(checkpoint.state, WEIGHTS))
    assert all(torch.equal(exported[name], weight.bfloat16()) for name, weight in weights.items())
    assert any(not torch.equal(weight.bfloat16().float(), weight) for weight in weights.values())
    job = copied(pair.two, tmp_path)
    job.store.delete("jobs/j/checkpoints/step-00000004")
    resumed = Recorder()
    job.train(reports=resumed)
    assert resumed.losses() == pytest.approx(pair.alone.losses()[2:], rel=2e-2)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_pure_bfloat16_on_two_ranks_follows_one(pairs, strategy, tmp_path):
    """To the arithmetic's own noise: a micro-batch of another shape rounds otherwise, and so does a sharded rank."""
    pair = pairs[f"{strategy}-pure-bfloat16"]
    assert pair.together.losses() == pytest.approx(pair.alone.losses(), rel=2e-2)
    together, alone = saved(pair.two), saved(pair.one)
    assert {value.dtype for name, value in together.items() if "|step" not in name} == {torch.bfloat16}
    assert {name: value.shape for name, value in together.items()} == {n: value.shape for n, value in alone.items()}
    moments = [name for name in alone if "|exp_avg" in name]
    assert all((together[n] - alone[n]).norm() < 0.1 * alone[n].norm() for n in moments)
    job = copied(pair.two, tmp_path)
    job.store.delete("jobs/j/checkpoints/step-00000004")
    resumed = Recorder()
    job.train(reports=resumed)
    assert resumed.losses() == pytest.approx(pair.alone.losses()[2:], rel=2e-2)


@pytest.mark.long  # the compiler takes a minute on two cores
def test_compiled_layers_are_sharded(tmp_path, model_dir):
    options = OPTIONS | {"resources": FSDP, "activation_checkpointing": True}
    plain = make_job(tmp_path / "one", model_dir, **options)
    compiled = make_job(tmp_path / "two", model_dir, compile=True, **options)
    alone = Recorder()
    plain.train(reports=alone)
    [together] = train_on_two([compiled])
    assert together.losses() == pytest.approx(alone.losses(), rel=1e-5)
    assert_close(saved(compiled), saved(plain))


@pytest.mark.parametrize("kind", RESUMED)
def test_two_ranks_go_on_where_one_stopped(pairs, kind):
    pair = pairs[f"resumed-{kind}"]
    assert "resuming from step 2" in pair.together.messages[0]
    assert pair.together.losses() == pytest.approx(pair.alone.losses()[2:], rel=1e-5)
    assert_close(saved(pair.two), saved(pair.one))
