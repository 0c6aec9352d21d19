"""AdamW in less memory does what AdamW does: bounds against float32, what rounding to nearest loses, resume by bits."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dpo_service.checkpoint.load import newest_valid
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from dpo_service.train.optimizers import BLOCK, GRIDS, CompactAdamW, decode, encode, round_randomly
from dpo_service.train.saving import load_policy
from tests.unit.train.training_kit import Recorder, build_model, make_job


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """One parameter that is quantised, of a length that no block divides, and one that is not."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.large = nn.Parameter(torch.randn(131, 67).to(torch.bfloat16).to(dtype))
        self.norm = nn.Parameter(torch.ones(67, dtype=dtype))


def spec(optimizer="adamw", **numbers):
    return OptimSpec(optimizer=optimizer, **{"learning_rate": 1e-3, "weight_decay": 0.1, **numbers})


def steps(net, optimizer, count, *, first=0):
    """Random gradients, whose scales differ by a thousand within a block and fall by ten over a hundred steps."""
    for step in range(first, first + count):
        for number, parameter in enumerate(net.parameters()):
            scale = 10 ** (1.5 * torch.rand(parameter.shape, generator=seeded(number)) - step / 100)
            mean, noise = (
                torch.randn(parameter.shape, generator=seeded(s)) for s in (5 + number, 100 + 2 * step + number)
            )
            parameter.grad = (scale * (mean + noise)).to(parameter.dtype)
        optimizer.step()


def travelled(net, start):
    return torch.cat([(p.detach().float() - s).flatten() for p, s in zip(net.parameters(), start, strict=True)])


def distance(optimizer, dtype=torch.float32, count=100):
    """Of the weights from those of float32 AdamW after `count` steps, as a share of the way these went."""
    exact, other = Net(), Net(dtype)
    start = [parameter.detach().clone() for parameter in exact.parameters()]
    steps(exact, torch.optim.AdamW(build_optimizer(exact, spec()).param_groups, lr=1e-3), count)
    steps(other, build_optimizer(other, spec(optimizer)), count)
    way = travelled(exact, start)
    return float((travelled(other, start) - way).norm() / way.norm())


def test_8_bit_moments_stay_near_float32():
    assert distance("adamw_8bit") < 0.08


