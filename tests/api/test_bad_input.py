"""What users get wrong: each is a 4xx with the field or the line and the mend, and leaves nothing behind."""

import gzip
import json

import openai
import pytest

from dpo_service.cluster.port import Capacity
from tests.api.conftest import lines, pair, pairs, save_model


def broken(index, **changes):
    """A file of 8 rows, one of them with these columns instead."""
    rows = [pair(number) for number in range(8)]
    rows[index] |= changes
    rows[index] = {name: value for name, value in rows[index].items() if value is not None}
    return lines(rows)


def trl(chosen="yes", rejected="no", prompt="well?"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


SAID = [{"role": "assistant", "content": "the same"}]
BAD_FILES = {
    "malformed JSON": (pairs(3) + b'{"input": \n', "line 4", "JSON"),
    "no object": (pairs(3) + b"[1, 2]\n", "line 4", "object"),
    "without rejected": (lines([trl(), {"prompt": "a", "chosen": "b"}]), "line 2", "rejected"),
    "without rejected, OpenAI": (broken(2, non_preferred_output=None), "line 3", "non_preferred_output"),
    "chosen equal to rejected": (broken(4, preferred_output=SAID, non_preferred_output=SAID), "line 5", "equal"),
    "empty answer": (lines([trl(), trl(chosen="")]), "line 2", "empty"),
    "empty answer of spaces": (lines([trl(), trl(rejected="  \n")]), "line 2", "empty"),
    "old names": (
        lines([{"input": {"messages": []}, "preferred_completion": [], "non_preferred_completion": []}]),
        "line 1",
        "preferred_output",
    ),
    "mixed formats": (lines([trl(), pair(1)]), "line 2", "format"),
    "no text": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 10, "", "image"),
    "no text, unknown": (b"\0\1\2\3" * 100, "", "no text"),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}\n', "line 1", "UTF-8"),
    "empty": (b"", "", "empty"),
    "only blank lines": (b"\n\n\n", "", "no rows"),
    "one pair": (lines([pair(1)]), "", "at least 2"),
    "damaged gzip": (gzip.compress(pairs())[:-20], "", "gzip"),
    "damaged parquet": (b"PAR1" + b"x" * 100, "", "Parquet"),
    "unknown columns": (lines([{"question": "a", "answer": "b"}] * 3), "line 1", "prompt"),
}


@pytest.mark.parametrize("name", BAD_FILES)
async def test_file_is_refused_at_upload(api, name):
    content, line, mend = BAD_FILES[name]
    with pytest.raises(openai.BadRequestError) as refused:
        await api.upload(content)
    assert line in refused.value.message
    assert mend in refused.value.message
    assert refused.value.code == "invalid_data"
    assert api.stored() == []
    assert (await api.sdk.files.list()).data == []


DPO = {"type": "dpo"}
LONG = [{"role": "assistant", "content": "word " * 2000}]
BAD_JOBS = {
    "unknown model": ({"model": "nowhere"}, "model", "tiny"),
    "model outside the roots": ({"model": "/etc"}, "model", "ALLOWED_MODEL_ROOTS"),
    "model by a way out": ({"model": "../../etc"}, "model", ".."),
    "unknown file": ({"training_file": "file-none"}, "training_file", "upload"),
    "unknown validation file": ({"validation_file": "file-none"}, "validation_file", "upload"),
    "misspelt option": ({"learning_rte": 1e-4}, "learning_rte", "did you mean `learning_rate`?"),
    "misspelt, nested": ({"lora": {"rnak": 4}}, "lora.rnak", "did you mean `lora.rank`?"),
    "misspelt hyperparameter": (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"betta": 0.1}}}},
        "method.dpo.hyperparameters.betta",
        "did you mean `method.dpo.hyperparameters.beta`?",
    ),
    "unknown option": ({"zzz": 1}, "zzz", "known are"),
    "out of range": (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}},
        "method.dpo.hyperparameters.beta",
        "less than or equal to 2",
    ),
    "option the loss has no use for": (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"loss": "hinge", "label_smoothing": 0.1}}}},
        "method.dpo.hyperparameters.label_smoothing",
        "remove it",
    ),
    "option of another method": (
        {"method": {"type": "ipo", "ipo": {"hyperparameters": {"label_smoothing": 0.1}}}},
        "method.ipo.hyperparameters.label_smoothing",
        "known are",
    ),
    "reference for a loss without one": ({"method": {"type": "simpo"}, "reference": "cached"}, None, "no reference"),
    "unknown loss": (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"loss": "sigmiod"}}}},
        "method.dpo.hyperparameters.loss",
        "sigmoid",
    ),
    "not a number": (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": "many"}}}},
        "method.dpo.hyperparameters.n_epochs",
        '"auto"',
    ),
    "unknown method": ({"method": {"type": "dop"}}, "method.type", "dpo"),
    "method missing": ({"method": None}, "method", "an object with the fields type, dpo"),
    "method as a text": ({"method": "dpo"}, "method", "an object with the fields type, dpo"),
    "block of another method": ({"method": {"type": "dpo", "supervised": {}}}, "method", "remove one"),
    "both learning rates": (
        {"learning_rate": 1e-4, "method": {"type": "dpo", "dpo": {"hyperparameters": {"learning_rate_multiplier": 2}}}},
        None,
        "exclude each other",
    ),
    "validation twice": ({"validation_file": "file-x", "eval": {"split": 0.5}}, None, "exclude each other"),
    "evaluation of nothing": ({"eval": {"every_steps": 5}}, None, "validation_file or eval.split"),
    "reference where there is none": ({"method": {"type": "supervised"}, "reference": "live"}, None, "no reference"),
    "pairs for a supervised job": ({"method": {"type": "supervised"}}, "training_file", "dpo"),
    "too many workers": ({"resources": {"workers": 9}}, "resources.workers", "at most 8"),
    "GPUs where there are none": ({"resources": {"gpus_per_worker": 1}}, "resources.gpus_per_worker", "0"),
    "batch the data cannot fill": (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 256}}}},
        "method.dpo.hyperparameters.batch_size",
        "16",
    ),
    "longer than the model allows": ({"max_length": 100_000}, "max_length", "512"),
    "suffix too long": ({"suffix": "x" * 65}, "suffix", "64"),
    "negative seed": ({"seed": -1}, "seed", "0"),
    "too much metadata": ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
    "metadata of a number": ({"metadata": {"a": 1}}, "metadata.a", "string"),
}


