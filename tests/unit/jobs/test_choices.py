"""What the service decides of a step's memory and arithmetic where a job says nothing."""

from __future__ import annotations

import pytest

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
