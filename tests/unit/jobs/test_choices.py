"""What the service decides of a step's memory and arithmetic where a job says nothing."""

from __future__ import annotations

import pytest

from dpo_service.errors import InvalidSpec
from dpo_service.jobs import choices
from dpo_service.specs.run import BatchSpec
from tests.unit.jobs.world import job_spec

SMALL, LARGE = 24 * 896, 32 * 4096
"""Layers times hidden size of models with 0.5 and 8 billion weights."""


@pytest.mark.parametrize(
    ("gpus", "asked", "width", "on"),
    [
        (0, "auto", LARGE, False),
        (1, "auto", LARGE, True),
        (1, "auto", SMALL, False),
        (1, "auto", 0, False),
        (0, True, SMALL, True),
        (1, False, LARGE, False),
    ],
)
def test_activations_are_recomputed_where_they_would_fill_a_gpu(gpus, asked, width, on):
    spec = job_spec(activation_checkpointing=asked, resources={"gpus_per_worker": gpus})
    batch = BatchSpec(batch_size=8, micro_batch_size=4, n_epochs=1)
    assert choices._activation_checkpointing(spec, batch, 1024, width) is on


@pytest.mark.parametrize(
    ("asked", "own", "weight"),
    [("auto", None, 0.0), ("auto", 0.02, 0.02), (0, 0.02, 0.0), (0.1, 0.02, 0.1), (0, None, 0)],
)
def test_a_mixture_is_trained_with_its_own_router_loss(asked, own, weight):
    assert choices._router(job_spec(router_aux_loss_coef=asked), own) == weight


@pytest.mark.parametrize(
    ("fields", "own", "param", "mend"),
    [
        ({"router_aux_loss_coef": 0.1}, None, "router_aux_loss_coef", "remove router_aux_loss_coef"),
        ({"compile": True}, 0.02, "compile", "set compile to false"),
    ],
)
def test_a_router_loss_that_cannot_be_had_is_refused(fields, own, param, mend):
    with pytest.raises(InvalidSpec, match=mend) as refused:
        choices._router(job_spec(**fields), own)
    assert refused.value.param == param
