"""Job documents from files and options."""

from __future__ import annotations

import pytest

from dpo_service.cli import jobfile
from dpo_service.cli.exits import CliError
from dpo_service.cli.jobfile import build, local_files
from dpo_service.specs.job import JobSpec


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    return path


def made(file, *settings, model=None, method=None, deploy=False):
    return build(file, model=model, method=method, settings=settings, deploy=deploy)


def test_a_data_file_and_a_model_make_a_dpo_job(rows):
    document = made(rows, model="m")
    assert document == {"training_file": str(rows), "model": "m", "method": {"type": "dpo"}}
    assert JobSpec.model_validate(document).method.type == "dpo"


def test_settings_reach_nested_fields_and_the_methods_block(rows):
    document = made(rows, "beta=0.3", "n_epochs=2", "eval.split=0.1", "learning_rate=1e-5", "shuffle=false", model="m")
    spec = JobSpec.model_validate(document)
    assert spec.method.hyperparameters.beta == 0.3
    assert (spec.method.hyperparameters.n_epochs, spec.eval.split) == (2, 0.1)
    assert (spec.learning_rate, spec.shuffle) == (1e-5, False)


def test_options_come_before_the_file(tmp_path, rows):
    job = tmp_path / "job.yaml"
    job.write_text("model: a\ntraining_file: rows.jsonl\nmethod: {type: dpo, dpo: {hyperparameters: {beta: 0.2}}}\n")
    assert made(job)["model"] == "a"
    changed = made(job, "batch_size=4", model="b", deploy=True)
    assert (changed["model"], changed["deploy"]) == ("b", True)
    assert changed["method"]["dpo"]["hyperparameters"] == {"beta": 0.2, "batch_size": 4}
    assert made(job, method="supervised")["method"] == {"type": "supervised"}


def test_files_are_found_beside_the_job_file_and_ids_are_let_be(tmp_path, rows):
    job = tmp_path / "job.yaml"
    job.write_text("model: a\ntraining_file: rows.jsonl\nvalidation_file: file-abc\n")
    assert local_files(made(job)) == {"training_file": rows}


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n- b\n", "holds no job"), ("model: [\n", "no readable YAML"), ("training_file: x.jsonl\n", "which model")],
)
def test_a_bad_job_file_is_refused_with_the_reason(tmp_path, text, words):
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(CliError, match=words):
        made(job)


def test_missing_files_and_malformed_settings_are_refused(tmp_path, rows):
    with pytest.raises(CliError, match="no file"):
        made(tmp_path / "none.jsonl", model="m")
    with pytest.raises(CliError, match="no file 'gone"):
        local_files({"training_file": "gone.jsonl"})
    with pytest.raises(CliError, match="key=value"):
        made(rows, "beta", model="m")


def test_files_within_the_document_are_found_and_replaced_too(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}")
    (tmp_path / "job.yaml").write_text("model: m\ntraining_file: file-1\nmix: {file: pairs.jsonl, share: 0.5}\n")
    document = jobfile.load(tmp_path / "job.yaml")
    assert jobfile.local_files(document) == {"mix.file": tmp_path / "pairs.jsonl"}
    sent = jobfile.with_file(document, "mix.file", "file-2")
    assert sent["mix"] == {"file": "file-2", "share": 0.5}
    assert document["mix"]["file"] == str(tmp_path / "pairs.jsonl")