@pytest.mark.parametrize("name", BAD_JOBS)
async def test_job_is_refused_at_submission(api, name):
    changes, param, mend = BAD_JOBS[name]
    file = await api.upload()
    body = {"model": "tiny", "training_file": file.id, "method": DPO} | changes
    response = await api.http.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert mend in error["message"], error
    assert (await api.sdk.fine_tuning.jobs.list()).data == []
    assert api.changes == 0


@pytest.mark.parametrize("field", ["model", "training_file", "method"])
async def test_missing_field_is_named(api, field):
    body = {"model": "tiny", "training_file": "file-x", "method": DPO}
    del body[field]
    error = (await api.http.post("/v1/fine_tuning/jobs", json=body)).json()["error"]
    assert error["param"] == field
    assert "missing" in error["message"]


@pytest.mark.parametrize(
    ("body", "mend"),
    [
        (b'{"model": ', "no valid JSON"),
        (b"", "body"),
        (b"[]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"\xff\xfe", ""),
        (b'{"model": NaN}', "model"),
        (b"[" * 100_000, ""),
        (b'{"model": "\\ud800", "training_file": "x", "method": {"type": "dpo"}}', "model"),
    ],
)
async def test_body_that_is_no_job(api, body, mend):
    response = await api.http.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert mend in response.json()["error"]["message"]


async def test_answer_longer_than_the_maximum(api):
    rows = [pair(n) for n in range(8)]
    rows[5]["preferred_output"] = LONG
    file = await api.upload(lines(rows))
    with pytest.raises(openai.BadRequestError, match="line 6") as refused:
        await api.job(file.id)
    assert refused.value.param == "max_length"
    assert (await api.sdk.fine_tuning.jobs.list()).data == []
    job = await api.job(file.id, extra_body={"truncation": "drop"})
    assert job.status == "queued"


async def test_conversations_need_a_chat_template(api):
    save_model(api.store.root / "models" / "plain", chat_template=False)
    file = await api.upload()
    with pytest.raises(openai.BadRequestError, match="chat template"):
        await api.job(file.id, model="plain")
    text = await api.upload(lines(trl(prompt=f"{n}:") for n in range(8)))
    assert (await api.job(text.id, model="plain")).status == "queued"


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "sequence-to-sequence"),
        ({"architectures": ["BertForMaskedLM"]}, "ForCausalLM"),
        ({"architectures": None}, "no architecture"),
    ],
)
async def test_models_that_cannot_be_trained(api, change, mend):
    save_model(api.store.root / "models" / "other", **change)
    with pytest.raises(openai.BadRequestError, match=mend) as refused:
        await api.job((await api.upload()).id, model="other")
    assert refused.value.param == "model"


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
async def test_model_directories_that_are_not_whole(api, missing):
    (save_model(api.store.root / "models" / "half") / missing).unlink()
    with pytest.raises(openai.BadRequestError, match=missing.removeprefix("model")) as refused:
        await api.job((await api.upload()).id, model="half")
    assert refused.value.param == "model"


async def test_cluster_with_fewer_gpus_than_asked(api):
    api.cluster.capacity_value = Capacity(cpus=8, gpus=2)
    file = await api.upload()
    with pytest.raises(openai.BadRequestError) as refused:
        await api.job(file.id, extra_body={"resources": {"workers": 3, "gpus_per_worker": 1}})
    assert refused.value.param == "resources.workers"


async def test_cluster_that_cannot_be_asked_is_503_with_retry_after(api):
    file = await api.upload()
    api.cluster.unreachable = True
    with pytest.raises(openai.InternalServerError) as refused:
        await api.job(file.id)
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert (await api.sdk.fine_tuning.jobs.list()).data == []


async def test_one_error_names_several_fields(api):
    body = {"model": "", "training_file": "", "method": DPO, "learning_rate": -1, "max_steps": 0}
    message = json.loads((await api.http.post("/v1/fine_tuning/jobs", json=body)).text)["error"]["message"]
    assert "`model`" in message
    assert "`training_file`" in message
    assert message.endswith("and 1 more")
