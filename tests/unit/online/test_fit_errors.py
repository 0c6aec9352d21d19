"""What ends a run comes from the curator's process to the driver as what it is."""

from __future__ import annotations

import copy

import pytest

from dpo_service.errors import (
    InvalidSpec,
    JudgeError,
    NonFiniteLoss,
    SamplerLost,
    SpendCapReached,
    TooFewVerdicts,
    TrainingError,
)
from dpo_service.online.fit import _named
from dpo_service.train.ray_worker import ERRORS, name_of


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TooFewVerdicts("few"), TooFewVerdicts),
        (SpendCapReached("spent", spent=2.0, cap=1.0), JudgeError),
        (SamplerLost("lost"), SamplerLost),
        (InvalidSpec("no key"), TrainingError),
    ],
)
def test_it_is_the_nearest_kind_that_a_sentence_makes_and_says_the_same(error, kind):
    with pytest.raises(TrainingError) as raised, _named():
        raise error
    sent = copy.copy(raised.value)  # by what it would be sent as
    assert (type(sent), sent.message, sent.retryable) == (kind, error.message, kind.retryable)


def test_a_worker_names_it_for_the_driver():
    assert {name_of(kind("x")) for kind in ERRORS.values()} == set(ERRORS)
    assert name_of(NonFiniteLoss("x")) == "NonFiniteLoss"
