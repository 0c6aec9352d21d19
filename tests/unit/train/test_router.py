"""The load-balancing loss of a mixture of experts: transformers' own, each token once, packed or padded."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from dpo_service.errors import TrainingError
from dpo_service.registry.directories import ROUTED
from dpo_service.specs.loss import LossSpec
from dpo_service.train.batch import collate
from dpo_service.train.layers import recompute_layers
from dpo_service.train.logprobs import completion_logps, use_packing
from dpo_service.train.router import require_router
from tests.unit.train.families import PACKED, PADDED, family
from tests.unit.train.test_attention import random_pairs
from tests.unit.train.training_kit import Recorder, make_job

MIXTURES = {name: PACKED[name] for name in ("mixtral", "qwen3_moe", "olmoe")}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request):
    model = family(request.param, MIXTURES[request.param])
    assert use_packing(model)
    return model


def loss_and_gradients(model, examples):
    completions = completion_logps(model, collate(examples), routed=True)
    model.zero_grad()
    completions.router_loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return completions.router_loss.detach(), found


def test_packed_equals_padded(mixture):
    padded = copy.deepcopy(mixture)
    padded._dpo_packs = False
    examples = random_pairs(4)
    mine, gradients = loss_and_gradients(mixture, examples)
    theirs, expected = loss_and_gradients(padded, examples)
    assert torch.allclose(mine, theirs, rtol=1e-5)
    assert any("gate" in name for name in gradients)
    assert all(torch.allclose(gradients[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)


def test_single_answers_equal_the_models_own_loss(mixture):
    """Without pairs there is no prompt to count twice, so it is what transformers computes of the padded rows."""
    examples = random_pairs(3, paired=False)
    rows = [torch.tensor([*e.prompt, *e.chosen]) for e in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True).long()
    own = mixture(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert torch.allclose(completion_logps(mixture, collate(examples), routed=True).router_loss, own, rtol=1e-5)


def test_balanced_experts_cost_what_the_paper_says(mixture):
    """Uniform probabilities: E * sum of (k / E) * (1 / E) = k."""
    even = copy.deepcopy(mixture)
    for name, parameter in even.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.zeros_(parameter)
    loss = completion_logps(even, collate(random_pairs(2)), routed=True).router_loss
    assert loss.item() == pytest.approx(even.num_experts_per_tok, rel=1e-5)


def test_recomputed_layers_give_the_same(mixture):
    recomputed, examples = copy.deepcopy(mixture), random_pairs(3)
    recompute_layers(recomputed, random=False)
    (mine, gradients), (theirs, expected) = (loss_and_gradients(m, examples) for m in (recomputed, mixture))
    assert torch.equal(mine, theirs)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_a_padded_family_has_it_too():
    model = family("qwen3_next", PADDED["qwen3_next"])
    use_packing(model)
    loss, gradients = loss_and_gradients(model, random_pairs(2))
    assert loss > 0
    assert gradients


@pytest.mark.parametrize("kind", ROUTED)
def test_the_families_named_have_the_function(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(kind))]
    assert hasattr(sys.modules[model.__module__], "load_balancing_loss_func")


@pytest.mark.parametrize("loss", ["sigmoid", "sft"])
def test_a_run_adds_it_to_its_loss_by_share(tmp_path, mixture_dir, loss):
    """The step's loss rises by the mean of its micro-batches', weighted by what each counts for."""
    recorders = []
    for coefficient in (0.0, 0.5):
        recorders.append(Recorder())
        job = make_job(tmp_path / str(coefficient), mixture_dir, loss=loss, steps=1, router_aux_loss_coef=coefficient)
        job.train(reports=recorders[-1])
    plain, routed = (recorder.losses()[0] for recorder in recorders)
    expected = _mean_router_loss(job)
    assert routed - plain == pytest.approx(0.5 * expected, rel=1e-3)
    if loss == "sigmoid":
        assert recorders[1].values["train", 1]["router_loss"] == pytest.approx(expected, rel=1e-5)
    assert "router_loss" not in recorders[0].values["train", 1]


def _mean_router_loss(job):
    from dpo_service.train.feed import Feed
    from dpo_service.train.policy import load_model
    from dpo_service.train.ranks import Ranks

    model = load_model(job.model_dir)
    feed = Feed(job.run, job.dataset, job.store, Ranks())
    total = weight = 0.0
    for batch in feed.batches(0):
        share = len(batch.target_C) if job.run.loss == LossSpec(name="sft") else batch.rows
        total += share * completion_logps(model, batch, routed=True).router_loss.item()
        weight += share
    return total / weight


def test_a_dense_model_is_refused_at_the_start(tmp_path, model_dir):
    with pytest.raises(TrainingError, match="router_aux_loss_coef"):
        make_job(tmp_path, model_dir, router_aux_loss_coef=0.1).train()
    with pytest.raises(TrainingError):
        require_router(family("llama", PACKED["llama"]))
