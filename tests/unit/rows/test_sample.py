"""Which rows of a file are looked at before all of them are read, and in which shape."""

from __future__ import annotations

import gzip
import json

from dpo_service.rows import sample
from dpo_service.rows.sample import sample_rows

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
ASK, SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f"}}


def lines(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_pair_of_texts_is_its_prompt_and_each_continuation(tmp_path):
    (row,) = sample_rows(lines(tmp_path, [PAIR]), "rows.jsonl", "pairs")
    assert (row.line, row.texts, row.conversations, row.tools) == (1, ("p", "pc", "pr"), (), None)


def test_a_conversation_keeps_its_tools(tmp_path):
    pair = {"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "no"}], "tools": [TOOL]}
    (row,) = sample_rows(lines(tmp_path, [pair]), "rows.jsonl", "pairs")
    assert row.texts == ()
    assert row.conversations == ((ASK,), (ASK, SAY), (ASK, {**SAY, "content": "no"}))
    assert row.tools == (TOOL,)


def test_rows_are_as_the_method_reads_them(tmp_path):
    path = lines(tmp_path, [PAIR])
    assert [row.texts for row in sample_rows(path, "rows.jsonl", "unpaired")] == [("p", "pc"), ("p", "pr")]
    assert [row.texts for row in sample_rows(path, "rows.jsonl", "prompts")] == [("p",)]


def test_first_longest_and_random_rows(tmp_path):
    rows = [PAIR | {"prompt": f"prompt {n}" + "x" * (1000 if n in (700, 800) else 0)} for n in range(1000)]
    chosen = [row.line for row in sample_rows(lines(tmp_path, rows), "rows.jsonl", "pairs")]
    assert chosen == sorted(chosen)
    assert {1, 2, 3, 4, 701, 801} <= set(chosen)
    assert sample.FIRST + sample.RANDOM <= len(chosen) <= sample.FIRST + sample.LONGEST + sample.RANDOM
    assert sum(line > 100 for line in chosen) > 10
    assert chosen == [row.line for row in sample_rows(lines(tmp_path, rows), "rows.jsonl", "pairs")], "the same again"


def test_what_is_sampled_is_bounded(tmp_path):
    rows = [PAIR | {"prompt": "x" * (sample.ROW_BYTES if n == 5 else 50_000)} for n in range(40)]
    found = sample_rows(lines(tmp_path, rows), "rows.jsonl", "pairs")
    assert 6 not in [row.line for row in found], "a row that is too long"
    assert len(found) == sample.ALL_BYTES // 50_100


def test_a_long_file_is_read_for_a_limited_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "READ_S", 0.0)
    assert [row.line for row in sample_rows(lines(tmp_path, [PAIR] * 50), "rows.jsonl", "pairs")] == [1]
    monkeypatch.setattr(sample, "READ_S", 60.0)
    monkeypatch.setattr(sample, "READ_ROWS", 3)
    assert [row.line for row in sample_rows(lines(tmp_path, [PAIR] * 50), "rows.jsonl", "pairs")] == [1, 2, 3]


def test_what_cannot_be_read_is_left_to_the_check_of_all_rows(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(gzip.compress(json.dumps(PAIR).encode() + b"\nno JSON\n"))
    assert [row.line for row in sample_rows(path, "f", "pairs")] == [1]
    assert sample_rows(tmp_path / "nowhere", "f", "pairs") == ()
    path.write_bytes(b"%PDF")
    assert sample_rows(path, "f", "pairs") == ()
    assert sample_rows(lines(tmp_path, [{"x": 1}]), "rows.jsonl", "pairs") == ()
    assert sample_rows(lines(tmp_path, [{"prompt": "p", "completion": "c"}]), "rows.jsonl", "pairs") == ()
