"""Admission of jobs that sample their pairs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpo_service.cluster.port import Capacity
from dpo_service.errors import InvalidData, InvalidSpec, ModelNotFound
from dpo_service.specs.run import RunSpec
from dpo_service.storage import paths
from tests.unit.jobs.admission import ANSWERS, CHATS, PAIRS, ask, save_model, upload
from tests.unit.jobs.world import World

RULES = {"kind": "rules", "rules": [{"rule": "finished"}]}
PROMPTS = [{"messages": [{"role": "user", "content": f"What is {n}?"}], "answer": str(n)} for n in range(12)]
MATCH = {"kind": "rules", "rules": [{"rule": "exact_match"}]}
ENDPOINT = {"base_url": "http://localhost:8000/v1", "model": "judge"}
COMPARES = {"kind": "pairwise", "endpoint": ENDPOINT}
RANKS = {"kind": "scoring", "mode": "ranking", "endpoint": ENDPOINT}


async def test_samplers_have_gpus_of_their_own_or_the_workers(ready: World) -> None:
    ready.cluster.capacity_value = Capacity(cpus=2, gpus=2)
    online = {"method": {"type": "online"}, "judge": MATCH, "resources": {"gpus_per_worker": 1}}
    run, _ = await ask(ready, PROMPTS, **online)
    assert (run.online.samplers.sync, run.online.samplers.booked_gpus) == ("nccl", 1)
    with pytest.raises(InvalidSpec, match="1 workers and 2 samplers need 3 GPUs together"):
        await ask(ready, PROMPTS, **online, sampling={"samplers": 2})
    ready.cluster.capacity_value = Capacity(cpus=1, gpus=1)
    run, _ = await ask(ready, PROMPTS, **online, sampling={"shares_device": True})
    assert (run.online.samplers.sync, run.online.samplers.booked_gpus, run.online.staleness) == ("ipc", 0, 0)


async def test_prompts_are_admitted_with_room_for_their_answers(ready: World) -> None:
    run, report = await ask(ready, PROMPTS, method={"type": "online"}, judge=MATCH)
    assert (report.kept, report.references, run.data.rows, run.data.answer_room) == (12, 12, "prompts", 128)
    for known in ("pairs", None):  # the prompts of any file
        file_id = await upload(ready, PAIRS, kind=known)
        _, report = await ask(ready, training_file=file_id, method={"type": "online"}, judge=MATCH)
        assert (report.kept, report.references) == (12, 12)
    run, _ = await ask(ready, PAIRS, method={"type": "spin"})
    assert (run.data.rows, run.online.judge) == ("demonstrations", None)


async def test_held_out_prompts_are_not_trained_on(ready: World) -> None:
    online = {"method": {"type": "online"}, "judge": MATCH, "checkpoint": {"keep_best": 2, "publish": "best"}}
    run, report = await ask(ready, PROMPTS, validation_file=await upload(ready, PROMPTS[:3]), **online)
    assert (report.kept, run.data.eval_split, run.data.validation_name) == (9, 0, "rows.jsonl")
    best = run.keep_best
    assert (best.keep, best.metric, best.better, best.publish) == (2, "valid/reward", "higher", True)
    run, report = await ask(ready, PROMPTS, eval={"split": 0.25, "every_steps": 2}, **online)
    assert (report.kept, run.data.eval_split, run.eval_every_steps) == (12, 0.25, 2)
    others = [row | {"completion": "It may be so."} for row in ANSWERS[:3]]
    _, report = await ask(ready, PAIRS, method={"type": "spin"}, validation_file=await upload(ready, others))
    assert report.kept == 9, "the prompts, whatever their answers"
    pairs = [row | {"prompt": PROMPTS[0]["messages"]} for row in CHATS]
    with pytest.raises(InvalidData, match="in validation") as refused:
        held = await upload(ready, PROMPTS[:3])
        await ask(ready, PROMPTS, validation_file=held, mix={"file": await upload(ready, pairs)}, **online)
    assert refused.value.param == "mix.file"


@pytest.mark.parametrize("judge", [MATCH, COMPARES, RANKS], ids=["match", "compares", "ranks"])
async def test_a_judge_that_compares_needs_an_answer_of_a_held_out_row(ready: World, judge: dict[str, Any]) -> None:
    online = {"method": {"type": "online"}, "judge": judge}
    bare = [{"messages": [{"role": "user", "content": f"Why {n}?"}]} for n in range(4)]
    with pytest.raises(InvalidSpec, match="give the rows an `answer`, or remove validation_file") as refused:
        await ask(ready, PROMPTS, validation_file=await upload(ready, bare), **online)
    assert refused.value.param == "validation_file"
    one = [*bare, bare[0] | {"answer": "so"}]
    await ask(ready, PROMPTS, validation_file=await upload(ready, one), **online)
    if judge is not MATCH:  # which needs answers to train on, too
        with pytest.raises(InvalidSpec, match=r"or remove eval\.split"):
            await ask(ready, bare, eval={"split": 0.25}, **online)
    await ask(ready, bare, eval={"split": 0.25}, method={"type": "online"}, judge=RULES)


async def test_a_mix_needs_pairs(ready: World) -> None:
    online = {"method": {"type": "online"}, "judge": MATCH}
    run, _ = await ask(ready, PROMPTS, mix={"file": await upload(ready, PAIRS)}, **online)
    assert run.data.mix_name == "rows.jsonl"
    for kind in ("answers", None):
        with pytest.raises((InvalidSpec, InvalidData), match="needs") as refused:
            await ask(ready, PROMPTS, mix={"file": await upload(ready, ANSWERS, kind=kind)}, **online)
        assert refused.value.param == "mix.file"


@pytest.mark.parametrize(
    ("fields", "param", "match"),
    [
        ({"judge": {"kind": "rules", "rules": [{"rule": "registered", "name": "no-such"}]}}, "judge.rules", "no-such"),
        ({"judge": {"kind": "reward_model", "model": "nowhere"}}, "judge.model", "no model 'nowhere'"),
        ({"judge": {"kind": "reward_model", "model": "base"}}, "judge.model", "LlamaForCausalLM; a reward model"),
        ({"judge": RULES, "sampling": {"samplers": 8}}, "sampling.samplers", "need 9 CPUs together"),
        ({"judge": RULES, "sampling": {"max_tokens": 300}}, "sampling.max_tokens", "use at most 255"),
        ({"judge": MATCH}, "judge.rules", "no row of the file has one"),
    ],
)
async def test_what_samples_cannot_do_without_is_refused(ready: World, fields: dict, param: str, match: str) -> None:
    with pytest.raises((InvalidSpec, ModelNotFound), match=match) as refused:
        await ask(ready, [{"prompt": f"{n}?"} for n in range(12)], method={"type": "online"}, **fields)
    assert refused.value.param == param


async def test_a_reward_model_is_found_by_its_name(ready: World) -> None:
    directory = ready.store.path(paths.user_model("reward"))
    save_model(directory)
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (directory / "config.json").write_text(json.dumps(config))
    run, _ = await ask(ready, PROMPTS, method={"type": "online"}, judge={"kind": "reward_model", "model": "reward"})
    assert run.online.reward_model.path == str(directory)
    (directory / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ModelNotFound, match="2 outputs"):
        await ask(ready, PROMPTS, method={"type": "online"}, judge={"kind": "reward_model", "model": "reward"})


async def test_a_reward_model_that_vllm_does_not_compute_is_refused_as_its_judge(ready: World) -> None:
    directory = ready.store.path(paths.user_model("reward"))
    save_model(directory)
    in_vllm = {"kind": "reward_model", "model": "reward", "engine": "vllm"}

    async def admitted(architecture: str, hidden: int, **judge: Any) -> RunSpec:
        config = {"architectures": [architecture], "id2label": {"0": "LABEL_0"}, "hidden_size": hidden}
        (directory / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
        return (await ask(ready, PROMPTS, method={"type": "online"}, judge=in_vllm | judge))[0]

    run = await admitted("LlamaForSequenceClassification", 64)
    assert run.online.judge.engine == "vllm"
    for refused, sentence in (
        (admitted("DebertaV2ForSequenceClassification", 64), "is DebertaV2.*; set judge.engine to transformers"),
        (admitted("LlamaForSequenceClassification", 32), "are of 16; set judge.engine to transformers"),
    ):
        with pytest.raises(InvalidSpec, match=sentence) as error:
            await refused
        assert error.value.param == "judge.engine"
    await admitted("DebertaV2ForSequenceClassification", 64, engine="transformers")
    ready.cluster.capacity_value = Capacity(cpus=8, gpus=1)
    assert (await admitted("LlamaForSequenceClassification", 32, gpus=1)).online.judge.gpus == 1


async def test_room_is_needed_for_the_judges_process_too(ready: World) -> None:
    directory = ready.store.path(paths.user_model("reward"))
    save_model(directory)
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}, "head_dim": 32}
    (directory / "config.json").write_text(json.dumps(config))
    judge = {"kind": "reward_model", "model": "reward", "engine": "vllm", "cpus": 6}
    await ask(ready, PROMPTS, method={"type": "online"}, judge=judge)
    for more, sentence in (
        ({"cpus": 7}, "1 workers and 1 samplers beside the judge's process need 9 CPUs together.* or judge.cpus lower"),
        ({"gpus": 1}, "need 1 GPUs together"),
    ):
        with pytest.raises(InvalidSpec, match=sentence):
            await ask(ready, PROMPTS, method={"type": "online"}, judge=judge | more)
