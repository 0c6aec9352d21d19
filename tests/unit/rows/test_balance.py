"""When the two sides of an unpaired file do not weigh alike."""

import pytest

from dpo_service.manifests.dataset import DatasetReport
from dpo_service.rows.balance import imbalance, notes
from dpo_service.specs.loss import LossSpec


def note(desirable, undesirable, loss="kto", **weights):
    report = DatasetReport(format="unpaired", rows=9, kept=9, desirable=desirable, undesirable=undesirable)
    return imbalance(report, LossSpec(name=loss, **weights))


@pytest.mark.parametrize(("desirable", "undesirable", "weight"), [(30, 30, 1), (40, 30, 1), (10, 30, 3), (10, 30, 4)])
def test_within_what_the_authors_advise_nothing_is_said(desirable, undesirable, weight):
    assert note(desirable, undesirable, desirable_weight=weight) is None


def test_outside_the_weight_that_mends_it_is_named():
    assert "weigh 0.33 times" in note(10, 30)
    assert "a desirable_weight of 3.00 to 4.00" in note(10, 30)
    assert "a desirable_weight of 1.00 to 1.33" in note(20, 10, undesirable_weight=2, desirable_weight=2)
    assert "no answer is undesirable" in note(10, 0)
    assert "no answer is desirable" in note(0, 10)


def test_probabilities_that_the_loss_does_not_look_at_are_told():
    report = DatasetReport(format="trl_text", rows=9, kept=9, judged=4)
    assert "4 pairs have a chosen_probability" in notes(report, LossSpec(name="hinge"))[0]
    assert notes(report, LossSpec(name="sppo")) == []


def test_other_losses_have_no_sides():
    assert note(10, 30, loss="sft") is None
    report = DatasetReport(format="trl_text", rows=9, kept=9)
    assert imbalance(report, LossSpec(name="kto")) is None
