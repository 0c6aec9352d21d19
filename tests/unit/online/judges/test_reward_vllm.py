"""The reward model in vLLM: its scores are those of transformers, for every architecture that admission lets through;
it is where the job says, it is started again when it dies, and a process that died is never a score."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.util import get_current_placement_group, placement_group, remove_placement_group

from dpo_service.errors import JudgeError
from dpo_service.online.judges import reward_actor
from dpo_service.online.judges.reward_actor import ATTEMPTS, RayScorer, bundles
from dpo_service.online.judges.reward_model import RewardModelJudge
from dpo_service.online.judges.reward_vllm import engine_options, environment
from dpo_service.specs.judge import VLLM_REWARD_MODELS, RewardModelJudgeSpec, RulesJudgeSpec
from tests.actors import running
from tests.unit.online.judges.reward_kit import CONVERSATION, TEXTS, judge, request, save_reward_model

EXACT = 1e-4
WINDOW = {"sliding_window": 32}
"""Shorter than the longest sequence, so that it counts."""
OWN = {"MistralForSequenceClassification": WINDOW, "Gemma2ForSequenceClassification": WINDOW}
VLLM = RewardModelJudgeSpec(model="rm", engine="vllm")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"))


def reward_processes(cluster) -> list[psutil.Process]:
    return running(cluster.temp_dir, "RewardActor")


def gone(cluster) -> bool:
    psutil.wait_procs(reward_processes(cluster), timeout=20)
    return reward_processes(cluster) == []


@pytest.fixture
def handles(monkeypatch):
    """The actors that a test starts."""
    started = []

    class Noting(RayScorer):
        def __init__(self, handle, *arguments):
            started.append(handle)
            super().__init__(handle, *arguments)

    monkeypatch.setattr(reward_actor, "RayScorer", Noting)
    return started


@pytest.mark.ray
async def test_both_engines_give_the_same_verdicts(model_dir, ray_connected, handles):
    group = placement_group([{"CPU": 1}, *bundles(VLLM)])
    ours, theirs = judge(model_dir), judge(model_dir, engine="vllm", placement=group, bundle=1)
    numbered = [request(({"role": "user", "content": f"q{n}"},), TEXTS[: n + 1]) for n in range(4)]
    try:
        for one in (request(CONVERSATION), request("Say: "), request(CONVERSATION, ["a", "word " * 300])):
            expected, found = await ours.judge(one), await theirs.judge(one)
            assert found.scores == pytest.approx(expected.scores, abs=EXACT)
            assert found.missing == expected.missing
        together = await asyncio.gather(*(theirs.judge(one) for one in numbered))
        alone = [await ours.judge(one) for one in numbered]
        for verdict, expected in zip(together, alone, strict=True):
            assert verdict.scores == pytest.approx(expected.scores, abs=EXACT)
        assert await handles[0].__ray_call__.remote(_placement) == group.id
        with pytest.raises(JudgeError, match=r"cannot score this answer.*out of vocabulary"):
            await RayScorer(handles[0], "rm").scores([[400]])
    finally:
        await theirs.close()
        remove_placement_group(group)
    assert gone(ray_connected)


def _placement(_actor):
    return get_current_placement_group().id


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("architecture", VLLM_REWARD_MODELS)
async def test_every_architecture_is_scored_as_transformers_does(architecture, tmp_path, ray_connected):
    directory = save_reward_model(tmp_path, architecture, **OWN.get(architecture, {}))
    theirs = judge(directory, engine="vllm")
    try:
        for one in (request(CONVERSATION), request("Say: ", (*TEXTS, "word " * 40))):
            expected = (await judge(directory).judge(one)).scores
            assert (await theirs.judge(one)).scores == pytest.approx(expected, abs=EXACT)
            assert len(set(expected)) == len(expected)
    finally:
        await theirs.close()


@pytest.mark.ray
@pytest.mark.long
async def test_a_process_or_engine_that_dies_is_started_again_and_asked_again(model_dir, ray_connected, handles):
    expected, theirs = (await judge(model_dir).judge(request(CONVERSATION))).scores, judge(model_dir, engine="vllm")
    try:
        assert (await theirs.judge(request(CONVERSATION))).scores == pytest.approx(expected, abs=EXACT)
        (first,) = reward_processes(ray_connected)
        first.kill()
        assert (await theirs.judge(request(CONVERSATION))).scores == pytest.approx(expected, abs=EXACT)
        (second,) = reward_processes(ray_connected)
        await handles[0].__ray_call__.remote(_break_the_engine)
        assert (await theirs.judge(request(CONVERSATION))).scores == pytest.approx(expected, abs=EXACT)
        (third,) = reward_processes(ray_connected)
        assert len({first.pid, second.pid, third.pid}) == 3
    finally:
        await theirs.close()
    assert gone(ray_connected)


def _break_the_engine(actor):
    def fails(*_):
        raise RuntimeError("a step that fails")

    actor._scorer._engine.engine_core._client.get_output = fails


@pytest.mark.ray
@pytest.mark.long
async def test_a_model_that_vllm_cannot_load_says_why(tmp_path, ray_connected):
    config = save_reward_model(tmp_path) / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"none_such"'))
    theirs = judge(tmp_path, engine="vllm")
    try:
        with pytest.raises(JudgeError, match=r"cannot load the reward model 'rm' \(.*set judge.engine to transformers"):
            await theirs.judge(request(CONVERSATION))
    finally:
        await theirs.close()
    assert gone(ray_connected)


class Handle:
    """An actor as Ray hands it over: `replies` are what `scores` gives or raises, one after the other."""

    def __init__(self, *replies):
        self.replies, self.asked, self.readied = list(replies), 0, 0
        self.ready = self.scores = None

        class Method:
            def __init__(self, call):
                self.remote = call

        async def ready():
            self.readied += 1

        async def scores(sequences):
            self.asked += 1
            reply = self.replies.pop(0)
            if isinstance(reply, Exception):
                raise reply
            return reply

        self.ready, self.scores = Method(ready), Method(scores)


async def verdict(directory, *replies):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    handle = Handle(*replies)
    asked = RewardModelJudge(VLLM, directory, "d", RayScorer(handle, "rm", sleep))
    return await asked.judge(request(CONVERSATION, ["a", "b"])), handle, slept


async def test_a_dead_process_is_asked_again_when_it_is_back(model_dir):
    found, handle, slept = await verdict(model_dir, RayActorError(), [1.0, 2.0])
    assert (found.scores, found.complete) == ((1.0, 2.0), True)
    assert (handle.asked, handle.readied, len(slept)) == (2, 2, 1)


async def test_a_process_that_stays_dead_is_no_score_and_not_kept(model_dir):
    found, handle, _ = await verdict(model_dir, *[RayActorError()] * ATTEMPTS)
    assert (found.scores, found.missing) == ((None, None), ("engine_lost", "engine_lost"))
    assert handle.asked == ATTEMPTS
    assert not found.complete, "the cache keeps only complete verdicts"


async def test_what_asking_again_cannot_mend_ends_the_job(model_dir):
    for error in (RayTaskError("scores", "traceback", ValueError("no")), RayTaskError("s", "t", JudgeError("no"))):
        with pytest.raises(JudgeError, match="no"):
            await verdict(model_dir, error)
    with pytest.raises(JudgeError, match=r"\(.*no such layer.*\); set judge.engine to transformers"):
        await verdict(model_dir, RayActorError(error_msg="traceback\nno such layer\n", actor_init_failed=True))


def test_the_engine_is_as_the_job_says(model_dir):
    options = engine_options(VLLM.model_copy(update={"batch_tokens": 40, "precision": "bfloat16"}), model_dir)
    assert (options["runner"], options["convert"], options["dtype"]) == ("pooling", "classify", "bfloat16")
    assert (options["max_model_len"], options["max_num_batched_tokens"], options["max_num_seqs"]) == (256, 256, 64)
    assert options["kv_cache_memory_bytes"] > 0
    on_gpus = engine_options(VLLM.model_copy(update={"gpus": 2, "max_length": 100}), model_dir)
    assert (on_gpus["tensor_parallel_size"], on_gpus["max_model_len"]) == (2, 100)
    assert "kv_cache_memory_bytes" not in on_gpus
    assert environment(VLLM.model_copy(update={"cpus": 3}))["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in environment(VLLM.model_copy(update={"gpus": 1}))


def test_only_a_process_of_its_own_takes_a_place():
    assert bundles(VLLM.model_copy(update={"cpus": 2, "gpus": 1})) == [{"CPU": 2.0, "GPU": 1.0}]
    assert bundles(VLLM) == [{"CPU": 1.0}]
    rules = RulesJudgeSpec.model_validate({"rules": [{"rule": "finished"}]})
    assert bundles(rules) == bundles(None) == bundles(RewardModelJudgeSpec(model="rm")) == []
