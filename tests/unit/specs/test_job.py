import pytest
from pydantic import ValidationError

from dpo_service.specs.job import JobSpec

MINIMAL = {"model": "base", "training_file": "file-1", "method": {"type": "dpo"}}


def spec(**fields):
    return JobSpec.model_validate({**MINIMAL, **fields})


def test_the_minimal_job_leaves_the_numbers_to_us():
    hyperparameters = spec().method.hyperparameters
    assert hyperparameters.batch_size == hyperparameters.beta == hyperparameters.n_epochs == "auto"


def test_openai_documents_are_accepted_as_they_are():
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "batch_size": "auto", "n_epochs": 2}}}
    assert spec(method=method, suffix="s", metadata={"a": "b"}).method.hyperparameters.beta == 0.2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"learning_rte": 1e-4}, "learning_rte"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"betta": 1}}}}, "betta"),
        ({"method": {"type": "dqo"}}, "dpo"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "less than or equal to 2"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"label_smoothing": 0.5}}}}, "label_smoothing"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 257}}}}, "256"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}}, "beta"),
        ({"method": {"type": "supervised"}, "reference": "live"}, "no reference"),
        ({"method": {"type": "orpo"}, "reference_refresh": {"every_steps": 5}}, "no reference to refresh"),
        ({"reference": "cached", "reference_refresh": {"every_steps": 5}}, "cached one cannot move"),
        ({"reference_refresh": {"every_steps": 5, "alpha": 1.1}}, "alpha"),
        ({"resources": {"strategy": "fsdp"}}, "set resources.workers to 2"),
        ({"checkpoint": {"keep_best": 1}}, "needs rows to evaluate on"),
        ({"checkpoint": {"metric": "eval_loss"}}, "set checkpoint.keep_best"),
        ({"checkpoint": {"publish": "best"}}, "set checkpoint.keep_best"),
        ({"eval": {"split": 0.1}, "checkpoint": {"keep_best": 1, "metric": "loss"}}, "use one of eval_loss"),
        (
            {"eval": {"split": 0.1}, "checkpoint": {"keep_best": 1}, "reference_refresh": {"every_steps": 5}},
            "incomparable",
        ),
        (
            {"reference_refresh": {"every_steps": 5, "alpha": 0.5}, "precision": "pure_bfloat16"},
            "rounds small shares away; set alpha to 1",
        ),
        ({"validation_file": "file-2", "eval": {"split": 0.1}}, "exclude"),
        ({"eval": {"every_steps": 5}}, "eval.every_steps"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "17 keys"),
        ({"metadata": {"k" * 65: "x"}}, "64"),
        ({"suffix": "s" * 65}, "64"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"lr_schedule": "cosin"}, "cosine"),
        ({"resources": {"workers": 0}}, "workers"),
    ],
)
def test_what_cannot_work_is_refused_by_name(fields, says):
    with pytest.raises(ValidationError, match=says):
        spec(**fields)


FSDP = {"strategy": "fsdp", "workers": 2}


@pytest.mark.parametrize(
    ("fields", "mended", "says"),
    [
        ({"optimizer": "adamw_8bit"}, {"optimizer": "adamw"}, "set optimizer to adamw, or use 'ddp'"),
        ({"optimizer": "adamw_offload"}, {"optimizer": "adamw"}, "set optimizer to adamw, or use 'ddp'"),
        ({"lora": {"dora": True}}, {"lora": {}}, "remove them, or use 'ddp'"),
        (
            {"lora": {"quantize": "nf4"}, "resources": FSDP | {"gpus_per_worker": 1}},
            {"lora": {}},
            "remove them, or use 'ddp'",
        ),
        ({"reference_refresh": {"every_steps": 5}}, {"reference_refresh": None}, "remove reference_refresh, or use"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_what_mends_it(fields, mended, says):
    fields = {"resources": FSDP} | fields
    with pytest.raises(ValidationError, match=says):
        spec(**fields)
    spec(**fields | mended)
    spec(**fields | {"resources": fields["resources"] | {"strategy": "ddp"}})


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "pure_bfloat16"])
@pytest.mark.parametrize("lora", [None, {}])
def test_every_precision_is_sharded(precision, lora):
    assert spec(resources=FSDP, precision=precision, lora=lora).precision == precision


def test_true_rate_and_multiplier_exclude_each_other():
    method = {"type": "dpo", "dpo": {"hyperparameters": {"learning_rate_multiplier": 2}}}
    with pytest.raises(ValidationError, match="exclude each other"):
        spec(method=method, learning_rate=1e-5)
    assert spec(learning_rate=1e-5).learning_rate == 1e-5


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError):
        spec().model = "other"
