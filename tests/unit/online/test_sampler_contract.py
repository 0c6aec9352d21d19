"""What every sampler keeps to, the fake and vLLM in a Ray actor: token ids in and out, log-probabilities that are the
trainer's before and after new weights, and bad weights refused before anything is touched."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from dpo_service.errors import SamplerLost, WeightsRefused
from dpo_service.online.actors import start_actor
from dpo_service.online.fake_sampler import FakeSampler
from dpo_service.online.port import Sampler
from dpo_service.online.weights import WeightsFolder
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from tests.models import save_tiny_llama
from tests.unit.online.sampler_kit import CLOSE, Policy, some_prompts

END = 1
OPTIONS = SamplingSpec(n=3, max_tokens=20)
SPECS = {
    "full": SamplerSpec(max_num_seqs=6, kv_cache_bytes=32 << 20),
    "adapter": SamplerSpec(max_num_seqs=6, kv_cache_bytes=32 << 20, lora_rank=4),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def actors(request, model_dir):
    """Both of vLLM's samplers, started side by side when a test first asks for one."""
    request.getfixturevalue("ray_connected")
    started = {kind: start_actor(spec, model_dir, 0) for kind, spec in SPECS.items()}
    yield started
    for sampler in started.values():
        asyncio.run(sampler.close())


@pytest.fixture
def folder(tmp_path):
    made = WeightsFolder(1 << 20, tmp_path)
    yield made
    made.remove()


@pytest.fixture(params=["full", "adapter"])
def kind(request):
    return request.param


@pytest.fixture(params=["fake", pytest.param("vllm", marks=pytest.mark.ray)])
def sampler(request, kind, model_dir) -> Sampler:
    if request.param == "fake":
        return FakeSampler(SPECS[kind], model_dir, 0)
    return request.getfixturevalue("actors")[kind]


@pytest.fixture
async def policy(sampler, kind, model_dir, folder):
    """The policy whose weights `sampler` has."""
    made = Policy(model_dir, folder, adapter=kind == "adapter")
    await sampler.sync(made.publish(await sampler.version() + 1))
    return made


async def test_answers_are_token_ids_with_the_trainers_log_probabilities(sampler, policy):
    prompts = some_prompts()
    answers = await sampler.sample(prompts, SamplingSpec(n=4, max_tokens=70, temperature=1.3, top_p=0.9))
    samples = [sample for some in answers for sample in some]
    assert [len(some) for some in answers] == [4] * len(prompts)
    assert all(len(sample.logps) == len(sample.token_ids) <= 70 for sample in samples)
    assert all(sample.finished == (sample.token_ids[-1] == END) for sample in samples)
    assert all(END not in sample.token_ids[:-1] for sample in samples)
    assert {sample.finished for sample in samples} == {True, False}
    # Temperature and top_p choose the tokens; the log-probabilities are the policy's own.
    assert policy.gap(prompts, answers) < CLOSE


async def test_answers_are_a_function_of_the_seed(sampler, policy):
    prompts = some_prompts()
    once, again = await sampler.sample(prompts, OPTIONS), await sampler.sample(prompts[::-1], OPTIONS)
    tokens = [[sample.token_ids for sample in some] for some in once]
    assert tokens == [[sample.token_ids for sample in some] for some in again[::-1]]
    assert len({ids for some in tokens for ids in some}) == len(prompts) * OPTIONS.n
    others = await sampler.sample(some_prompts(step=1), OPTIONS)
    assert all(sample.token_ids not in some for some, other in zip(tokens, others, strict=True) for sample in other)


async def test_after_a_sync_the_distribution_is_the_trainers(sampler, policy):
    prompts, before = some_prompts(), await sampler.version()
    old = await sampler.sample(prompts, OPTIONS)
    policy.train()
    assert policy.gap(prompts, old) > 10 * CLOSE
    synced = await sampler.sync(policy.publish(before + 1))
    assert (synced.version, await sampler.version()) == (before + 1, before + 1)
    answers = await sampler.sample(prompts, OPTIONS)
    assert {sample.version for some in answers for sample in some} == {before + 1}
    assert policy.gap(prompts, answers) < CLOSE
    # Again, since the second update of an engine is not the first; and the files may go once they are loaded.
    policy.train()
    await sampler.sync(policy.publish(before + 2))
    policy.folder.drop_before(before + 3)
    assert policy.gap(prompts, await sampler.sample(prompts, OPTIONS)) < CLOSE


async def test_no_answer_mixes_two_policies(sampler, policy, kind, model_dir, folder):
    prompts, before = some_prompts(12), await sampler.version()
    after = Policy(model_dir, folder, adapter=kind == "adapter", seed=5)
    after.train()
    weights = after.publish(before + 1)
    sampling = asyncio.create_task(sampler.sample(prompts, OPTIONS))
    await asyncio.sleep(0.02)
    await sampler.sync(weights)
    answers = await sampling
    for version, made_by in ((before, policy), (before + 1, after)):
        of_it = [(p, some) for p, some in zip(prompts, answers, strict=True) if some[0].version == version]
        assert all(sample.version == version for _, some in of_it for sample in some)
        assert not of_it or made_by.gap([p for p, _ in of_it], [some for _, some in of_it]) < CLOSE
    assert {some[0].version for some in answers} <= {before, before + 1}


async def test_bad_weights_are_refused_before_anything_is_touched(sampler, policy, kind, model_dir, folder, tmp_path):
    before, expected = await sampler.version(), await sampler.sample(some_prompts(), OPTIONS)
    other = Policy(save_tiny_llama(tmp_path / "other", hidden=128), folder, adapter=kind == "adapter")
    policy.train()
    good = policy.publish(before + 1)
    bad = [
        dataclasses.replace(good, path=str(folder.path / "nothing")),
        dataclasses.replace(good, digest="0" * 64),
        other.publish(before + 2),
        _damaged(policy.publish(before + 3), lambda data: data[:-100]),
        _damaged(policy.publish(before + 4), lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        dataclasses.replace(good, kind="full" if kind == "adapter" else "adapter"),
    ]
    if kind == "full":
        bad.append(policy.publish(before + 5, "bfloat16"))
    for weights in bad:
        with pytest.raises(WeightsRefused):
            await sampler.sync(weights)
    assert await sampler.version() == before
    assert await sampler.sample(some_prompts(), OPTIONS) == expected
    assert (await sampler.sync(good)).version == before + 1


def _damaged(weights, damage):
    """`weights`, its tensors' file changed after it was written."""
    path = Path(weights.path)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    file.write_bytes(damage(file.read_bytes()))
    return weights


@pytest.mark.ray
async def test_torn_weights_answer_nothing_until_an_update_has_succeeded(actors, model_dir, folder):
    sampler, policy = actors["full"], Policy(model_dir, folder, adapter=False, seed=3)
    before = await sampler.version()
    policy.train()
    weights = policy.publish(before + 1)
    await sampler.call("start_weight_update")
    with pytest.raises(SamplerLost, match="failed to load"):
        await sampler.call("update_weights", {"path": "/nowhere"})
    assert await sampler.version() == -1
    with pytest.raises(SamplerLost, match="torn"):
        await sampler.sample(some_prompts(), OPTIONS)
    await sampler.sync(weights)
    assert policy.gap(some_prompts(), await sampler.sample(some_prompts(), OPTIONS)) < CLOSE
