"""Samplers as Ray actors: killed, restarted, given the newest weights; and gone when they are closed."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from ray.util import placement_group, remove_placement_group

from dpo_service.errors import TrainingError
from dpo_service.online.actors import bundles, start_pool
from dpo_service.online.weights import WeightsFolder
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from tests.actors import running
from tests.models import save_tiny_llama
from tests.unit.online.sampler_kit import Policy, some_prompts

pytestmark = pytest.mark.ray
OPTIONS = SamplingSpec(n=2, max_tokens=120)
BFLOAT16 = SamplerSpec(max_num_seqs=4, kv_cache_bytes=32 << 20, dtype="bfloat16")
ROUNDED = 3e-2
"""Nats a token: the sampler's weights and arithmetic have 8 bits of mantissa, the trainer's 24."""


def sampler_processes(cluster) -> list[psutil.Process]:
    return running(cluster.temp_dir, "SamplerActor")


async def test_a_killed_sampler_is_restarted_with_the_newest_weights(tmp_path, ray_connected):
    model_dir, folder = save_tiny_llama(tmp_path / "model"), WeightsFolder(1 << 20, tmp_path)
    policy, prompts = Policy(model_dir, folder, adapter=False), some_prompts(8)
    group = placement_group(bundles(BFLOAT16))
    pool = await start_pool(BFLOAT16, model_dir, 0, n=2, placement=group, bundles=(0,))
    try:
        policy.train()
        await pool.sync(policy.publish(5, "bfloat16"))
        sampling = asyncio.create_task(pool.sample(prompts, OPTIONS))
        await asyncio.sleep(0.1)
        (victim,) = sampler_processes(ray_connected)
        victim.kill()
        answers = await sampling
        assert {sample.version for some in answers for sample in some} == {5}
        assert policy.gap(prompts, answers) < ROUNDED
        assert (pool.counts.lost, pool.counts.retried > 0) == (1, True)
        (restarted,) = sampler_processes(ray_connected)
        assert restarted.pid != victim.pid
    finally:
        await pool.close()
        remove_placement_group(group)
        folder.remove()
    psutil.wait_procs([restarted], timeout=20)
    assert sampler_processes(ray_connected) == []
    assert not folder.path.exists()


async def test_a_model_that_cannot_be_loaded_says_why_and_leaves_no_actor_behind(tmp_path, ray_connected):
    with pytest.raises(TrainingError, match=r"process has died: .*config\.json"):
        await start_pool(SamplerSpec(max_restarts=0), tmp_path, 0, n=2)
    psutil.wait_procs(sampler_processes(ray_connected), timeout=20)
    assert sampler_processes(ray_connected) == []
