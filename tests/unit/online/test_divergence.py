"""KL from the reference on sampled answers: that of the definition, whatever micro-batch and rank an answer is in."""

from __future__ import annotations

import pytest
import torch

from dpo_service.online.divergence import divergence
from dpo_service.online.evaluation import Question, evaluate
from dpo_service.online.fake_sampler import FakeSampler
from dpo_service.online.prompts import PromptRow
from dpo_service.specs.run import BatchSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.train.policy import load_model
from dpo_service.train.ranks import CPU, Ranks
from dpo_service.train.reference import LiveReference
from tests.unit.train.training_kit import build_model

ROWS = [PromptRow(index, (20 + index, 30, 40 + index), f"prompt {index}", None, {}) for index in range(5)]


class Second(Ranks):
    """One of two ranks; what is summed over them is left as it is, so that a test can do it."""

    def sum_tensor(self, tensor):
        """Nothing."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch.set_num_threads(1)
    return build_model(tmp_path_factory.mktemp("tiny"))


def moved(model_dir):
    model = load_model(model_dir)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@torch.no_grad()
def logp(model, prompt, answer):
    logits_TV = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return float(logits_TV.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())


async def test_it_is_the_mean_log_ratio_of_the_sampled_tokens(model_dir):
    question = Question(SamplingSpec(n=2, max_tokens=6), 1, str)
    made = await evaluate(FakeSampler(SamplerSpec(), model_dir, 0), None, ROWS, question)
    base, policy = load_model(model_dir), moved(model_dir)
    reference, batch = LiveReference(base, "float32"), BatchSpec(batch_size=8, micro_batch_size=3, n_epochs=1)
    told = divergence(policy, reference, made.answers, batch, Ranks(), "float32")

    pairs = [(one.prompt.token_ids, one.sample.token_ids) for one in made.answers]
    ratios = [logp(policy, *pair) - logp(base, *pair) for pair in pairs]
    gaps = [abs(logp(policy, *pair) - one.sample.logp) for pair, one in zip(pairs, made.answers, strict=True)]
    assert told["valid/kl"] == pytest.approx(sum(ratios) / 10, rel=1e-4)
    assert told["valid/logp_gap"] == pytest.approx(sum(gaps) / sum(len(answer) for _, answer in pairs), rel=1e-4)
    assert abs(told["valid/kl"]) > 0.1, "the policy has moved"

    same = divergence(base, reference, made.answers, batch, Ranks(), "float32")
    assert abs(same["valid/kl"]) < 1e-5
    assert same["valid/logp_gap"] < 1e-5, "it sampled them"

    shares = [divergence(policy, reference, made.answers, batch, Second(rank, 2, CPU), "float32") for rank in (0, 1)]
    assert all(share != told for share in shares)
    assert sum(share["valid/kl"] for share in shares) == pytest.approx(told["valid/kl"], rel=1e-6)
