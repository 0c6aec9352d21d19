"""The data stage on the session's Ray cluster, with a scorer that knows no model."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_service.data import encoding
from dpo_service.data.pipeline import never, prepare
from dpo_service.errors import InvalidData, InvalidSpec, NonFiniteLoss, StopAsked
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.online.prompts import PromptTable
from dpo_service.reports import Reporter, read_spool, spool_files
from dpo_service.rows.encode import tokenise
from dpo_service.rows.formats import normalise, recognise
from dpo_service.rows.plan import BatchPlan
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.data import DataSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import BatchSpec
from dpo_service.storage.store import Store
from tests.models import save_tokenizer

pytestmark = pytest.mark.ray
BATCH = BatchSpec(batch_size=4, micro_batch_size=2, n_epochs=2)


class LengthScorer:
    """Scores an answer by its length; leaves a file for each actor that was built."""

    def __init__(self, calls):
        self.calls = calls
        (calls / f"{np.random.default_rng().integers(1 << 60)}").touch()

    def __call__(self, table: pa.Table) -> pa.Table:
        for name in set(table.column_names) - {"prompt"}:
            lengths = table[name].combine_chunks().value_lengths()
            table = table.append_column(f"ref_{name}", pa.array([-float(n.as_py()) for n in lengths], pa.float32()))
        return table


class BrokenScorer(LengthScorer):
    def __call__(self, table: pa.Table) -> pa.Table:
        nothing = pa.array([float("nan")] * len(table), pa.float32())
        return table.append_column("ref_chosen", nothing).append_column("ref_rejected", nothing)


def pair(number: int, answer: str = "so"):
    prompt = [{"role": "user", "content": f"What is {number}?"}]
    chosen = [{"role": "assistant", "content": f"It is {answer}{' and so' * (number % 5)}."}]
    return {"prompt": prompt, "chosen": chosen, "rejected": [{"role": "assistant", "content": "No."}]}


@pytest.fixture
def stage(tmp_path, ray_connected):
    """A function that runs the stage on rows, and what it needs around it."""
    store = Store(tmp_path / "root")
    model_dir = tmp_path / "model"
    save_tokenizer(model_dir)
    calls = tmp_path / "calls"
    calls.mkdir()

    class Stage:
        def __init__(self):
            self.store, self.model_dir, self.calls = store, model_dir, calls
            self.spool = tmp_path / "spool"

        def __call__(
            self,
            training,
            *,
            validation=None,
            job="ftjob-1",
            scorer=LengthScorer,
            batch=BATCH,
            ld_alpha=1.0,
            stop=never,
            **data,
        ):
            store.write("files/t", "\n".join(map(json.dumps, training)).encode())
            if validation is not None:
                store.write("files/v", json.dumps(validation).encode())
                data |= {"validation_file": "files/v", "validation_name": "v.json"}
            spec = {"rows": "pairs", "training_file": "files/t", "training_name": "t.jsonl", "max_length": 128}
            with Reporter(self.spool, "driver", url=None, token="") as reporter:
                return prepare(
                    store,
                    DataSpec(**spec | data),
                    batch,
                    job_id=job,
                    model_dir=model_dir,
                    reporter=reporter,
                    scorer=(lambda: scorer(calls)) if scorer else None,
                    reference_digest="base",
                    scored_as={"precision": "float32", "ld_alpha": ld_alpha},
                    resources=ResourceSpec(workers=2),
                    stop=stop,
                )

        def table(self, split) -> pa.Table:
            return pa.concat_tables([pq.read_table(store.path(file)) for file in split.files])

    return Stage()


@pytest.mark.parametrize("stage_left", ["reading", "reference"])
def test_a_stage_that_is_asked_to_stop_leaves_nothing_and_can_be_run_again(stage, stage_left):
    def asked() -> bool:
        said = [report for path in spool_files(stage.spool) for batch, _ in read_spool(path) for report in batch]
        return any(report.type == "progress" and report.data["stage"] == stage_left for report in said)

    rows = [pair(number) for number in range(8)]
    with pytest.raises(StopAsked, match=stage_left):
        stage(rows, stop=asked)
    assert [path for path in stage.store.path("jobs").rglob("*") if path.is_file()] == []
    assert stage(rows).train.rows == 8


def test_a_file_becomes_a_dataset(stage, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD_BYTES", 1000)  # several tasks
    rows = [pair(number) for number in range(30)] + [pair(3)]
    manifest = stage(rows, eval_split=0.2)
    assert (manifest.train.rows, manifest.validation.rows) == (24, 6)
    assert manifest.report.dropped[0].reason == "duplicate"
    assert (manifest.steps_per_epoch, manifest.total_steps) == (6, 12)
    assert stage.store.read_model("jobs/ftjob-1/dataset/dataset.json", DatasetManifest) == manifest
    left = {path.name for path in stage.store.path("jobs/ftjob-1").rglob("*")}
    assert left == {"dataset", "dataset.json", "plan.parquet", "train-00000.parquet", "validation-00000.parquet"}

    train, held = stage.table(manifest.train), stage.table(manifest.validation)
    assert train["index"].to_pylist() == list(range(24))
    assert train["line"].to_pylist() == sorted(train["line"].to_pylist())
    assert sorted(train["line"].to_pylist() + held["line"].to_pylist()) == list(range(1, 31))
    tokenizer = Tokenizer.load(stage.model_dir)
    for values in train.to_pylist():
        raw = rows[values["line"] - 1]
        prompt, (chosen, rejected) = tokenise(normalise(raw, 1, recognise(raw, 1)), tokenizer)
        assert (values["prompt"], values["chosen"], values["rejected"]) == (prompt, chosen, rejected)
        assert (values["ref_chosen"], values["ref_rejected"]) == (-len(chosen), -len(rejected))

    lengths = [len(v["prompt"]) + len(v["chosen"]) + len(v["rejected"]) for v in train.to_pylist()]
    plan = BatchPlan(24, 4, 2, None, True, 0, lengths)
    record = pq.read_table(stage.store.path(manifest.plan)).to_pylist()
    assert [step["rows"] for step in record] == [plan.rows(step) for step in range(12)]
    assert [step["epoch"] for step in record] == [0] * 6 + [1] * 6

    reports = [report for path in spool_files(stage.spool) for batch, _ in read_spool(path) for report in batch]
    assert {report.data["stage"] for report in reports if report.type == "progress"} == {
        "reading",
        "tokenising",
        "reference",
    }
    assert reports[-1].type == "dataset"
    assert DatasetManifest.model_validate(reports[-1].data) == manifest
    assert "30 of 31 rows kept" in reports[-1].message


def test_reference_log_probabilities_are_computed_once_for_all_jobs(stage):
    rows = [pair(number) for number in range(8)]
    first = stage(rows, job="ftjob-1")
    built = len(list(stage.calls.iterdir()))
    assert built > 0
    second = stage(rows, job="ftjob-2")
    assert len(list(stage.calls.iterdir())) == built
    assert stage.table(second.train).equals(stage.table(first.train))
    for number, other in enumerate(({"max_length": 100}, {"ld_alpha": 0.5}), start=3):
        stage(rows, job=f"ftjob-{number}", **other)
        assert len(list(stage.calls.iterdir())) > built
        built = len(list(stage.calls.iterdir()))


def test_the_dataset_of_an_earlier_attempt_is_used_if_it_is_whole(stage):
    rows = [{"prompt": f"{n} is", "completion": " a number"} for n in range(5)]
    options = {"rows": "answers", "scorer": None}
    first = stage(rows, **options)
    path = stage.store.path(first.train.files[0])
    written = path.stat().st_mtime_ns
    assert stage(rows, **options) == first
    assert path.stat().st_mtime_ns == written
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "prompt", table["prompt"].take([1, 0, 2, 3, 4])), path)
    assert stage(rows, **options) == first
    assert pq.read_table(path).equals(table)
    assert (first.rows, first.reference_digest) == ("answers", None)


def unpaired(number: int):
    return {"prompt": f"{number} is", "completion": f" so{' and so' * (number % 7)}", "label": number % 3 > 0}


def test_unpaired_rows_carry_another_rows_answer(stage):
    rows = [unpaired(number) for number in range(30)]
    manifest = stage(rows, rows="unpaired", eval_split=0.2, max_length=28, seed=5)
    assert (manifest.rows, manifest.train.rows, manifest.validation.rows) == ("unpaired", 24, 6)
    assert (manifest.report.desirable, manifest.report.undesirable) == (20, 10)
    for split in (manifest.train, manifest.validation):
        table = stage.table(split).to_pylist()
        answers = {tuple(row["answer"]) for row in table}
        for row in table:
            assert row["label"] == float(rows[row["line"] - 1]["label"])
            assert any(answer[: len(row["mismatched"])] == tuple(row["mismatched"]) for answer in answers)
            assert 0 < len(row["mismatched"]) <= 28 - len(row["prompt"])
            assert row["ref_answer"] == -len(row["answer"])
            assert row["ref_mismatched"] == -len(row["mismatched"])
    assert stage(rows, rows="unpaired", eval_split=0.2, max_length=28, seed=5) == manifest
    with pytest.raises(InvalidData, match="the same prompt"):
        stage(
            [unpaired(1) | {"prompt": "It is", "completion": f" {n}"} for n in range(5)], rows="unpaired", job="other"
        )


def test_judged_probabilities_come_along_and_a_verdict_is_one(stage):
    rows = [pair(number) | ({"chosen_probability": number / 10} if number % 2 else {}) for number in range(6)]
    manifest = stage(rows, scorer=None)
    assert stage.table(manifest.train)["label"].to_pylist() == pytest.approx([1.0, 0.1, 1.0, 0.3, 1.0, 0.5])
    assert manifest.report.judged == 3
    plain = stage([pair(number) for number in range(6)], scorer=None, job="plain")
    assert "label" not in stage.table(plain.train).column_names


def test_pairs_become_unpaired_rows(stage):
    manifest = stage([pair(number) for number in range(6)], rows="unpaired", scorer=None)
    table = stage.table(manifest.train)
    assert table["label"].to_pylist() == [1.0, 0.0] * 6
    assert table["line"].to_pylist() == [line for line in range(1, 7) for _ in range(2)]
    assert all(row["mismatched"] for row in table.to_pylist())


def test_rows_of_the_validation_file_do_not_train(stage):
    manifest = stage([pair(n) for n in range(10)], validation=[pair(2), pair(3), pair(90)], scorer=None)
    assert (manifest.train.rows, manifest.validation.rows) == (8, 3)
    assert [(drop.reason, drop.count) for drop in manifest.report.dropped] == [("in_validation", 2)]


def test_what_cannot_be_trained_on_is_refused_and_leaves_nothing(stage):
    good = [pair(n) for n in range(5)]
    with pytest.raises(InvalidData, match="line 6: chosen and rejected are equal") as caught:
        stage([*good, pair(7) | {"rejected": pair(7)["chosen"]}, {}])
    assert (caught.value.line, caught.value.param) == (6, "training_file")
    with pytest.raises(InvalidData, match="needs pairs") as caught:
        stage(good, validation=[{"messages": [*pair(1)["prompt"], *pair(1)["chosen"]]}])
    assert caught.value.param == "validation_file"
    with pytest.raises(InvalidSpec, match="batch_size is 9 and only 5 rows are left"):
        stage(good, scorer=None, batch=BatchSpec(batch_size=9, micro_batch_size=2, n_epochs=1))
    with pytest.raises(NonFiniteLoss):
        stage(good, scorer=BrokenScorer)
    assert [path for path in stage.store.path("jobs").rglob("*") if path.is_file()] == []
    assert not stage.store.exists("cache")


def test_prompts_become_a_dataset_with_what_judges_read(stage):
    rows = [{"messages": pair(n)["prompt"], "answer": str(n), "level": n} for n in range(9)] + [{"prompt": "2 + 2 ="}]
    stage.store.write("files/m", "\n".join(json.dumps(pair(number)) for number in range(5)).encode())
    with pytest.raises(InvalidData, match="another format"):
        stage(rows, scorer=None, rows="prompts")
    sampled = {"rows": "prompts", "answer_room": 120, "mix_file": "files/m", "mix_name": "m.jsonl"}
    manifest = stage(rows[:9], scorer=None, **sampled)
    assert (manifest.train.rows, manifest.steps_per_epoch, manifest.total_steps) == (9, 2, 4)
    assert (manifest.mix.rows, manifest.report.references) == (5, 9)
    assert set(stage.table(manifest.mix).column_names) >= {"prompt", "chosen", "rejected"}
    assert stage(rows[:9], scorer=None, **sampled) == manifest, "an earlier attempt's is found"

    table = PromptTable.load(stage.store, manifest.train)
    tokenizer = Tokenizer.load(stage.model_dir)
    rendered = tokenizer.render(rows[3]["messages"], add_generation_prompt=True)
    kept = tokenizer.encode(rendered, add_special_tokens=False)[-8:]
    assert list(table[3].token_ids)[-7:] == kept[-7:]
    assert len(table[3].token_ids) == 8, "the answer has 120 of 128"
    assert table[3].text == tuple(rows[3]["messages"])
    assert (table[3].reference, dict(table[3].row), table[3].answer_ids) == ("3", {"answer": "3", "level": 3}, ())


def test_held_out_prompts_come_with_what_judges_read(stage):
    rows = [{"messages": pair(n)["prompt"], "answer": str(n)} for n in range(10)]
    stage.store.write("files/m", "\n".join(json.dumps(pair(number)) for number in range(2, 9)).encode())
    sampled = {"rows": "prompts", "answer_room": 64, "mix_file": "files/m", "mix_name": "m.jsonl", "scorer": None}
    manifest = stage(rows, validation=rows[:3], **sampled)
    assert (manifest.train.rows, manifest.validation.rows, manifest.mix.rows) == (7, 3, 6)
    held = PromptTable.load(stage.store, manifest.validation)
    assert [(row.text, row.reference) for row in (held[place] for place in range(3))] == [
        (tuple(row["messages"]), row["answer"]) for row in rows[:3]
    ]
    split = stage(rows, eval_split=0.4, job="split", **sampled)
    assert (split.train.rows, split.validation.rows) == (6, 4)
    lines = [set(stage.table(part)["line"].to_pylist()) for part in (split.train, split.validation)]
    assert lines[0] | lines[1] == set(range(1, 11))
    texts = [stage.table(part)["prompt"].to_pylist() for part in (split.validation, split.mix)]
    assert split.mix.rows < 7
    assert not any(prompt in texts[1] for prompt in texts[0])


def test_demonstrations_have_their_answers_in_tokens(stage):
    manifest = stage([pair(number) for number in range(6)], scorer=None, rows="demonstrations", answer_room=16)
    table = PromptTable.load(stage.store, manifest.train)
    tokenizer = Tokenizer.load(stage.model_dir)
    raw = pair(2)
    prompt, (chosen, _) = tokenise(normalise(raw, 1, recognise(raw, 1)), tokenizer)
    assert (list(table[2].token_ids), list(table[2].answer_ids)) == (prompt, chosen)
    assert table[2].reference == raw["chosen"][0]["content"]
