"""A sequence's log-probabilities are those it has alone, whatever is computed beside it or was before it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.batch import collate, padded
from dpo_service.train.layers import recompute_layers
from dpo_service.train.logprobs import completion_logps, packed, packs, use_packing
from dpo_service.train.policy import load_model
from dpo_service.train.rope import Kinds, OwnFrequencies, kinds_of, runs
from dpo_service.train.rows import Example
from tests.unit.train.families import PACKED, PADDED, family
from tests.unit.train.training_kit import VOCAB, Recorder, build_model, make_job

ORIGINAL, LONGEST = 32, 256

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
LONG = {"original_max_position_embeddings": ORIGINAL, "rope_parameters": LONGROPE}
DYNAMIC = {
    "max_position_embeddings": ORIGINAL,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
}
STATIC = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}
GEMMA = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
BY_LENGTH = {
    **{f"{name}/longrope": LONG for name in ("llama", "qwen2", "mistral")},
    "phi3/longrope": LONG | {"sliding_window": None},
    "phimoe/longrope": {
        "num_local_experts": 4,
        "sliding_window": None,
        "rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
    },
    **{f"{name}/dynamic": DYNAMIC for name in ("llama", "qwen2", "gemma2")},
    "gemma3_text/dynamic": GEMMA
    | {
        "max_position_embeddings": ORIGINAL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": DYNAMIC["rope_parameters"],
        },
    },
}
"""Frequencies that depend on length; a name may say more after a slash."""
STEADY = {
    f"{name}/{kind}": {"sliding_window": None, "rope_parameters": {"rope_theta": 10_000.0} | parameters}
    for name in ("llama", "mistral", "qwen2")
    for kind, parameters in STATIC.items()
}
EVERY = PACKED | PADDED | STEADY | BY_LENGTH

RNG = np.random.default_rng(0)


def ids(length):
    return RNG.integers(2, 97, length).tolist()


EXAMPLES = [
    Example(ids(5), ids(4), ids(7)),
    Example(ids(24), ids(30), ids(9)),
    Example(ids(20), ids(5), ids(40)),  # its answers lie on either side of the original length
    Example(ids(8), ids(24), ids(25)),  # just so long, and one token more
    Example(ids(3), ids(60), ids(60)),
]


def alone(model, prompt, answer):
    """The plain computation by a model that has computed nothing before."""
    logps = copy.deepcopy(model)(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) - 1 + place, token] for place, token in enumerate(answer))


def all_alone(model, examples):
    chosen = [alone(model, e.prompt, e.chosen) for e in examples]
    return torch.stack(chosen + [alone(model, e.prompt, e.rejected) for e in examples]).float()


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_neighbours_and_history_change_nothing(name):
    model = family(name, EVERY[name])
    expected_S = all_alone(model, EXAMPLES)
    use_packing(model)
    order = list(range(len(EXAMPLES)))
    for places in (order, order[::-1], order):
        found_S = completion_logps(model, collate([EXAMPLES[place] for place in places])).logps_S
        both = places + [place + len(EXAMPLES) for place in places]
        torch.testing.assert_close(found_S, expected_S[both], rtol=1e-5, atol=1e-4)
