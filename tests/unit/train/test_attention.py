"""Packed rows give what padded ones give: values and gradients, family by family."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_service.train.attention.interface import row_layout, segment_attention, using
from dpo_service.train.attention.layout import Segment
from dpo_service.train.batch import collate
from dpo_service.train.logprobs import completion_logps, packs, padded_because, use_packing
from dpo_service.train.policy import base_of, load_model
from dpo_service.train.rows import Example
from tests.unit.train.families import PACKED, PADDED, TINY, family
from tests.unit.train.training_kit import VOCAB, Recorder, build_model, make_job

_ids = st.lists(st.integers(0, TINY["vocab_size"] - 1), min_size=1, max_size=12)
_pairs = st.lists(st.builds(Example, prompt=_ids, chosen=_ids, rejected=_ids), min_size=1, max_size=4)


def random_pairs(count, seed=0, *, paired=True):
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(0, TINY["vocab_size"], rng.integers(1, 24)).tolist()

    return [Example(prompt=ids(), chosen=ids(), rejected=ids() if paired else None) for _ in range(count)]


def both_ways(model, examples):
    """Log-probabilities and all gradients of the packed and of the padded computation."""
    batch = collate(examples)
    weights_S = torch.linspace(-1, 1, batch.sequences)
    results = []
    for keep in (True, False):
        other = copy.deepcopy(model)
        other._dpo_packs = keep
        logps_S = completion_logps(other, batch).logps_S
        (logps_S * weights_S).sum().backward()
        results.append((logps_S.detach(), {name: p.grad for name, p in other.named_parameters() if p.grad is not None}))
    return results


def assert_same(packed, plain):
    logps_S, gradients = packed
    assert torch.allclose(logps_S, plain[0], rtol=1e-5, atol=1e-5)
    assert gradients.keys() == plain[1].keys()
    for name, gradient in gradients.items():
        # Of two equal answers they cancel, and what is left of either way is rounding.
        scale = plain[1][name].abs().max().clamp(min=1.0)
        assert (gradient - plain[1][name]).abs().max() <= 3e-5 * scale, name


@pytest.fixture(scope="module", params=PACKED)
def model(request):
    model = family(request.param, PACKED[request.param])
    assert use_packing(model), "this family is one of those whose attention is replaced"
    return model


@pytest.mark.parametrize("seed", range(3))
def test_pairs_equal_the_padded_computation(model, seed):
    assert_same(*both_ways(model, random_pairs(5, seed)))


def test_answers_equal_the_padded_computation(model):
    assert_same(*both_ways(model, random_pairs(5, paired=False)))


def test_no_pair_sees_another_and_no_answer_the_other(model):
    """Changing one thing changes nothing that does not follow from it."""
    first, second = random_pairs(2)
    logps_S = completion_logps(model, collate([first, second])).logps_S
    changed = Example(prompt=first.prompt, chosen=[*first.chosen[::-1], 3], rejected=first.rejected)
    other_S = completion_logps(model, collate([changed, second])).logps_S
    assert not torch.isclose(logps_S[0], other_S[0])
    assert torch.allclose(logps_S[1:], other_S[1:], rtol=1e-6, atol=1e-5)


@pytest.fixture(scope="module")
def llama():
    model = family("llama", PACKED["llama"])
    assert use_packing(model)
    return model


@given(examples=_pairs)
@settings(max_examples=30, deadline=None)
def test_any_shapes_equal_the_padded_computation(llama, examples):
    assert_same(*both_ways(llama, examples))


def test_gradient_checkpointing_recomputes_with_the_same_layout(llama):
    batch, gradients = collate(random_pairs(4)), []
    for on in (False, True):
        model = copy.deepcopy(llama).train()
        if on:
            model.gradient_checkpointing_enable()
        completion_logps(model, batch).logps_S.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_two_models_by_turns_do_not_mix_their_layouts(llama):
    other, first, second = copy.deepcopy(llama), collate(random_pairs(3, 1)), collate(random_pairs(4, 2))
    expected = [completion_logps(llama, batch).logps_S for batch in (first, second)]
    mine = completion_logps(llama, first).logps_S
    with torch.no_grad():
        theirs = completion_logps(other, second).logps_S
    mine.sum().backward()
    llama.zero_grad()
    assert torch.equal(mine, expected[0])
    assert torch.equal(theirs, expected[1])


def test_a_call_without_a_layout_is_the_models_own(llama):
    """Generation and anything else that knows nothing of packing, padding included."""
    ids, mask = torch.tensor([[5, 6, 7, 8], [1, 1, 9, 4]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    own = family("llama", PACKED["llama"])
    assert torch.allclose(
        llama(input_ids=ids, attention_mask=mask).logits[:, 2:],
        own(input_ids=ids, attention_mask=mask).logits[:, 2:],
        atol=1e-5,
    )
    generated = [m.generate(ids[:1], max_new_tokens=4, do_sample=False).tolist() for m in (llama, own)]
    assert generated[0] == generated[1]


REASONS = {
    "mamba": "cannot be replaced",
    "recurrent_gemma": "not give the same result packed",
    "qwen3_next": "not give the same result packed",
    "deepseek_v32": "attention with indices",
    "gpt_oss": "s_aux",
    "qwen2_moe": "do not say how far their attention reaches",
}


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_cannot_is_computed_padded_and_says_so(name, caplog):
    model, own = family(name, PADDED[name]), family(name, PADDED[name])
    assert not use_packing(model)
    assert "is computed padded" in caplog.text
    assert REASONS[name] in padded_because(model)
    assert not packs(model)
    assert model.config._attn_implementation == own.config._attn_implementation
    batch = collate(random_pairs(3))
    logps_S = completion_logps(model, batch).logps_S
    assert torch.equal(logps_S, completion_logps(own, batch).logps_S)
    logps_S.sum().backward()
    unlearnt = {n for n, _ in model.named_parameters() if "indexer" in n}  # what chooses keys has no gradient
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if n not in unlearnt)


def test_a_model_that_leaks_along_the_row_is_computed_padded(caplog):
    """A layer that carries what one pair said into the next is found by trying, not by name."""
    model = family("qwen2", {})
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _module, _inputs, output: output + output.cumsum(1))
    assert not use_packing(model)
    assert "does not give the same result" in caplog.text


def test_loading_a_model_packs_and_its_adapter_too(model_dir, tmp_path):
    from dpo_service.specs.adapter import LoraSpec
    from dpo_service.train.policy import add_adapter

    model = load_model(model_dir)
    assert packs(model)
    policy = add_adapter(model, LoraSpec(rank=2), 0)
    assert packs(base_of(policy))
    batch = collate(random_pairs(2))
    assert torch.allclose(
        completion_logps(base_of(policy), batch).logps_S,
        completion_logps(load_model(model_dir), batch).logps_S,
    )
    model.config.save_pretrained(tmp_path)
    assert "dpo_segments" not in (tmp_path / "config.json").read_text()


def test_a_layer_that_asks_for_more_is_refused():
    tensor = torch.zeros(1, 1, 3, 8)
    layout = row_layout([Segment(0, 1, 1, 1)], tensor.device)
    for asked in ({"s_aux": tensor}, {"position_bias": tensor}, {"dropout": 0.1}):
        with pytest.raises(NotImplementedError, match=next(iter(asked))):
            segment_attention(torch.nn.Identity(), tensor, tensor, tensor, None, segment_layout=layout, **asked)


def test_chunked_attention_which_a_short_trial_cannot_show_is_computed_padded():
    model = family("llama", PACKED["llama"])
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert not use_packing(model)
    assert "chunked" in padded_because(model)


def test_a_padded_model_learns_the_same_from_a_pair_beside_others():
    """State spaces read on to the padding, never into it from another sequence."""
    model = family("qwen3_next", PADDED["qwen3_next"])
    use_packing(model)
    first, second = random_pairs(2)
    together = completion_logps(model, collate([first, second])).logps_S
    assert torch.allclose(together[[0, 2]], completion_logps(model, collate([first])).logps_S, rtol=1e-5, atol=1e-5)


def test_a_run_says_why_its_model_is_computed_padded_and_learns(tmp_path):
    directory = build_model(tmp_path / "model")
    family("qwen3_next", PADDED["qwen3_next"] | {"vocab_size": VOCAB}).save_pretrained(directory)
    recorder = Recorder()
    job = make_job(tmp_path, directory, reference="live", rows=8, batch_size=8, steps=4, validation=0, shuffle=False)
    job.train(reports=recorder)
    assert any("computed padded" in text and "not give the same result" in text for text in recorder.messages)
    assert recorder.losses()[-1] < recorder.losses()[0]


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_gives_the_same_by_every_backend(backend):
    model, batch = family("gemma3_text", PACKED["gemma3_text"]), collate(random_pairs(3))
    with torch.no_grad():
        expected_S = completion_logps(model, batch).logps_S
        assert use_packing(model)
        with using(backend):
            assert torch.allclose(completion_logps(model, batch).logps_S, expected_S, rtol=1e-5, atol=1e-5)
