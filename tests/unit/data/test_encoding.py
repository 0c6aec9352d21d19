import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_service.data import encoding
from dpo_service.data.encoding import encode_batch, spool
from dpo_service.errors import InvalidData
from dpo_service.rows.facts import FACTS, REASONS
from tests.models import save_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    return path


def pair(number: int):
    return {"prompt": f"What is {number}?", "chosen": " It is so.", "rejected": " No."}


def batch(rows) -> pa.Table:
    return pa.table({"line": list(range(1, len(rows) + 1)), "row": [json.dumps(row).encode() for row in rows]})


def encode_rows(rows, model_dir, **options):
    given = {"format_name": "trl_text", "kind": "pairs", "max_length": 64, "truncation": "drop"} | options
    return encode_batch(batch(rows), model_dir=str(model_dir), **given)


def test_rows_become_token_ids_and_facts(model_dir):
    result = encode_rows([pair(1), pair(2) | {"chosen": " so" * 80}, pair(3)], model_dir)
    facts = np.frombuffer(b"".join(result["facts"].to_pylist()), FACTS)
    assert facts["line"].tolist() == [1, 2, 3]
    assert [REASONS[reason] for reason in facts["reason"]] == ["", "answer_too_long", ""]
    assert [len(ids) for ids in result["prompt"].to_pylist()] == [facts["n_prompt"][0], 0, facts["n_prompt"][2]]
    assert result["error"].to_pylist() == [None] * 3
    assert result.schema.field("first").type == pa.list_(pa.int32())


def test_a_bad_row_is_the_last_of_its_batch_and_carries_its_error(model_dir):
    result = encode_rows([pair(1), pair(2) | {"chosen": ""}, pair(3) | {"rejected": ""}], model_dir)
    assert result["error_line"].to_pylist() == [None, 2]
    with pytest.raises(InvalidData, match=r"^line 2: `chosen` is empty") as caught:
        encoding._raise_first_error(result)
    assert caught.value.line == 2


def test_a_file_is_cut_into_shards_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD_BYTES", 200)
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(pair(number)) for number in range(10)))
    told = []
    found, shards, count = spool(path, "pairs.jsonl", "pairs", tmp_path, lambda *args: told.append(args))
    assert (found.name, count) == ("trl_text", 10)
    assert len(shards) > 2
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert [row["line"] for row in rows] == list(range(1, 11))
    assert [json.loads(row["row"]) for row in rows] == [pair(number) for number in range(10)]
    assert told[-1] == ("reading", 10, 10)


def test_a_file_of_the_wrong_kind_is_refused_at_its_first_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair(1)))
    with pytest.raises(InvalidData, match="'supervised' needs"):
        spool(path, "pairs.jsonl", "answers", tmp_path, lambda *args: None)
