"""A step computes in the arithmetic that the run asks for, and does to the layers what it asks for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_service.checkpoint.format import digest_of
from dpo_service.train.attention import interface as attention
from dpo_service.train.feed import Feed
from dpo_service.train.ranks import Ranks
from dpo_service.train.start import build_state
from dpo_service.train.step import train_step
from tests.unit.train.training_kit import make_job


class Products(TorchDispatchMode):
    """Notes the types in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.types.add(out.dtype)
        return out


class Calls(TorchDispatchMode):
    """Counts the passes through layers, by the one silu that each has."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.silu
        return func(*args, **kwargs or {})


def one_step(tmp_path, model_dir, mode, **options):
    """The state after it."""
    job = make_job(tmp_path, model_dir, validation=0, **options)
    state = build_state(job.run, model_dir, None, Ranks(), 6, digest_of(model_dir))
    feed = Feed(job.run, job.dataset, job.store, Ranks())
    batches = feed.batches(0)
    feed.close()
    with mode:
        train_step(state, 0, batches, 8.0)
    return state


@pytest.mark.parametrize(
    ("precision", "arithmetic", "weights"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.float32),
        ("pure_bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_matrices_are_multiplied_in_the_runs_precision(tmp_path, model_dir, precision, arithmetic, weights, reference):
    products = Products()
    state = one_step(tmp_path, model_dir, products, precision=precision, reference=reference)
    assert products.types == {arithmetic}
    assert {parameter.dtype for parameter in state.policy.parameters()} == {weights}


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_layers_are_compiled_and_recomputed_where_the_run_asks(tmp_path, model_dir, monkeypatch, compiles, recomputes):
    """Each layer is called once forward, and once more in the backward pass where it is recomputed."""
    compiled, called = [], []

    def compile_(forward, *, dynamic):
        compiled.append(forward)
        return lambda *args, **kwargs: called.append(forward) or forward(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_)
    options = {"compile": compiles, "activation_checkpointing": recomputes, "micro_batch_size": 8}
    layers = Calls()
    one_step(tmp_path, model_dir, layers, **options)
    attention.register()  # as it was
    assert len(compiled) == (2 if compiles else 0)
    assert len(called) == ((4 if recomputes else 2) if compiles else 0)
    assert layers.count == (4 if recomputes else 2)