def test_float32_weights_with_float32_moments_are_adamw():
    exact, other = Net(), Net()
    groups = build_optimizer(exact, spec()).param_groups
    ours = build_optimizer(other, spec()).param_groups
    steps(exact, torch.optim.AdamW(groups, lr=1e-3, fused=True), 20)
    steps(other, CompactAdamW(ours, eight_bit=False, seed=0, lr=1e-3, betas=(0.9, 0.999), eps=1e-8), 20)
    for left, right in zip(exact.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slot", GRIDS)
def test_codes_are_unbiased_and_near(slot):
    grid = GRIDS[slot]
    value_N = torch.randn(1000, generator=seeded()) if grid.signed else torch.rand(1000, generator=seeded()) + 1e-6
    value_N[:3] = 0
    random, drawn = seeded(1), []
    for _ in range(400):
        code_N, top_K = encode(value_N, grid, random)
        assert (code_N.dtype, top_K.shape) == (torch.uint8, (-(-1000 // BLOCK),))
        drawn.append(decode(code_N, top_K, grid))
    spacing = 2 ** (1 / grid.per_octave) - 1
    assert all(((found - value_N).abs() <= spacing * value_N.abs() * 1.0001).all() for found in drawn[:3])
    mean = torch.stack(drawn).mean(0)
    assert ((mean - value_N).abs() <= 5 * spacing / 2 / 400**0.5 * value_N.abs()).all()


def test_what_was_kept_is_kept_again():
    for grid in GRIDS.values():
        value_N = decode(*encode(torch.rand(600, generator=seeded()), grid, seeded(1)), grid)
        assert torch.equal(decode(*encode(value_N, grid, seeded(2)), grid), value_N)


def test_small_second_moments_never_become_nothing():
    """Divided by the root of 0, a weight's step would be a hundred million times too long."""
    value_N = torch.tensor([1.0, *[1e-14] * 9])
    grid = GRIDS["exp_avg_sq"]
    assert (decode(*encode(value_N, grid, seeded()), grid) >= value_N * 0.99).all()


def test_random_rounding_has_the_right_expectation():
    value_N = torch.tensor([1.0 + 2**-10, -1.0 - 2**-10, 3.0, 0.0, 1e-20])
    drawn = torch.stack([round_randomly(value_N, seeded(s)).float() for s in range(4000)])
    assert set(drawn[:, 0].tolist()) == {1.0, 1.0 + 2**-7}
    assert (drawn[:, 2:4] == value_N[2:4]).all()
    assert drawn[:, :2].mean(0).tolist() == pytest.approx(value_N[:2].tolist(), abs=5 * 2**-7 / 3 / 4000**0.5)


def test_rounding_to_nearest_loses_what_random_rounding_keeps(monkeypatch):
    kept = distance("adamw", torch.bfloat16)
    monkeypatch.setattr("dpo_service.train.optimizers.round_randomly", lambda value, random: value.bfloat16())
    lost = distance("adamw", torch.bfloat16)
    assert kept < 0.5 < 0.8 < lost


def test_pure_bfloat16_learns_by_tiny_steps_as_float32_does(tmp_path, monkeypatch):
    """Each step is a thirtieth of the spacing of a typical weight; rounded to the nearest, most are lost."""
    model_dir = build_model(tmp_path / "model", dtype=torch.bfloat16)

    def losses(name, precision, optimizer="adamw"):
        recorded = Recorder()
        options = {"loss": "sft", "steps": 150, "rows": 4, "batch_size": 4, "validation": 0, "learning_rate": 3e-5}
        job = make_job(tmp_path / name, model_dir, precision=precision, optimizer=optimizer, **options)
        job.run = job.run.model_copy(update={"save_every_steps": 1000})
        job.train(reports=recorded)
        return torch.tensor(recorded.losses())

    exact = losses("exact", "float32")
    fall = exact[0] - exact[-1]
    assert (losses("pure", "pure_bfloat16") - exact).abs().max() < 0.04 * fall
    assert (losses("8-bit", "pure_bfloat16", "adamw_8bit") - exact).abs().max() < 0.06 * fall
    monkeypatch.setattr("dpo_service.train.optimizers.round_randomly", lambda value, random: value.bfloat16())
    stuck = losses("nearest", "pure_bfloat16")
    assert stuck[0] - stuck[-1] < 0.5 * fall


def test_offloaded_is_adamw_to_the_bit(tmp_path, model_dir):
    plain, offloaded = Recorder(), Recorder()
    first = make_job(tmp_path / "a", model_dir, weight_decay=0.1)
    second = make_job(tmp_path / "b", model_dir, weight_decay=0.1, optimizer="adamw_offload")
    first.train(reports=plain)
    second.train(reports=offloaded)
    assert offloaded.losses() == plain.losses()
    left, right = (tensors(job, "state/optimizer.safetensors") for job in (first, second))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def tensors(job, file):
    with safe_open(newest_valid(job.store, "j").path / file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_pure_bfloat16_is_stored_once_and_to_the_bit(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, precision="pure_bfloat16", reference="live")
    job.train()
    checkpoint = newest_valid(job.store, "j")
    assert not (checkpoint.state / "weights.safetensors").exists()
    state = tensors(job, "state/optimizer.safetensors")
    assert {value.dtype for name, value in state.items() if "exp_avg" in name} == {torch.bfloat16}
    stored = tensors(job, "model/model.safetensors")
    policy = load_policy(job.run, model_dir, checkpoint, torch.device("cpu"))
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, stored[name])


def test_8_bit_state_takes_a_quarter(tmp_path, model_dir):
    plain, small = make_job(tmp_path / "a", model_dir), make_job(tmp_path / "b", model_dir, optimizer="adamw_8bit")
    plain.train()
    small.train()
    key = "model.embed_tokens.weight|"
    sizes = [
        sum(value.nbytes for name, value in tensors(job, "state/optimizer.safetensors").items() if name.startswith(key))
        for job in (plain, small)
    ]
    assert sizes[1] < 0.27 * sizes[0]


def test_adapters_over_a_bfloat16_base_are_float32(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, precision="pure_bfloat16", reference="live", lora=LoraSpec(rank=4))
    job.train()
    policy = load_policy(job.run, model_dir, newest_valid(job.store, "j"), torch.device("cpu"))
    types = {parameter.requires_grad: parameter.dtype for parameter in policy.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    assert type(build_optimizer(policy, job.run.optim)) is torch.optim.AdamW


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adamw_offload"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_to_tensors_and_back(optimizer, dtype):
    whole, cut = Net(dtype), Net(dtype)
    steps(whole, build_optimizer(whole, spec(optimizer), seed=3), 6)
    before = build_optimizer(cut, spec(optimizer), seed=3)
    steps(cut, before, 3)
    again = build_optimizer(cut, spec(optimizer), seed=3)
    tensors = {name: value.clone() for name, value in optimizer_tensors(before, cut).items()}
    load_optimizer_tensors(again, cut, tensors.items())
    steps(cut, again, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
