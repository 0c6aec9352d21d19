"""What holds of a cancellation alone; test_wishes.py has what it shares with a pause."""

from __future__ import annotations

import pytest

from dpo_service.jobs.cancel import cancel
from dpo_service.jobs.states import State
from tests.unit.jobs.world import World


async def test_a_cancelled_job_has_ended(world: World) -> None:
    job_id = await world.submit()
    job = await cancel(world.database, job_id, clock=world.clock)
    assert job.job_state is State.CANCELLED
    assert job.finished_at == world.clock.now()


@pytest.mark.parametrize("retryable", [True, False])
async def test_a_job_that_failed_in_the_race_is_cancelled(world: World, retryable: bool) -> None:
    job_id = await world.running()
    world.fail(job_id, retryable=retryable)
    await cancel(world.database, job_id, clock=world.clock)
    await world.tick()
    job = await world.job(job_id)
    assert (job.job_state, job.error_code) == (State.CANCELLED, None)
