from __future__ import annotations

import pytest

from dpo_service import ids
from dpo_service.cluster.port import Capacity
from dpo_service.errors import InvalidData, InvalidSpec, ModelNotFound, Unavailable
from dpo_service.jobs import admit as admission
from dpo_service.manifests.inspection import Inspection, InspectionRequest
from dpo_service.registry import models
from dpo_service.specs.loss import LOSS_TABLE
from dpo_service.storage import paths
from tests.unit.jobs.admission import ANSWERS, CHATS, PAIRS, UNPAIRED, ask, dpo, save_model, upload
from tests.unit.jobs.world import World

WANDB = {"type": "wandb", "wandb": {"project": "p"}}
RULES = {"kind": "rules", "rules": [{"rule": "finished"}]}


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


@pytest.mark.parametrize("rows", [PAIRS, CHATS])
async def test_the_inspection_gets_rows_of_the_job(ready: World, monkeypatch, rows) -> None:
    requests = []

    def inspect(request: InspectionRequest) -> Inspection:
        requests.append(request)
        return Inspection(notes=("noted",))

    monkeypatch.setattr(admission, "inspect_model", inspect)
    monkeypatch.setattr(ready, "settings", ready.settings.model_copy(update={"inspect_models": True}))
    _, report = await ask(ready, rows)
    assert report.warnings[0] == "noted"
    (request,) = requests
    assert request.directory == str(ready.store.path(paths.user_model("base")))
    assert [sample.line for sample in request.samples] == list(range(1, 13))
    first = request.samples[0]
    chat = rows is CHATS
    assert first.texts == (() if chat else ("What is 0?", "What is 0?It is 0.", "What is 0?Not 0."))
    assert [len(turns) for turns in first.conversations] == ([1, 2, 2] if chat else [])
