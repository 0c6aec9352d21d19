"""A reference that follows the policy: by how much, when, and what a checkpoint keeps of it."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_service.checkpoint.load import newest_valid
from dpo_service.checkpoint.state import digest_tensors, read_tensors
from dpo_service.errors import CheckpointError
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.method import RefreshSpec
from dpo_service.train.batch import collate
from dpo_service.train.moving import MovingReference
from dpo_service.train.optim import trained_parameters
from dpo_service.train.policy import adapter_dropout, add_adapter, load_model
from dpo_service.train.reference import LiveReference
from dpo_service.train.rows import RowTable
from tests.unit.train.training_kit import Recorder, as_table, make_job, random_rows, weights

LORA = LoraSpec(rank=4, dropout=0.5)


def batch():
    return collate(RowTable(as_table(random_rows(4))).take([0, 1, 2, 3]))


def moved_policy(model_dir, lora):
    policy = load_model(model_dir)
    policy = add_adapter(policy, LORA, seed=0) if lora else policy
    before = {name: parameter.detach().clone() for name, parameter in trained_parameters(policy).items()}
    return policy, before


def move(policy):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(policy).values():
            parameter += 0.1 * torch.randn_like(parameter)


def close(left, right):
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_it_is_the_initial_policy_until_it_follows(model_dir, lora, alpha):
    policy, before = moved_policy(model_dir, lora)
    moving = MovingReference(policy, model_dir, RefreshSpec(every_steps=2, alpha=alpha), "float32")
    initial = LiveReference(load_model(model_dir), "float32")(batch())
    move(policy)
    moving.after_step(1)
    assert close(moving(batch()), initial)
    moving.after_step(2)
    assert not close(moving(batch()), initial)
    for name, parameter in trained_parameters(policy).items():
        assert torch.allclose(moving.weights[name], alpha * parameter + (1 - alpha) * before[name], atol=1e-6)


def test_it_mixes_as_trl_does(model_dir):
    from trl.trainer.callbacks import SyncRefModelCallback

    policy, _ = moved_policy(model_dir, lora=False)
    theirs = load_model(model_dir)
    moving = MovingReference(policy, model_dir, RefreshSpec(every_steps=1, alpha=0.6), "float32")
    move(policy)
    moving.after_step(1)
    SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(moving.weights[name], parameter, atol=1e-7)


def test_an_adapter_is_lent_for_the_pass_alone_and_without_dropout(model_dir):
    policy, _ = moved_policy(model_dir, lora=True)
    move(policy)
    moving = MovingReference(policy, model_dir, RefreshSpec(every_steps=1), "float32")
    policy_before = {name: parameter.detach().clone() for name, parameter in trained_parameters(policy).items()}
    expected = moving(batch())
    move(policy)
    with adapter_dropout(policy, seed=3):
        assert all(torch.equal(a, b) for a, b in zip(moving(batch()), expected, strict=True))
        assert any(module.training for name, module in policy.named_modules() if "lora_dropout" in name)
    for name, parameter in trained_parameters(policy).items():
        assert not torch.equal(parameter, policy_before[name])


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=4)])
def test_a_hard_refresh_puts_the_margin_back_to_nothing(tmp_path, model_dir, lora):
    recorded = Recorder()
    refresh = RefreshSpec(every_steps=3)
    job = make_job(tmp_path, model_dir, reference="live", refresh=refresh, lora=lora, steps=6, learning_rate=1e-2)
    job.train(reports=recorded)
    losses = recorded.losses()
    assert [losses[0], losses[3]] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert abs(losses[4] - math.log(2)) > 1e-4


def test_the_checkpoint_holds_the_reference_and_names_it(tmp_path, model_dir):
    options = {"reference": "live", "steps": 4, "save_every_steps": 2}
    job = make_job(tmp_path, model_dir, refresh=RefreshSpec(every_steps=4), **options)
    recorded = Recorder()
    job.train(reports=recorded)
    checkpoint = newest_valid(job.store, "j")
    kept = read_tensors(checkpoint.state / "reference.safetensors")
    assert checkpoint.manifest.reference_digest == digest_tensors(kept) == recorded.references[4]
    assert recorded.references[2] != recorded.references[4]
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(job)[0].items())
    with pytest.raises(CheckpointError, match="another reference"):
        make_job(tmp_path, model_dir, **options).train()
