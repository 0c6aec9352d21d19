import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_service.data import splits
from dpo_service.data.encoding import ENCODED, EncodedFile
from dpo_service.data.splits import split_digest, write_split
from dpo_service.rows.facts import FACTS
from dpo_service.rows.formats import BY_NAME


@pytest.fixture
def encoded(tmp_path):
    table = pa.table(
        {
            "prompt": [[1], [2, 2], [3], [4]],
            "first": [[10], [], [30, 31], [40]],
            "second": [[11], [], [32], [41]],
        },
        schema=ENCODED,
    )
    pq.write_table(table, tmp_path / "encoded.parquet")
    facts = np.zeros(4, FACTS)
    facts["line"] = [1, 2, 3, 4]
    facts["label"] = np.nan
    facts["answer_cut"][2] = True
    return EncodedFile(BY_NAME["trl_text"], tmp_path / "encoded.parquet", facts)


def test_a_split_is_written_in_order_with_its_digest(encoded, tmp_path):
    members = np.array([True, False, True, True])
    split = write_split("train", encoded, members, tmp_path, "jobs/x/dataset")
    assert split.files == ("jobs/x/dataset/train-00000.parquet",)
    assert (split.rows, split.tokens) == (3, 3 + 4 + 3)
    table = pq.read_table(tmp_path / "train-00000.parquet")
    assert table.schema.field("prompt").type == pa.list_(pa.int32())
    assert table.to_pydict() == {
        "index": [0, 1, 2],
        "prompt": [[1], [3], [4]],
        "chosen": [[10], [30, 31], [40]],
        "rejected": [[11], [32], [41]],
        "truncated": [False, True, False],
        "line": [1, 3, 4],
    }


def test_the_digest_depends_on_the_rows_and_not_on_the_files(encoded, tmp_path, monkeypatch):
    members = np.array([True, False, True, True])
    names = ["prompt", "chosen", "rejected"]
    whole = write_split("a", encoded, members, tmp_path, "k")
    monkeypatch.setattr(splits, "ROWS_PER_FILE", 2)
    parts = write_split("b", encoded, members, tmp_path, "k")
    assert len(parts.files) == 2
    assert parts.digest == whole.digest
    assert split_digest([tmp_path / file.split("/")[-1] for file in parts.files], names) == whole.digest
    assert [pq.read_table(tmp_path / f"b-0000{n}.parquet")["index"].to_pylist() for n in (0, 1)] == [[0, 1], [2]]
    fewer = write_split("c", encoded, np.array([True, False, True, False]), tmp_path, "k")
    assert fewer.digest != whole.digest


def test_single_answers_have_one_answer_column(encoded, tmp_path):
    answers = EncodedFile(BY_NAME["openai_chat"], encoded.path, encoded.facts)
    write_split("train", answers, np.array([True] * 4), tmp_path, "k")
    assert pq.read_table(tmp_path / "train-00000.parquet").column_names == [
        "index",
        "prompt",
        "answer",
        "truncated",
        "line",
    ]
