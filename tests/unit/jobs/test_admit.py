from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_service import ids
from dpo_service.cluster.port import Capacity
from dpo_service.errors import InvalidData, InvalidSpec, ModelNotFound, Unavailable
from dpo_service.jobs.admit import admit
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.registry import files, models
from dpo_service.registry.tables import File
from dpo_service.specs.loss import LOSS_TABLE
from dpo_service.specs.run import RunSpec
from dpo_service.storage import paths
from tests.models import CHAT_TEMPLATE, save_tokenizer
from tests.unit.jobs.world import World, job_spec

WANDB = {"type": "wandb", "wandb": {"project": "p"}}
RULES = {"kind": "rules", "rules": [{"rule": "finished"}]}
PAIRS = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"Not {n}."} for n in range(12)]
ANSWERS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(12)]
UNPAIRED = [row | {"label": number > 8} for number, row in enumerate(ANSWERS)]
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"What is {n}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {n}."}],
        "rejected": [{"role": "assistant", "content": f"Not {n}."}],
    }
    for n in range(12)
]


def save_model(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A directory that looks like a model with a context of 256 tokens; the weights are not looked into."""
    save_tokenizer(directory, chat_template=chat_template)
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256, "vocab_size": 400}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(b"weights")


async def upload(world: World, rows: Sequence[dict], *, purpose: str = "fine-tune", kind: str | None = None) -> str:
    file_id = ids.new_file_id()
    key = paths.file_key(file_id, "rows.jsonl")
    world.store.write(key, "".join(json.dumps(row) + "\n" for row in rows).encode())
    row = File(
        id=file_id, name="rows.jsonl", bytes=1, purpose=purpose, created_at=world.clock.now(), status="processed",
        key=key, sha256="0" * 64, rows=kind,
    )  # fmt: skip
    async with world.database.begin() as session:
        await files.create(session, row)
    return file_id


@pytest.fixture
def ready(world: World) -> World:
    save_model(world.store.path(paths.user_model("base")))
    return world


async def ask(world: World, rows: Sequence[dict] = PAIRS, **fields: Any) -> tuple[RunSpec, DatasetReport]:
    fields = {"training_file": await upload(world, rows), **fields}
    return await admit(
        job_spec(**fields),
        database=world.database,
        store=world.store,
        cluster=world.cluster,
        settings=world.settings,
        clock=world.clock,
    )


def dpo(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


async def test_every_number_left_open_is_decided(ready: World) -> None:
    run, report = await ask(ready)
    assert report.kept == 12
    numbers = LOSS_TABLE["sigmoid"].options
    assert run.loss.model_dump() == {"name": "sigmoid", **numbers}
    micro = {"micro_batch_size": 1, "micro_batch_tokens": 4096}
    assert run.batch.model_dump() == {"batch_size": 1, **micro, "n_epochs": 3, "max_steps": None}
    assert (run.data.max_length, run.precision, run.reference.mode) == (256, "float32", "cached")
    assert run.optim.learning_rate == 5e-6
    assert run.model.path == str(ready.store.path(paths.user_model("base")))
    assert run.resources.strategy == "ddp"
    assert run.output_model == ids.fine_tuned_model_id("base", None, run.job_id)
    assert "auto" not in run.model_dump_json()


async def test_what_the_user_says_is_kept(ready: World) -> None:
    run, _ = await ask(
        ready,
        method=dpo(batch_size=4, beta=0.5, n_epochs=7, label_smoothing=0.1),
        learning_rate=1e-3, seed=5, max_length=100, precision="bfloat16", reference="live", micro_batch_size=2,
        max_steps=9, shuffle=False, suffix="mine", resources={"workers": 2}, logging_steps=3, truncation="cut",
        micro_batch_tokens=500,
    )  # fmt: skip
    micro = {"micro_batch_size": 2, "micro_batch_tokens": 500}
    assert run.batch.model_dump() == {"batch_size": 4, **micro, "n_epochs": 7, "max_steps": 9}
    assert (run.loss.beta, run.loss.label_smoothing) == (0.5, 0.1)
    assert (run.optim.learning_rate, run.seed, run.data.seed) == (1e-3, 5, 5)
    assert (run.data.max_length, run.data.shuffle, run.data.truncation) == (100, False, "cut")
    assert (run.precision, run.reference.mode, run.resources.workers) == ("bfloat16", "live", 2)
    assert ":mine:" in run.output_model


async def test_a_checkpoint_to_train_from_stays(ready: World) -> None:
    key = paths.checkpoint_dir("ftjob-a", 5)
    save_model(ready.store.path(f"{key}/model"))
    async with ready.database.begin() as session:
        facts = {"job_id": "ftjob-a", "digest": "d", "base": "base", "created_at": ready.clock.now()}
        model = await models.publish_checkpoint(session, "ft:base::a", 5, key=f"{key}/model", **facts)
    with pytest.raises(InvalidSpec):
        await ask(ready, model=model.id, max_length=10_000)
    assert not ready.store.exists(paths.keep_flag(key))
    await ask(ready, model=model.id)
    assert ready.store.exists(paths.keep_flag(key))


async def test_supervised_has_no_reference_and_its_own_rate(ready: World) -> None:
    run, _ = await ask(ready, ANSWERS, method={"type": "supervised"})
    assert (run.loss.name, run.reference.mode, run.data.rows) == ("sft", "none", "answers")
    assert run.optim.learning_rate == 2e-5


async def test_a_loss_without_a_reference_gets_none(ready: World) -> None:
    for method, rate in (("simpo", 5e-7), ("orpo", 8e-6)):
        run, _ = await ask(ready, method={"type": method})
        assert (run.loss.name, run.reference.mode, run.data.rows) == (method, "none", "pairs")
        assert run.optim.learning_rate == rate


async def test_a_loss_of_dpo_and_its_numbers_are_kept(ready: World) -> None:
    run, _ = await ask(ready, method=dpo(loss="robust", label_smoothing=0.2, length_penalty=0.01))
    assert (run.method, run.loss.name, run.reference.mode) == ("dpo", "robust", "cached")
    assert (run.loss.label_smoothing, run.loss.length_penalty) == (0.2, 0.01)
    run, _ = await ask(ready, method={"type": "ipo", "ipo": {"hyperparameters": {"length_normalize": False}}})
    assert (run.loss.name, run.loss.length_normalize, run.reference.mode) == ("ipo", False, "cached")


async def test_lora_and_the_multiplier_scale_the_rate(ready: World) -> None:
    run, _ = await ask(ready, method=dpo(learning_rate_multiplier=2.0), lora={"rank": 4})
    assert run.optim.learning_rate == pytest.approx(5e-6 * 10 * 2)


async def test_gpus_train_in_bfloat16(ready: World) -> None:
    ready.cluster.capacity_value = Capacity(cpus=8, gpus=1)
    run, _ = await ask(ready, resources={"gpus_per_worker": 1})
    assert run.precision == "bfloat16"


async def test_the_batch_grows_with_the_file(ready: World) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(400)]
    run, _ = await ask(ready, rows)
    assert (run.batch.batch_size, run.batch.micro_batch_size) == (20, 20)
    run, _ = await ask(ready, rows, resources={"workers": 2})
    assert run.batch.micro_batch_size == 10


async def test_a_seed_is_drawn_each_time(ready: World) -> None:
    assert (await ask(ready))[0].seed != (await ask(ready))[0].seed


@pytest.mark.parametrize(
    ("fields", "param", "match"),
    [
        ({"method": dpo(batch_size=64)}, "method.dpo.hyperparameters.batch_size", "12 usable pairs.*at most 12"),
        (
            {"method": dpo(batch_size=2), "resources": {"workers": 4}},
            "method.dpo.hyperparameters.batch_size",
            "at least 4, or fewer workers",
        ),
        ({"resources": {"workers": 9}}, "resources.workers", "cluster has 8; use at most 8 workers"),
        ({"resources": {"cpus_per_worker": 9}}, "resources.cpus_per_worker", "at most 8 CPUs"),
        ({"resources": {"gpus_per_worker": 1}}, "resources.gpus_per_worker", "gpus_per_worker to 0"),
        ({"max_length": 512}, "max_length", "at most 256"),
        ({"training_file": "file-none"}, "training_file", "no file 'file-none'"),
        ({"validation_file": "file-none"}, "validation_file", "no file 'file-none'"),
        ({"integrations": [WANDB]}, "integrations", "not installed"),
    ],
)
async def test_what_cannot_run_is_refused_with_the_field_and_the_mend(
    ready: World, fields: dict, param: str, match: str
) -> None:
    with pytest.raises(InvalidSpec, match=match) as refused:
        await ask(ready, **fields)
    assert refused.value.param == param


async def test_an_integration_that_is_installed_is_kept(ready: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_service.jobs.admit.find_spec", lambda name: name)
    run, _ = await ask(ready, integrations=[WANDB])
    assert run.integrations[0].wandb.project == "p"


async def test_more_workers_than_rows(ready: World) -> None:
    ready.cluster.capacity_value = Capacity(cpus=64, gpus=0)
    with pytest.raises(InvalidSpec, match="at most 12 workers") as refused:
        await ask(ready, resources={"workers": 13})
    assert refused.value.param == "resources.workers"


async def test_rows_that_are_dropped_do_not_fill_a_batch(ready: World) -> None:
    with pytest.raises(InvalidSpec, match="12 usable pairs"):
        await ask(ready, PAIRS * 2, method=dpo(batch_size=13))
    run, _ = await ask(ready, PAIRS * 2, method=dpo(batch_size=13), deduplicate=False)
    assert run.batch.batch_size == 13


async def test_rows_held_out_do_not_fill_a_batch(ready: World) -> None:
    with pytest.raises(InvalidSpec, match="6 usable pairs"):
        await ask(ready, method=dpo(batch_size=7), eval={"split": 0.5})


async def test_rows_that_are_in_the_validation_file_are_not_trained_on(ready: World) -> None:
    validation = await upload(ready, PAIRS[:4])
    _, report = await ask(ready, validation_file=validation)
    assert report.kept == 8
    with pytest.raises(InvalidData, match="in validation") as refused:
        await ask(ready, PAIRS[:4], validation_file=validation)
    assert refused.value.param == "training_file"


@pytest.mark.parametrize(
    ("rows", "split", "match"),
    [
        ([{"prompt": "same", "chosen": f"{n}", "rejected": "no"} for n in range(9)], 0.5, "the same prompt"),
        (PAIRS[:3], 0.9, "leaves 1 to train on"),
    ],
)
async def test_a_split_that_leaves_nothing_is_refused(ready: World, rows: list[dict], split: float, match: str) -> None:
    with pytest.raises(InvalidData, match=match) as refused:
        await ask(ready, rows, eval={"split": split})
    assert refused.value.param == "eval.split"


async def test_a_file_for_another_purpose_is_refused(ready: World) -> None:
    file_id = await upload(ready, PAIRS, purpose="assistants")
    with pytest.raises(InvalidSpec, match="purpose 'assistants'; upload it again with purpose 'fine-tune'") as refused:
        await ask(ready, training_file=file_id)
    assert refused.value.param == "training_file"


@pytest.mark.parametrize(
    ("rows", "kind", "method", "match"),
    [
        (ANSWERS, "answers", "dpo", "or method 'supervised'"),
        (PAIRS, "pairs", "supervised", "or method 'dpo'"),
        (ANSWERS, "answers", "kto", "needs answers with a label each, or preference pairs"),
        (UNPAIRED, "unpaired", "dpo", "or method 'kto'"),
    ],
)
async def test_rows_of_the_wrong_kind_are_refused(
    ready: World, rows: list[dict], kind: str, method: str, match: str
) -> None:
    for known in (kind, None):  # whether or not the upload looked into the file
        file_id = await upload(ready, rows, kind=known)
        with pytest.raises((InvalidSpec, InvalidData), match=match if known else "needs") as refused:
            await ask(ready, training_file=file_id, method={"type": method})
        assert refused.value.param == "training_file"


async def test_kto_takes_unpaired_answers_and_pairs(ready: World) -> None:
    run, report = await ask(ready, UNPAIRED, method={"type": "kto"})
    assert (run.data.rows, run.loss.name, run.reference.mode, run.batch.batch_size) == ("unpaired", "kto", "cached", 2)
    assert (report.desirable, report.undesirable) == (3, 9)
    assert any("a desirable_weight of 3.00 to 4.00" in warning for warning in report.warnings)
    for known in ("pairs", None):
        file_id = await upload(ready, PAIRS, kind=known)
        _, report = await ask(ready, training_file=file_id, method={"type": "kto"})
        assert (report.kept, report.desirable, report.undesirable) == (24, 12, 12)
        assert not any("weigh" in warning for warning in report.warnings)


async def test_kto_needs_two_prompts_on_either_side(ready: World) -> None:
    same = [row | {"prompt": "What is it?"} for row in UNPAIRED]
    with pytest.raises(InvalidData, match="the same prompt") as refused:
        await ask(ready, same, method={"type": "kto"})
    assert refused.value.param == "training_file"
    with pytest.raises(InvalidData, match="the same prompt") as refused:
        await ask(ready, UNPAIRED, method={"type": "kto"}, eval={"split": 0.05})
    assert refused.value.param == "eval.split"


async def test_conversations_need_a_chat_template(ready: World) -> None:
    run, _ = await ask(ready, CHATS)
    assert run.data.rows == "pairs"
    save_model(ready.store.path(paths.user_model("plain")), chat_template=None)
    with pytest.raises(InvalidData, match="no chat template") as refused:
        await ask(ready, CHATS, model="plain")
    assert refused.value.line == 1


async def test_an_answer_that_is_too_long_is_refused_with_its_line(ready: World) -> None:
    rows = [*PAIRS, {"prompt": "p", "chosen": "very long " * 300, "rejected": "short"}]
    with pytest.raises(InvalidData, match="line 13") as refused:
        await ask(ready, rows)
    assert refused.value.param == "max_length"
    run, _ = await ask(ready, rows, truncation="cut")
    assert run.data.truncation == "cut"


async def test_an_unknown_model_is_refused(ready: World) -> None:
    with pytest.raises(ModelNotFound, match="nowhere") as refused:
        await ask(ready, model="nowhere")
    assert refused.value.param == "model"


async def test_a_cluster_that_cannot_be_asked_is_no_fault_of_the_job(ready: World) -> None:
    ready.cluster.unreachable = True
    with pytest.raises(Unavailable, match="try again"):
        await ask(ready)


async def test_samplers_on_gpus_are_refused(ready: World) -> None:
    for asked in ({"sampling": {"gpus_per_sampler": 1}}, {"resources": {"gpus_per_worker": 1}}):
        with pytest.raises(InvalidSpec, match="not there yet") as refused:
            await ask(ready, method={"type": "online"}, judge=RULES, **asked)
        assert refused.value.param == "sampling.gpus_per_sampler"


PROMPTS = [{"messages": [{"role": "user", "content": f"What is {n}?"}], "answer": str(n)} for n in range(12)]
MATCH = {"kind": "rules", "rules": [{"rule": "exact_match"}]}


async def test_prompts_are_admitted_with_room_for_their_answers(ready: World) -> None:
    run, report = await ask(ready, PROMPTS, method={"type": "online"}, judge=MATCH)
    assert (report.kept, report.references, run.data.rows, run.data.answer_room) == (12, 12, "prompts", 128)
    for known in ("pairs", None):  # the prompts of any file
        file_id = await upload(ready, PAIRS, kind=known)
        _, report = await ask(ready, training_file=file_id, method={"type": "online"}, judge=MATCH)
        assert (report.kept, report.references) == (12, 12)
    run, _ = await ask(ready, PAIRS, method={"type": "spin"})
    assert (run.data.rows, run.online.judge) == ("demonstrations", None)


ENDPOINT = {"base_url": "http://localhost:8000/v1", "model": "judge"}
COMPARES = {"kind": "pairwise", "endpoint": ENDPOINT}
RANKS = {"kind": "scoring", "mode": "ranking", "endpoint": ENDPOINT}


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
