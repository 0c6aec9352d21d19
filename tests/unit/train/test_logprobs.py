"""Completion log-probabilities equal the plain computation, however the batch is laid out or cut."""

from __future__ import annotations

import copy

import pyarrow as pa
import pytest
import torch

from dpo_service.specs.run import BatchSpec
from dpo_service.train.batch import collate
from dpo_service.train.logprobs import completion_logps, split_head
from dpo_service.train.policy import load_model
from dpo_service.train.reference import ReferenceScorer
from dpo_service.train.rows import Example, RowTable
from tests.unit.train.training_kit import as_table, random_rows

FOUR = BatchSpec(batch_size=4, micro_batch_size=4, n_epochs=1)


@pytest.fixture(scope="module")
def model(model_dir):
    return load_model(model_dir)


@pytest.fixture(scope="module")
def examples():
    return RowTable(as_table(random_rows(6))).take(range(6))


def plain(model, prompt, answer):
    """One sequence at a time, whole logits, float64."""
    ids = torch.tensor([[*prompt, *answer]])
    logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(logps[place, token] for place, token in zip(places, answer, strict=True))


def test_equals_the_plain_computation(model, examples):
    logps_S = completion_logps(model, collate(examples)).logps_S
    expected = [plain(model, e.prompt, e.chosen) for e in examples]
    expected += [plain(model, e.prompt, e.rejected) for e in examples]
    assert logps_S.dtype == torch.float32
    assert torch.allclose(logps_S, torch.stack(expected).float(), atol=1e-4)


@torch.no_grad()
def test_tails_are_what_lies_past_the_shorter_answer(model, examples):
    completions = completion_logps(model, collate(examples))
    whole, rest = completions.logps_S.view(2, -1), completions.tail_S.view(2, -1)
    for row, example in enumerate(examples):
        shared = min(len(example.chosen), len(example.rejected))
        for side, answer in enumerate((example.chosen, example.rejected)):
            expected = float(plain(model, example.prompt, answer[:shared]))
            assert float(whole[side, row] - rest[side, row]) == pytest.approx(expected, abs=1e-4)
    alone = collate([Example(e.prompt, e.chosen) for e in examples])
    assert completion_logps(model, alone).tail_S.tolist() == [0] * len(examples)


@pytest.mark.parametrize("split", [(1.0, None), None])
@torch.no_grad()
def test_alignment_equals_the_plain_computation(model, examples, split):
    """log p(token) - log sum_v p(v)^2, from the whole distribution in float64."""
    other = copy.deepcopy(model)
    other._dpo_split_head = split
    batch = collate([Example(e.prompt, e.chosen) for e in examples])
    aligned_S = completion_logps(other, batch, aligned=True, chunk=5).aligned_S
    for example, found in zip(examples, aligned_S.tolist(), strict=True):
        ids = torch.tensor([[*example.prompt, *example.chosen]])
        probs = model(input_ids=ids).logits[0].double().softmax(-1)[len(example.prompt) - 1 : -1]
        picked = probs[range(len(example.chosen)), example.chosen]
        assert found == pytest.approx(float((picked / (probs**2).sum(-1)).log().sum()), abs=1e-4)


def test_padding_order_and_chunks_do_not_matter(model, examples):
    together = completion_logps(model, collate(examples)).logps_S.view(2, -1)
    backwards = completion_logps(model, collate(examples[::-1]), chunk=3).logps_S.view(2, -1).flip(1)
    alone = torch.stack([completion_logps(model, collate([e])).logps_S for e in examples], 1)
    assert torch.allclose(together, backwards, rtol=1e-6, atol=1e-5)
    assert torch.allclose(together, alone, rtol=1e-6, atol=1e-5)


def test_gradient_is_the_same_in_chunks(model, examples):
    gradients = []
    for chunk in (5, 10_000):
        other = copy.deepcopy(model)
        completion_logps(other, collate(examples), chunk=chunk).logps_S.sum().backward()
        gradients.append([parameter.grad for parameter in other.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*gradients, strict=True))


def test_model_that_scales_its_logits_is_not_split(model, examples):
    """Whole logits where the head is not all there is to them."""
    scaled = copy.deepcopy(model)
    del scaled._dpo_split_head
    forward = scaled.forward

    def doubled(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * 2
        return output

    scaled.forward = doubled
    assert split_head(scaled) is None
    assert split_head(model).module is model.lm_head
    logps_S = completion_logps(scaled, collate(examples)).logps_S
    expected = plain(scaled, examples[0].prompt, examples[0].chosen)
    assert logps_S[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_correct_counts_first_choices(model, examples):
    example = examples[0]
    ids = list(example.prompt)
    for _ in range(3):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    greedy = Example(prompt=example.prompt, chosen=ids[-3:])
    assert completion_logps(model, collate([greedy])).correct_S.tolist() == [3.0]


def test_batch_counts(examples):
    batch = collate(examples)
    assert (batch.rows, batch.sequences, batch.paired) == (6, 12, True)
    assert batch.tokens == sum(2 * len(e.prompt) + len(e.chosen) + len(e.rejected) for e in examples)
    assert batch.truncated == 2
    assert batch.lengths_S.tolist() == [len(e.chosen) for e in examples] + [len(e.rejected) for e in examples]
    assert batch.ref_chosen_P is None


def test_scorer_adds_columns_in_the_rows_own_order(model, model_dir, examples):
    table = as_table(random_rows(6))
    scored = ReferenceScorer(str(model_dir), "float32", FOUR)(table)
    assert scored.column_names == [*table.column_names, "ref_chosen", "ref_rejected"]
    assert scored.schema.field("ref_chosen").type == pa.float32()
    logps = completion_logps(model, collate(examples)).logps_S
    assert scored["ref_chosen"].to_pylist() == pytest.approx(logps[:6].tolist(), rel=1e-5)
    assert scored["ref_rejected"].to_pylist() == pytest.approx(logps[6:].tolist(), rel=1e-5)


def test_scorer_takes_an_empty_batch(model_dir):
    scored = ReferenceScorer(str(model_dir), "float32", FOUR)(as_table(random_rows(3)).slice(0, 0))
    assert scored.num_rows == 0
