import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_service.errors import InvalidData
from dpo_service.rows.sources import parse_row, raw_rows, read_rows

ROWS = [{"prompt": "a", "chosen": "é", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]


def write(tmp_path, data: bytes, name="pairs.jsonl"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def as_lines(rows) -> bytes:
    return b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)


def as_parquet(tmp_path, rows) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_container_gives_the_same_rows(tmp_path, kind, zipped):
    encoded = {
        "jsonl": as_lines,
        "json": lambda r: json.dumps(r).encode(),
        "parquet": lambda r: as_parquet(tmp_path, r),
    }
    data = encoded[kind](ROWS)
    path = write(tmp_path, gzip.compress(data) if zipped else data, "upload")
    assert [row for _, row in read_rows(path, "upload")] == ROWS
    assert [parse_row(raw, line) for line, raw in raw_rows(path, "upload")] == ROWS


def test_lines_are_those_of_the_file(tmp_path):
    first, second = (json.dumps(row) for row in ROWS)
    lines = write(tmp_path, f"\ufeff\n{first}\n\n{second}\n".encode())
    assert [line for line, _ in read_rows(lines, "x")] == [2, 4]
    array = write(tmp_path, json.dumps(ROWS, indent=2).encode())
    assert [line for line, _ in read_rows(array, "x")] == [2, 7]


def test_columns_without_a_value_are_absent_in_parquet(tmp_path):
    path = write(tmp_path, as_parquet(tmp_path, [{"prompt": "a", "chosen": None}, {"prompt": "b", "chosen": "c"}]))
    assert [row for _, row in read_rows(path, "x")] == [{"prompt": "a"}, {"prompt": "b", "chosen": "c"}]


@pytest.mark.parametrize(
    ("data", "line", "says"),
    [
        (b"", None, "is empty"),
        (b"  \n\n", None, "holds no rows"),
        (b"[]", None, "holds no rows"),
        (b'{"prompt": "a"}\n{"prompt": "b"', 2, "is not JSON"),
        (b'{"prompt": "a"}\nhello', 2, "is not JSON"),
        (b'{"prompt": NaN}', 1, "is not JSON"),
        (b'{"prompt": "\\ud800"}', 1, "is not JSON"),
        (b'{"a": 1}\n[1, 2]', 2, "found an array"),
        (b'["text"]', 1, "found a string"),
        (b'[\n{"a": 1},\n{"a": 2\n]', 4, "is not JSON"),
        (b'[\n{"a": 1}\n{"a": 2}]', 3, "expected ','"),
        (b'[{"a": 1}] more', 1, "text after the end"),
        (b'[{"a": 1},', 1, "is not JSON"),
        (b"[" * 100_000, None, "nested too deeply"),
        (b'{"prompt": "caf\xe9"}', 1, "not UTF-8"),
        (b'[\n{"prompt": "caf\xe9"}]', 2, "not UTF-8"),
        (b'{"prompt": "a"}\n\0\0', 1, "NUL"),
        (b"\x89PNG\r\n\x1a\n", None, "an image"),
        (b"PK\x03\x04rest", None, "a zip archive"),
        ('{"prompt": "a"}'.encode("utf-16"), None, "UTF-16"),
        (b"PAR1 and nothing else", None, "damaged Parquet"),
        (gzip.compress(b'{"prompt": "a"}' * 100)[:-12], None, "damaged gzip"),
    ],
)
def test_what_is_no_list_of_rows_is_refused(tmp_path, data, line, says):
    path = write(tmp_path, data)
    with pytest.raises(InvalidData, match=says) as caught:
        list(read_rows(path, "pairs.jsonl"))
    if line is not None and says != "NUL":
        assert caught.value.line == line


def test_an_overlong_line_is_refused_without_reading_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_service.rows.sources.MAX_ROW_BYTES", 100)
    path = write(tmp_path, b'{"a": 1}\n' + b'{"a": "' + b"x" * 200 + b'"}')
    with pytest.raises(InvalidData, match="line 2: the line is longer than 100 bytes"):
        list(read_rows(path, "x"))


def test_an_overlong_array_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_service.rows.sources.MAX_ARRAY_BYTES", 100)
    path = write(tmp_path, json.dumps([{"a": "x" * 200}]).encode())
    with pytest.raises(InvalidData, match="convert it to JSON Lines"):
        list(read_rows(path, "x"))
