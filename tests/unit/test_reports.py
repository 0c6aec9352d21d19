"""The spool is the truth, HTTP the fast path: whatever happens to the API, every report is sent or can be read."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest

from dpo_service.reports import REPORTS, Reporter, read_spool, spool_files


class Api:
    """A small HTTP server that takes reports, or is broken."""

    def __init__(self):
        self.broken, self.keys, self.tokens, self.deliveries = False, [], set(), 0
        self.content_types = set()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                api.deliveries += 1
                if not api.broken:
                    api.content_types.add(self.headers["content-type"])
                    api.tokens.add(self.headers["authorization"])
                    api.keys += [r.key for r in REPORTS.validate_json(body)]
                self.send_response(500 if api.broken else 200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/reports"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def api():
    api = Api()
    yield api
    api.server.shutdown()
    api.server.server_close()


def spooled(directory):
    return [r for file in spool_files(directory) for batch, _ in read_spool(file) for r in batch]


def test_reports_are_sent_once_in_order_with_the_token(tmp_path, api):
    with Reporter(tmp_path, "driver", url=api.url, token="secret") as reporter:
        reporter.message("hello")
        for step in range(1, 4):
            reporter.metrics("train", step, {"loss": 1.0 / step}, f"step {step}")
    keys = [r.key for r in spooled(tmp_path)]
    assert api.keys == keys
    assert keys[1:] == ["metrics:train:1", "metrics:train:2", "metrics:train:3"]
    assert api.tokens == {"Bearer secret"}
    assert api.content_types == {"application/json"}


def test_a_broken_api_costs_nothing(tmp_path, api, monkeypatch):
    monkeypatch.setattr("dpo_service.reports.RETRY_EVERY_S", 0.05)
    api.broken = True
    reporter = Reporter(tmp_path, "driver", url=api.url, token="t")
    reporter.message("while it is away")
    deadline = time.monotonic() + 5
    while api.deliveries == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    api.broken = False
    reporter.message("and back")
    reporter.close()
    assert api.keys == [r.key for r in spooled(tmp_path)]
    assert len(api.keys) == 2


def test_what_a_killed_process_could_not_send_comes_before_what_its_successor_says(tmp_path, api):
    killed = Reporter(tmp_path, "train", url=None, token="t")
    killed.metrics("train", 1, {"loss": 1.0}, "never sent")
    other = Reporter(tmp_path, "driver", url=None, token="t")
    other.message("another process, which sends its own")
    with Reporter(tmp_path, "train", url=api.url, token="t") as successor:
        successor.metrics("train", 2, {"loss": 0.5}, "after the restart")
    assert api.keys == ["metrics:train:1", "metrics:train:2"]


def test_two_processes_of_one_name_share_neither_spool_nor_keys(tmp_path):
    for _ in range(2):
        with Reporter(tmp_path, "train", url=None, token="t") as reporter:
            reporter.message("hello")
    reports = spooled(tmp_path)
    assert len(reports) == len({r.key for r in reports}) == 2


def test_a_torn_last_line_is_left_for_later(tmp_path):
    with Reporter(tmp_path, "driver", url=None, token="t") as reporter:
        reporter.message("whole")
    file = spool_files(tmp_path)[0]
    whole = file.stat().st_size
    line = file.read_bytes()
    file.write_bytes(line + line[: len(line) // 2])
    [(batch, end)] = list(read_spool(file))
    assert [r.message for r in batch] == ["whole"]
    assert end == whole
    file.write_bytes(line + line)
    [(rest, _)] = list(read_spool(file, end))
    assert len(rest) == 1


def test_numpy_scalars_can_be_reported(tmp_path):
    numpy = pytest.importorskip("numpy")
    with Reporter(tmp_path, "driver", url=None, token="t") as reporter:
        reporter.metrics("train", 1, {"loss": numpy.float32(0.5)}, "step")
    data = orjson.loads(spool_files(tmp_path)[0].read_bytes())["data"]
    assert data == {"step": 1, "split": "train", "loss": 0.5}
