import json
import tracemalloc

import pytest

from dpo_service.errors import InvalidData
from dpo_service.manifests.dataset import DropCount
from dpo_service.rows import check
from dpo_service.rows.check import check_file
from dpo_service.rows.encode import tokenise
from dpo_service.rows.row import Row
from dpo_service.rows.summary import summary
from dpo_service.rows.template import Tokenizer
from tests.models import save_tokenizer


def pair(number: int, **extra):
    return {"prompt": f"What is {number}?", "chosen": f"It is {number}, so.", "rejected": "No.", **extra}


def write(tmp_path, rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    return Tokenizer.load(path)


def test_the_report_counts_what_a_person_wants_to_know(tmp_path):
    reverse = {"prompt": "What is 1?", "chosen": "No.", "rejected": "It is 1, so."}
    rows = [pair(0), pair(1), pair(2, margin=0), pair(1), reverse, pair(0)]
    report = check_file(write(tmp_path, rows), "pairs.jsonl")
    assert (report.format, report.rows, report.kept) == ("trl_text", 6, 4)
    assert report.dropped == (DropCount(reason="duplicate", count=2, first_line=4),)
    assert (report.contradictions, report.ties) == (2, 1)
    assert report.longer_chosen_share == 0.75
    assert report.prompt_tokens is None
    text = summary(report)
    assert "4 of 6 rows kept" in text
    assert "left out: 2 duplicate (first on line 4)" in text


def test_repeated_rows_stay_where_asked(tmp_path):
    path = write(tmp_path, [pair(0), pair(0)])
    assert check_file(path, "x", deduplicate=False).kept == 2
    with pytest.raises(InvalidData, match=r"of 2 rows in 'x' only 1 can be trained on \(1 duplicate\)"):
        check_file(path, "x")


def test_lengths_come_with_a_tokenizer(tmp_path, tokenizer):
    rows = [pair(number) for number in range(30)]
    report = check_file(write(tmp_path, rows), "x", rows="pairs", tokenizer=tokenizer, max_length=512)
    lengths = [len(tokenise(Row(1, r["prompt"], (r["chosen"], r["rejected"])), tokenizer)[1][0]) for r in rows]
    assert report.chosen_tokens.max == max(lengths)
    assert report.chosen_tokens.mean == pytest.approx(sum(lengths) / 30, abs=0.06)
    assert any("longer one in 100%" in warning for warning in report.warnings)
    assert "chosen tokens: mean" in summary(report)


def test_supervised_files_have_answers_not_pairs(tmp_path, tokenizer):
    rows = [{"prompt": f"{n} is", "completion": f" the number {n}"} for n in range(3)]
    report = check_file(write(tmp_path, rows), "x", rows="answers", tokenizer=tokenizer, max_length=64)
    assert report.answer_tokens.max > 0
    assert (report.chosen_tokens, report.longer_chosen_share) == (None, None)


def test_unpaired_files_have_two_sides_that_may_contradict(tmp_path, tokenizer):
    rows = [{"prompt": f"{n} is", "completion": f" the number {n}", "label": n > 2} for n in range(8)]
    rows += [rows[5] | {"label": False}, rows[6]]
    report = check_file(write(tmp_path, rows), "x", rows="unpaired", tokenizer=tokenizer, max_length=64)
    assert (report.kept, report.desirable, report.undesirable, report.contradictions) == (9, 5, 4, 2)
    assert report.answer_tokens.max > 0
    assert "5 desirable answers, 4 undesirable" in summary(report)
    assert any("desirable and undesirable of one and the same answer" in warning for warning in report.warnings)


def test_a_file_of_pairs_is_read_as_unpaired_answers(tmp_path, tokenizer):
    pairs = [pair(number) for number in range(6)]
    report = check_file(write(tmp_path, pairs), "x", rows="unpaired", tokenizer=tokenizer, max_length=512)
    assert (report.rows, report.desirable, report.undesirable) == (12, 6, 6)
    assert (report.chosen_tokens, report.longer_chosen_share) == (None, None)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([pair(0)], "has 1 row; training needs at least 2"),
        ([pair(0), pair(1) | {"rejected": pair(1)["chosen"]}], "line 2: chosen and rejected are equal"),
        ([pair(0), {"prompt": "a", "chosen": "b"}], "line 2: the row has no `rejected`"),
        ([pair(0), {"messages": [{"role": "user", "content": "x"}]}], "line 2: "),
        ([{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}] * 2, "needs pairs"),
    ],
)
def test_bad_files_are_refused(tmp_path, rows, says):
    with pytest.raises(InvalidData, match=says):
        check_file(write(tmp_path, rows), "x", rows="pairs")


def test_long_answers_are_refused_cut_or_dropped(tmp_path, tokenizer):
    path = write(tmp_path, [pair(0), pair(1), pair(2) | {"chosen": "so " * 60}])
    with pytest.raises(InvalidData, match="line 3: the longer answer has"):
        check_file(path, "x", tokenizer=tokenizer, max_length=50)
    assert check_file(path, "x", tokenizer=tokenizer, max_length=50, truncation="cut").truncated_answers == 1
    dropped = check_file(path, "x", tokenizer=tokenizer, max_length=50, truncation="drop").dropped
    assert dropped == (DropCount(reason="answer_too_long", count=1, first_line=3),)


def test_conversations_for_a_model_without_a_template_are_refused(tmp_path):
    save_tokenizer(tmp_path, chat_template=None)
    row = {"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(InvalidData, match="line 1: this is a conversation, and the model has no chat template"):
        check_file(write(tmp_path, [row] * 2), "x", tokenizer=Tokenizer.load(tmp_path), max_length=50)


def test_past_the_budget_only_long_rows_are_counted(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(check, "TOKENISE_BYTES", 100)
    counted = []
    monkeypatch.setattr(check, "encode", lambda row, *rest: counted.append(row.line) or encode(row, *rest))
    from dpo_service.rows.encode import encode

    rows = [pair(number) for number in range(20)]
    rows[15] |= {"chosen": "so " * 200}
    path = write(tmp_path, rows)
    with pytest.raises(InvalidData, match="line 16: the longer answer"):
        check_file(path, "x", tokenizer=tokenizer, max_length=200)
    assert counted[-1] == 16
    assert len(counted) < 8
    report = check_file(path, "x", tokenizer=tokenizer, max_length=1000, full=False)
    assert report.prompt_tokens is None
    report = check_file(path, "x", tokenizer=tokenizer, max_length=1000, full=True)
    assert report.prompt_tokens is not None


def test_rows_are_not_held_in_memory(tmp_path):
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for number in range(4000):
            file.write(json.dumps(pair(number, filler="x" * 2000)) + "\n")
    tracemalloc.start()
    try:
        report = check_file(path, "x", deduplicate=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.kept == 4000
    assert peak < path.stat().st_size / 4
