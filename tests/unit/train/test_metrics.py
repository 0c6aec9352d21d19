"""Sums stay in one tensor until they are read."""

from __future__ import annotations

import pytest
import torch

from dpo_service.train import metrics

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
