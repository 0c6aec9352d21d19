"""Sums stay in one tensor until they are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo_service.specs.loss import LossSpec
from dpo_service.train import metrics
from dpo_service.train.batch import collate, padded
from dpo_service.train.logprobs import Completions
from dpo_service.train.losses import LossInputs, sigmoid
from dpo_service.train.rows import Example

CPU = torch.device("cpu")


def test_sums_add_what_the_host_and_the_device_know():
    sums, other = metrics.Sums(["a", "b"], CPU), metrics.Sums(["a", "b"], CPU)
    sums.add({"b": 2**25 + 1, "a": torch.tensor(0.5)})
    other.add({"a": 1.0, "b": torch.tensor(3)})
    sums.merge(other)
    assert sums.read() == {"a": 1.5, "b": 2.0**25 + 4}
    assert float(sums["a"]) == 1.5


@pytest.mark.parametrize("values", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_every_name_is_given(values):
    with pytest.raises(AssertionError):
        metrics.Sums(["a", "b"], CPU).add(values)


def pairs(seed: int, count: int):
    """A micro-batch of random pairs, and log-probabilities of its answers."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    lengths = rng.integers(1, 20, (count, 3))
    batch = collate([Example(*([3] * int(length) for length in row), truncated=bool(row[0] % 2)) for row in lengths])
    logps_S, reference_S = (-40 * torch.rand(2 * count, generator=generator) for _ in range(2))
    inputs = LossInputs(
        chosen_P=logps_S[:count],
        rejected_P=logps_S[count:],
        chosen_tokens_P=batch.lengths_S[:count],
        rejected_tokens_P=batch.lengths_S[count:],
        ref_chosen_P=reference_S[:count],
        ref_rejected_P=reference_S[count:],
    )
    return batch, inputs


def test_metrics_of_parts_are_those_of_all_pairs():
    """Of micro-batches of unlike size, as numpy has them over all pairs at once."""
    total, spec, made = (
        metrics.empty("pairs", CPU),
        LossSpec(name="sigmoid"),
        [pairs(seed, 3 + 7 * seed) for seed in (0, 1)],
    )
    for batch, inputs in made:
        completions = Completions(torch.empty(0), torch.empty(0), torch.empty(0))
        work = metrics.of_work(batch, packed=True, flops=1.0)
        total.add(metrics.of_batch(batch, completions, inputs, sigmoid(inputs, spec), spec) | work)
    values = metrics.means(total.read(), "sigmoid")
    gap = torch.cat([i.chosen_tokens_P - i.rejected_tokens_P for _, i in made]).double().numpy()
    margin = torch.cat(
        [0.1 * ((i.chosen_P - i.ref_chosen_P) - (i.rejected_P - i.ref_rejected_P)) for _, i in made]
    ).numpy()
    displaced = torch.cat([i.chosen_P < i.ref_chosen_P for _, i in made]).float().mean()
    assert values["length/gap"] == pytest.approx(gap.mean())
    assert values["length/margin_correlation"] == pytest.approx(np.corrcoef(gap, margin)[0, 1], abs=1e-6)
    assert values["logps/displaced_share"] == pytest.approx(float(displaced))
    assert values["rewards/margins"] == pytest.approx(margin.mean(), abs=1e-6)
    assert values["padding_share"] == 0.0


def test_what_does_not_vary_has_no_correlation():
    sums = {"rows": 3.0, "rewards/chosen": 0.3, "rewards/rejected": 0.0, "margin_margin": 0.03, "gap_margin": 0.1}
    assert metrics.length_correlation(sums | {"gap": 1.0, "gap_gap": 3.0}) is None  # margins 0.1, 0.1, 0.1
    assert (
        metrics.length_correlation(sums | {"gap": 6.0, "gap_gap": 12.0, "margin_margin": 0.05}) is None
    )  # gaps 2, 2, 2
    assert metrics.length_correlation(sums | {"gap": 0.0, "gap_gap": 0.0, "margin_margin": 0.05}) is None


def test_a_chosen_answer_that_fell_by_rounding_only_is_not_displaced():
    reference_P = torch.tensor([-100.0, -100.0, -100.0])
    inputs = LossInputs(
        chosen_P=torch.tensor([-100.001, -100.02, -99.0]),
        rejected_P=torch.zeros(3),
        chosen_tokens_P=torch.ones(3),
        rejected_tokens_P=torch.ones(3),
        ref_chosen_P=reference_P,
        ref_rejected_P=torch.zeros(3),
    )
    assert metrics._of_lengths(inputs, torch.zeros(3))["displaced"] == 1


def test_padding_is_what_the_padded_rows_hold_beside_tokens():
    batch, _ = pairs(0, 5)
    rows = padded(batch)
    expected = 1 - int(rows.attention_mask_BL.sum()) / rows.attention_mask_BL.numel()
    work = metrics.of_work(batch, packed=False, flops=1.0)
    assert work["padding"] / work["places"] == pytest.approx(expected)
    assert metrics.of_work(batch, packed=True, flops=1.0) == {
        "places": batch.input_ids_BL.numel(),
        "padding": 0,
        "flops": 1.0,
    }


def test_utilisation_is_useful_work_over_the_measured_rate():
    assert metrics.utilisation({"flops": 3e9}, 2.0, 6e9) == {"mfu": 0.25}


def test_peak_memory_counts_what_was_held():
    before = metrics.peak_memory_gib(CPU)
    held = torch.ones(2**27)  # half a GiB
    assert metrics.peak_memory_gib(CPU) >= before
    assert metrics.peak_memory_gib(CPU) > held.numel() * 4 / 2**30
