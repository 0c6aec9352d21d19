"""What adapters other than plain LoRA train, export and measure against."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from dpo_service.checkpoint.load import newest_valid
from dpo_service.errors import InvalidSpec
from dpo_service.jobs import admit, choices
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.policy import add_adapter, export_model, load_model, merged_state
from dpo_service.train.saving import load_policy
from tests.unit.jobs.world import job_spec
from tests.unit.train.training_kit import make_job

DORA = LoraSpec(rank=4, dora=True)


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


def stirred(policy):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def plain(policy, model_dir):
    """The merged weights in a model without adapters."""
    model = load_model(model_dir)
    model.load_state_dict(merged_state(policy))
    return model


@pytest.mark.parametrize("spec", [DORA, LoraSpec(rank=4)])
def test_merged_weights_compute_what_the_adapter_does(model_dir, spec):
    base = load_model(model_dir)
    policy = stirred(add_adapter(load_model(model_dir), spec, seed=0))
    torch.testing.assert_close(logits(plain(policy, model_dir)), logits(policy), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(policy), logits(base), atol=1e-2)
    with policy.disable_adapter():
        assert torch.equal(logits(policy), logits(base))


def test_fresh_dora_is_the_base(model_dir):
    policy = add_adapter(load_model(model_dir), DORA, seed=0)
    torch.testing.assert_close(logits(policy), logits(load_model(model_dir)), rtol=1e-5, atol=1e-5)
    assert any("lora_magnitude_vector" in name for name, p in policy.named_parameters() if p.requires_grad)


def test_a_dora_run_comes_back_and_is_published_merged(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, reference="live", lora=DORA, learning_rate=1e-2)
    job.train()
    checkpoint = newest_valid(job.store, "j")
    assert any("lora_magnitude_vector" in name for name in load_file(checkpoint.adapter / "adapter_model.safetensors"))
    trained = load_policy(job.run, model_dir, checkpoint, torch.device("cpu"))
    torch.testing.assert_close(logits(load_model(checkpoint.model)), logits(trained), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(trained), logits(load_model(model_dir)), atol=1e-2)


def test_dora_takes_no_dropout():
    with pytest.raises(ValidationError, match="set dropout to 0"):
        LoraSpec(dora=True, dropout=0.1)


QLORA = {"lora": {"quantize": "nf4"}, "resources": {"gpus_per_worker": 1}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"resources": {}}, "on GPUs only; set resources"),
        ({"reference": "cached"}, "set it to live"),
        ({"resources": {"gpus_per_worker": 1, "workers": 2, "strategy": "fsdp"}}, "need whole weights"),
    ],
)
def test_quantising_is_refused_where_it_cannot_be(fields, says):
    with pytest.raises(ValidationError, match=says):
        job_spec(**QLORA | fields)


def test_the_reference_of_a_quantised_base_is_that_base():
    assert choices._reference(job_spec(**QLORA)) == "live"
    assert choices._reference(job_spec()) == "cached"


def test_quantising_needs_bitsandbytes(monkeypatch):
    monkeypatch.setattr(admit, "find_spec", lambda name: None)
    admit._require_quantizer(job_spec())
    with pytest.raises(InvalidSpec, match="pip install 'dpo-service") as refused:
        admit._require_quantizer(job_spec(**QLORA))
    assert refused.value.param == "lora.quantize"


@pytest.mark.parametrize("dora", [False, True])
def test_a_quantised_base_is_published_as_numbers(tmp_path, wide_model_dir, dora, monkeypatch):
    """On the CPU, which bitsandbytes serves too, once it is kept from its kernels there that know no backward."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    base = load_model(wide_model_dir, quantize="nf4")
    policy = stirred(add_adapter(base, LoraSpec(rank=4, dora=dora, target_modules=("q_proj", "up_proj")), seed=0))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loss = policy(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad)
    export_model(policy, merged_state(policy), wide_model_dir, tmp_path / "out", torch.float32)
    published = load_model(tmp_path / "out")
    assert type(published.model.layers[0].mlp.down_proj) is torch.nn.Linear
    with torch.no_grad():
        found = published(input_ids=ids, labels=ids).loss
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-5)
    original = load_file(wide_model_dir / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    error = (published.model.layers[0].mlp.down_proj.weight - original).norm() / original.norm()
    assert 0.01 < error < 0.15


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory):
    """As wide as a block of 4-bit numbers is long."""
    from tests.models import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("wide"), hidden=128)
