"""How far a policy is from its reference, on answers that it sampled itself.

    KL(policy || reference) = mean over answers y ~ policy of log p(y | x) - log p_ref(y | x)      nats an answer

It is an estimate by Monte Carlo, unbiased where the answers were sampled at temperature 1 with top_p 1; a single one
may be below 0. Nothing in it needs a job, and the answers may be those of any `evaluation.evaluate`.

Shapes: S answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_service.online.evaluation import Evaluated
from dpo_service.rows.plan import micro_batches
from dpo_service.specs.eval import HELD_OUT
from dpo_service.specs.run import BatchSpec
from dpo_service.train.batch import MicroBatch, collate
from dpo_service.train.logprobs import completion_logps
from dpo_service.train.policy import autocast, base_of
from dpo_service.train.ranks import Ranks
from dpo_service.train.reference import Reference
from dpo_service.train.rows import Example


@torch.no_grad()
def divergence(
    policy: Any, reference: Reference, answers: Sequence[Evaluated], batch: BatchSpec, ranks: Ranks, precision: str
) -> dict[str, float]:
    """`valid/kl`, and `valid/logp_gap`: how far the log-probabilities of `policy` are from the sampler's, nats a token.

    Every rank computes its share of `answers`, which are the same on all of them, and all get the whole.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for rows in _shares(answers, batch)[ranks.rank :: ranks.world]:
        micro = collate([_example(answers[row]) for row in rows]).to(ranks.device)
        sums += _sums(policy, reference, micro, precision)
    ranks.sum_tensor(sums)
    kl, gap = sums.tolist()
    return {
        f"{HELD_OUT}kl": kl / len(answers),
        f"{HELD_OUT}logp_gap": gap / sum(len(answer.sample.token_ids) for answer in answers),
    }


def _shares(answers: Sequence[Evaluated], batch: BatchSpec) -> list[list[int]]:
    lengths = np.array([len(one.prompt.token_ids) + len(one.sample.token_ids) for one in answers])
    return micro_batches(range(len(answers)), lengths, batch.micro_batch_size, batch.micro_batch_tokens)


def _example(answer: Evaluated) -> Example:
    sample = answer.sample
    return Example(list(answer.prompt.token_ids), list(sample.token_ids), sampled_chosen=sample.logp)


def _sums(policy: Any, reference: Reference, micro: MicroBatch, precision: str) -> Tensor:
    """The log-ratios of a micro-batch's answers, and their distances from the sampler, summed: [2]."""
    with autocast(micro.input_ids_BL.device, precision):
        logps_S = completion_logps(base_of(policy), micro).logps_S
    referenced = reference(micro)
    assert referenced is not None, "methods that sample have a reference"
    assert micro.sampled_S is not None, "the answers were sampled"
    return torch.stack([(logps_S - referenced[0]).sum(), (logps_S - micro.sampled_S).abs().sum()]).double()
