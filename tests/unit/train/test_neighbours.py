"""A sequence's log-probabilities are those it has alone, whatever is computed beside it or was before it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from dpo_service.errors import TrainingError
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
# Tencent's: called dynamic, and of one base that `alpha` raises.
STEADY["hunyuan_v1_dense/dynamic"] = DYNAMIC | {
    "head_dim": 8,
    "rope_parameters": DYNAMIC["rope_parameters"] | {"alpha": 50.0},
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


FUZZED = {name: EVERY[name] for name in ("mistral/windowed", "gemma2", "qwen2/windowed", "qwen3", "phi3/longrope")}
FUZZED |= {name: EVERY[name] for name in ("gemma2/dynamic", "gemma3_text/dynamic", "llama/longrope")}


@pytest.mark.parametrize("name", FUZZED)
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_any_batch_is_that_of_each_sequence_alone(name, seed):
    """Windows, capped scores, grouped heads and frequencies of every kind, in batches of any lengths."""
    model, rng = family(name, FUZZED[name]), np.random.default_rng(seed)
    plain = copy.deepcopy(model)
    assert use_packing(model)
    few = [[rng.integers(2, 97, length).tolist() for length in rng.geometric(0.06, 3)] for _ in range(6)]
    examples = [Example(*example) for example in few[: rng.integers(1, 7)]]
    found_S = completion_logps(model, collate(examples)).logps_S
    torch.testing.assert_close(found_S, all_alone(plain, examples), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", BY_LENGTH)
@torch.no_grad()
def test_micro_batches_stay_packed_but_where_a_prompt_has_other_frequencies_with_either_answer(name):
    model = family(name, BY_LENGTH[name])
    use_packing(model)
    assert packs(model)
    within, longer, across, at_the_edge, alike = (collate([example]) for example in EXAMPLES)
    assert packed(model, within)
    assert not packed(model, across)
    assert not packed(model, at_the_edge)
    assert packed(model, alike), "equally long answers"
    assert packed(model, longer) == ("longrope" in name), "long ones share frequencies, or do not"
    assert packed(model, collate([EXAMPLES[0], EXAMPLES[4]]))
    assert not packed(model, collate(EXAMPLES))


@pytest.mark.parametrize("name", ["phi3/longrope", "llama/dynamic", "gemma3_text/dynamic"])
@pytest.mark.parametrize("chosen", [[0, 4], range(5)], ids=["packed", "padded"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_each_sequence_alone(name, chosen, recompute):
    model, examples = family(name, BY_LENGTH[name]), [EXAMPLES[place] for place in chosen]
    weights = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}

    def plain(prompt, answer):
        output = functional_call(copy.deepcopy(model), weights, kwargs={"input_ids": torch.tensor([prompt + answer])})
        logps = output.logits[0].log_softmax(-1)
        return sum(logps[len(prompt) - 1 + place, token] for place, token in enumerate(answer))

    margins = [plain(e.prompt, e.chosen) - plain(e.prompt, e.rejected) for e in examples]
    expected = torch.autograd.grad(sum(margins), list(weights.values()))
    use_packing(model)
    if recompute:
        recompute_layers(model, random=False)
    logps_2P = completion_logps(model, collate(examples)).logps_S.view(2, -1)
    # A recomputed layer comes after another forward pass.
    completion_logps(model, collate([EXAMPLES[2]]))
    (logps_2P[0] - logps_2P[1]).sum().backward()
    for wanted, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.norm()))


ENCODER = {"hidden_size": 32, "vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0}


@pytest.mark.parametrize(
    ("name", "added", "reason"),
    [
        ("roberta", {"is_decoder": True}, "beside longer ones"),  # its positions begin after its padding token's id
        ("cpmant", {"dim_head": 8, "prompt_length": 4}, "beside longer ones"),  # it pads on the left, and itself
        ("bert", {}, "see those after them"),
    ],
)
def test_a_model_that_is_not_computed_a_sequence_at_a_time_is_refused(name, added, reason):
    model = family(name, ENCODER | added)
    with pytest.raises(TrainingError, match=reason):
        use_packing(model)


def test_an_encoder_made_a_decoder_is_accepted():
    model = family("bert", ENCODER | {"is_decoder": True})
    expected_S = all_alone(model, EXAMPLES)
    use_packing(model)
    torch.testing.assert_close(completion_logps(model, collate(EXAMPLES)).logps_S, expected_S, rtol=1e-5, atol=1e-4)


def test_padding_lengthens_no_sequence():
    positions = padded(collate([Example([5, 6], [7], [8, 9, 10])])).position_ids_BL
    assert positions.tolist() == [[0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]


def test_runs_are_neighbours_that_share_frequencies():
    positions = np.array([0, 1, 2, 0, 1, 0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 3])
    assert runs(positions, Kinds(3, one_beyond=True)) == [(0, 0, 5), (4, 5, 16)]
    assert runs(positions, Kinds(3, one_beyond=False)) == [(0, 0, 5), (5, 5, 12), (4, 12, 16)]
    assert runs(np.array([7]), Kinds(3, one_beyond=True)) == [(4, 0, 1)], "a single step of a generation"


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("phi3/longrope", Kinds(ORIGINAL, True)),
        ("phimoe/longrope", Kinds(ORIGINAL, True)),
        ("llama/dynamic", Kinds(ORIGINAL, False)),
        ("gemma3_text/dynamic", Kinds(ORIGINAL, False)),
        *((name, None) for name in STEADY),
    ],
)
def test_what_lengths_share_is_found_by_trying(name, kinds):
    rotary = family(name, EVERY[name]).model.rotary_emb
    assert kinds_of(rotary, 2 * LONGEST) == kinds


def test_models_of_one_set_of_frequencies_stay_as_they_are():
    for name in ("llama", "gemma3_text", *STEADY):
        model = family(name, EVERY[name])
        use_packing(model)
        assert not any(isinstance(module, OwnFrequencies) for module in model.modules())


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    directory = build_model(tmp_path_factory.mktemp("phi"))
    family("phi3/longrope", BY_LENGTH["phi3/longrope"] | {"vocab_size": VOCAB}).save_pretrained(directory)
    return directory


def mixed_rows(count):
    rng = np.random.default_rng(1)

    def some(low, high):
        return [rng.integers(4, VOCAB, rng.integers(low, high)).tolist() for _ in range(count)]

    columns = {"index": list(range(count)), "truncated": [False] * count}
    return columns | {"prompt": some(3, 20), "chosen": some(2, 40), "rejected": some(2, 40)}


@pytest.mark.parametrize("reference", ["cached", "live"])
@pytest.mark.parametrize("lora", [None, LoraSpec(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("micro", [1, 4])
def test_a_policy_that_has_not_moved_has_a_loss_of_ln_2(tmp_path, phi, reference, lora, micro):
    reports = Recorder()
    job = make_job(
        tmp_path, phi, reference=reference, lora=lora, columns=mixed_rows(16), validation=4, steps=2,
        learning_rate=1e-9, micro_batch_size=micro, activation_checkpointing=True,
    )  # fmt: skip
    job.train(reports=reports)
    assert reports.losses() == pytest.approx([math.log(2)] * 2, abs=2e-6)


@torch.no_grad()
def test_the_checkpoint_on_disk_is_computed_so_too(phi):
    model = load_model(phi)
    expected_S = all_alone(load_model(phi), EXAMPLES)
    assert any(isinstance(module, OwnFrequencies) for module in model.modules())
    torch.testing.assert_close(completion_logps(model, collate(EXAMPLES)).logps_S, expected_S, rtol=1e-5, atol=1e-4)
    assert set(model.state_dict()) == set(family("phi3", BY_LENGTH["phi3/longrope"]).state_dict())
