"""How an attempt begins and ends, without Ray: every way out leaves a result, and nothing runs twice."""

import json
import shutil
import signal

import pytest

from dpo_service import runner
from dpo_service.errors import CheckpointError, InvalidData, InvalidSpec, NonFiniteLoss, TrainingError
from dpo_service.manifests.checkpoint import RunResult
from dpo_service.reports import Reporter, read_spool, spool_files
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.data import DataSpec
from dpo_service.specs.loss import LossSpec
from dpo_service.specs.method import ReferenceSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import AttemptSpec, BatchSpec, ModelSource, RunSpec
from dpo_service.specs.sampling import SamplerSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from tests.unit.train.training_kit import build_model
from tests.vocabularies import unigram

JOB = "ftjob-1"


@pytest.fixture(autouse=True)
def _own_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def attempt(store, number=1, precision="float32", lora=None):
    run = RunSpec(
        job_id=JOB,
        method="dpo",
        model=ModelSource(name="base", path="/nowhere"),
        data=DataSpec(rows="pairs", training_file="files/f/f", training_name="f.jsonl", max_length=64),
        loss=LossSpec(name="sigmoid"),
        reference=ReferenceSpec(mode="cached"),
        optim=OptimSpec(learning_rate=1e-5),
        batch=BatchSpec(batch_size=2, micro_batch_size=2, n_epochs=1),
        precision=precision,
        lora=lora,
        resources=ResourceSpec(),
        seed=0,
        output_model="ft:base::1",
    )
    spec = AttemptSpec(run=run, attempt=number, report_url=None, report_token="t")
    store.write_model(paths.attempt_spec(JOB, number), spec)
    return spec


def main(store, number=1):
    return runner.main([str(store.root), JOB, str(number)])


def result(store, number=1):
    return store.read_model(paths.attempt_result(JOB, number), RunResult)


@pytest.mark.parametrize(
    ("error", "code", "param", "retryable"),
    [
        (InvalidData("no answer", line=3, param="training_file"), "invalid_data", "training_file", False),
        (NonFiniteLoss("loss is nan at step 4"), "non_finite_loss", None, False),
        (TrainingError("the workers died"), "training_failed", None, True),
        (RuntimeError("a surprise"), "internal_error", None, True),
    ],
)
def test_every_failure_becomes_a_result(store, monkeypatch, error, code, param, retryable):
    def fail(*_):
        raise error

    attempt(store)
    monkeypatch.setattr(runner, "_stages", fail)
    assert main(store) == 1
    ended = result(store)
    assert (ended.status, ended.error_code, ended.error_param, ended.retryable) == ("failed", code, param, retryable)
    assert str(error) in ended.error_message


def test_a_surprise_is_told_with_its_place(store, monkeypatch):
    def fail(*_):
        raise RuntimeError("a surprise")

    attempt(store)
    monkeypatch.setattr(runner, "_stages", fail)
    main(store)
    spool = spool_files(store.path(paths.spool_dir(JOB, 1)))
    said = [report for path in spool for batch, _ in read_spool(path) for report in batch]
    assert [report.level for report in said] == ["error"]
    assert "test_runner.py" in said[0].message


def test_an_attempt_that_was_asked_to_stop_before_it_began_does_nothing(store, monkeypatch):
    attempt(store)
    store.write(paths.stop_flag(JOB, 1), b"")
    monkeypatch.setattr(runner, "locate_model", lambda *_: pytest.fail("it went on"))
    assert main(store) == 0
    assert (result(store).status, result(store).checkpoint) == ("stopped", None)


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2)])
def test_a_published_model_that_is_not_the_trained_one_fails_the_job_by_name(store, monkeypatch, tmp_path, lora):
    from safetensors.torch import load_file, save_file

    from tests.unit.train.training_kit import build_model, make_job

    options = {"lora": lora, "precision": "bfloat16"}
    job = make_job(tmp_path, build_model(tmp_path / "base"), reference="live", steps=1, validation=0, **options)
    outcome = job.train()
    _stages_give(monkeypatch, tmp_path / "base", outcome)
    attempt(store, **options)
    main(store)
    assert (result(store).status, result(store).checkpoint) == ("succeeded", outcome.checkpoint)
    assert ("merging the adapter in float32" in _messages(store)) is (lora is not None)
    weights = store.path(outcome.checkpoint) / "model/model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] += 0.01
    save_file(tensors, weights, metadata={"format": "pt"})
    attempt(store, 2, **options)
    assert main(store, 2) == 1
    ended = result(store, 2)
    assert (ended.status, ended.error_code, ended.retryable) == ("failed", "published_differs", False)
    assert "(model.layers.1.self_attn.o_proj.weight)" in ended.error_message


