"""Whole weights from a trainer's GPU to a sampler's, by vLLM's own transfers: after it the sampler's log-probabilities
are the trainer's. NCCL between two devices, CUDA IPC on one, with the sampler asleep in between."""

from __future__ import annotations

import os

import pytest
import torch

from dpo_service.online.actors import Place, start_actor, start_pool
from dpo_service.online.device_transfer import DeviceSender, SamplersClient, ask_actors, free_address
from dpo_service.online.port import Weights
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.train.optim import trained_parameters
from dpo_service.train.policy import load_model
from tests.models import save_tiny_llama
from tests.unit.online.sampler_kit import CLOSE, Policy, some_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = SamplingSpec(n=2, max_tokens=24)
OWN = SamplerSpec(gpus=1, dtype="float32", max_num_seqs=4, kv_cache_bytes=64 << 20)
SHARED = OWN.model_copy(update={"shares_device": True})


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    ray.init(num_cpus=4, num_gpus=torch.cuda.device_count(), include_dashboard=False)
    yield ray
    ray.shutdown()


class OnGpu(Policy):
    """The trainer's policy on a device; its own log-probabilities are computed on the CPU, in float32."""

    def __init__(self, model_dir, device):
        super().__init__(model_dir, None, adapter=False)
        self.sent = load_model(model_dir, device)

    def train(self):
        super().train()
        own = trained_parameters(self.model)
        with torch.no_grad():
            for name, parameter in trained_parameters(self.sent).items():
                parameter.copy_(own[name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: one trains, one samples")
async def test_by_nccl_the_samplers_log_probabilities_are_the_trainers(tmp_path, cluster):
    model_dir = save_tiny_llama(tmp_path)
    # Ray gives the sampler the first device that is free, which is the first.
    policy = OnGpu(model_dir, "cuda:1")
    torch.cuda.set_device(1)
    pool = await start_pool(OWN, model_dir, 0, n=2)
    try:
        await follows(pool, policy, OWN)
    finally:
        await pool.close()


async def test_by_ipc_on_one_device_in_turns(tmp_path, cluster):
    model_dir = save_tiny_llama(tmp_path)
    torch.cuda.set_device(0)
    policy = OnGpu(model_dir, "cuda:0")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    here = Place(cluster.get_runtime_context().get_node_id(), visible)
    pool = await start_pool(SHARED, model_dir, 0, n=2, beside=(here,))
    try:
        await pool.sleep()
        await follows(pool, policy, SHARED)
    finally:
        await pool.close()


async def follows(pool, policy, spec):
    """The sampler, before and after three transfers, asleep where it shares the device."""
    handles = [member.sampler.handle for member in pool.members]
    client = SamplersClient(handles, ask_actors)
    sender = DeviceSender(policy.sent, spec, rank=0, client=client, address=free_address)
    sender.check()
    prompts = some_prompts()
    for version in (1, 2, 3):
        policy.train()
        sender.send(version)
        await pool.sync(Weights(version, "device"))
        await pool.wake()
        answers = await pool.sample(prompts, OPTIONS)
        assert {sample.version for some in answers for sample in some} == {version}
        assert policy.gap(prompts, answers) < CLOSE
        asleep = torch.cuda.mem_get_info()[0]
        await pool.sleep()
        if spec.shares_device:
            assert torch.cuda.mem_get_info()[0] > asleep, "asleep it leaves its memory to the trainer"


async def test_a_sampler_beside_a_worker_is_on_the_workers_device(tmp_path, cluster):
    """It has booked nothing and computes all the same."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[-1]
    here = Place(cluster.get_runtime_context().get_node_id(), visible)
    sampler = start_actor(SHARED, save_tiny_llama(tmp_path), 0, beside=here)
    try:
        assert await sampler.version() == 0
        (answers,) = await sampler.sample(some_prompts(1), OPTIONS)
        assert len(answers) == 2
    finally:
        await sampler.close()
