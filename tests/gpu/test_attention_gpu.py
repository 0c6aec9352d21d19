"""On a CUDA device: every attention backend against the plain computation, compiled kernels and all."""

from __future__ import annotations

import pytest
import torch

from dpo_service.train.attention import flex, interface, sdpa, varlen
from dpo_service.train.batch import collate
from dpo_service.train.logprobs import completion_logps, use_packing
from tests.unit.train.attention_kit import plain, random_row
from tests.unit.train.families import PACKED, family
from tests.unit.train.test_attention import random_pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ASKED = [{}, {"window": 30}, {"softcap": 0.7}, {"window": 40, "softcap": 0.7}]


def assert_close(row, found, expected, tolerance):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    for mine, theirs in zip(row.gradients(found), row.gradients(expected), strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("largest", [60, 700])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_flex_compiled(dtype, tolerance, largest, asked):
    row = random_row(0, size=64, device="cuda", dtype=dtype, largest=largest)
    found = flex.attend(*row.states, row.layout, scaling=None, **asked)
    assert_close(row, found, plain(row, **asked), tolerance)


def test_flex_of_many_lengths_is_compiled_but_a_few_times():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(12):
        row = random_row(seed, size=64, device="cuda", dtype=torch.bfloat16, largest=300)
        flex.attend(*row.states, row.layout, scaling=None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("asked", [{}, {"window": 30}])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("largest", [60, 700])
@pytest.mark.parametrize("size", [64, 128])
def test_varlen(size, largest, groups, asked):
    row = random_row(0, size=size, groups=groups, device="cuda", dtype=torch.bfloat16, largest=largest)
    found = varlen.attend(*row.states, row.layout, scaling=None, **asked)
    assert_close(row, found, plain(row, **asked), 3e-2)


@pytest.mark.parametrize("asked", ASKED)
def test_sdpa(asked):
    row = random_row(0, size=64, device="cuda")
    assert_close(row, sdpa.attend(*row.states, row.layout, scaling=None, **asked), plain(row, **asked), 1e-4)


def test_the_backend_is_chosen_by_what_the_states_are():
    half, whole = (random_row(0, size=64, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    odd, tiny = (random_row(0, size=size, device="cuda", dtype=torch.bfloat16) for size in (20, 12))
    chosen = [interface.chosen(row.states[0], row.states[2], row.layout, None) for row in (half, whole, odd, tiny)]
    assert chosen == ["varlen", "flex", "flex", "sdpa"]
    assert interface.chosen(half.states[0], half.states[2], half.layout, 50.0) == "flex"


@pytest.mark.parametrize("name", ["llama", "mistral/windowed", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("backend", ["auto", *interface.BACKENDS])
def test_a_model_gives_what_it_gives_padded(name, backend):
    """Under autocast, as a job runs; heads of 16, which every kernel takes."""
    if backend == "varlen" and name == "gemma2":
        pytest.skip("the variable-length kernel cannot cap scores")
    model = family(name, PACKED[name] | {"head_dim": 16}).cuda()
    batch = collate(random_pairs(6)).to(torch.device("cuda"))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected_S = completion_logps(model, batch).logps_S
    assert use_packing(model)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        token = interface._backend.set(backend)
        found_S = completion_logps(model, batch).logps_S
        interface._backend.reset(token)
    assert torch.allclose(found_S, expected_S, rtol=3e-2, atol=0.5)