def _stages_give(monkeypatch, base, outcome):
    """All stages of an attempt but the last look at what was published."""
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("dpo_service.train.ray_worker.fit", lambda *_: outcome)
    monkeypatch.setattr(runner, "locate_model", lambda *_: base)
    for stage in ("_require_sound", "_prepare", "_tell_of_waiting"):
        monkeypatch.setattr(runner, stage, lambda *_: None)


def _messages(store, number=1):
    spool = spool_files(store.path(paths.spool_dir(JOB, number)))
    reports = [report for path in spool for batch, _ in read_spool(path) for report in batch]
    return " ".join(getattr(report, "message", "") for report in reports)


@pytest.mark.parametrize("how", ["has a result", "has a successor"])
def test_an_entrypoint_that_is_run_again_does_nothing(store, monkeypatch, how):
    attempt(store)
    if how == "has a result":
        store.write_model(paths.attempt_result(JOB, 1), RunResult(job_id=JOB, attempt=1, status="succeeded"))
    else:
        attempt(store, 2)
    monkeypatch.setattr(runner, "_stages", lambda *_: pytest.fail("it ran"))
    assert main(store) == 0


def test_the_base_model_is_pinned_by_the_first_attempt(store):
    run = attempt(store).run
    runner._require_same_base(store, run, "a" * 64)
    runner._require_same_base(store, run, "a" * 64)
    with pytest.raises(CheckpointError, match="has changed") as refused:
        runner._require_same_base(store, run, "b" * 64)
    assert not refused.value.retryable
    assert refused.value.param == "model"


def test_a_model_is_a_path_or_lies_in_storage(store, tmp_path):
    assert runner.locate_model(store, ModelSource(name="m", path="/models/m")).as_posix() == "/models/m"
    assert runner.locate_model(store, ModelSource(name="m", key="jobs/j/model")) == tmp_path / "jobs/j/model"


def test_what_is_missing_is_said_in_words():
    asked = ResourceSpec(workers=2, gpus_per_worker=1)
    assert runner.missing(asked, {"CPU": 2.0, "GPU": 2.0}) == []
    assert runner.missing(asked, {"CPU": 1.5}) == ["2 CPUs (1.5 free)", "2 GPUs (0 free)"]
    own = SamplerSpec(samplers=2, gpus=1)
    assert runner.missing(asked, {"CPU": 4, "GPU": 2}, own) == ["4 GPUs (2 free)"]
    assert runner.missing(asked, {"CPU": 2, "GPU": 2}, own.model_copy(update={"shares_device": True})) == []


def test_a_tokenizer_that_serves_other_ids_is_refused_on_the_jobs_own_rows(store, tmp_path):
    """Where the service runs without transformers, the job is the first to know."""
    base = build_model(tmp_path / "base")
    unigram(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "other" / name, base / name)
    rows = [{"prompt": "the a", "chosen": "b", "rejected": "c"}] * 2
    store.write("files/f/f", "".join(json.dumps(row) + "\n" for row in rows).encode())
    reporter = Reporter(tmp_path / "spool", "driver", url=None, token="t")
    with pytest.raises(InvalidSpec, match=r"of 'the a' \(line 1 of the training file") as caught:
        runner._require_sound(store, attempt(store).run, base, reporter)
    assert caught.value.param == "model"
