"""Where the service is looked for, and what its failures become."""

from __future__ import annotations

import json

import httpx
import pytest

from dpo_service.cli.client import DEFAULT_URL, Service, find_url
from dpo_service.cli.exits import CliError, ExitCode, Refused


def answering(status: int, **content) -> Service:
    return Service("http://127.0.0.1:1", transport=httpx.MockTransport(lambda _: httpx.Response(status, **content)))


def test_the_address_comes_from_the_nearest_place(tmp_path, monkeypatch):
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:8123"}))
    monkeypatch.setenv("DPO_DATA_DIR", str(tmp_path))
    assert find_url(None, None) == "http://127.0.0.1:8123"
    monkeypatch.setenv("DPO_URL", "http://elsewhere:9000/v1")
    assert find_url(None, None) == "http://elsewhere:9000"
    assert find_url(None, tmp_path) == "http://127.0.0.1:8123"
    assert find_url("http://given:1/", tmp_path) == "http://given:1"


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_a_missing_or_broken_note_gives_the_default(tmp_path, content, monkeypatch):
    monkeypatch.delenv("DPO_URL", raising=False)
    if content is not None:
        (tmp_path / "service.json").write_text(content)
    assert find_url(None, tmp_path) == DEFAULT_URL


def test_a_refusal_keeps_message_code_and_field():
    error = {"error": {"message": "line 3: no rejected", "code": "invalid_data", "param": "training_file"}}
    with pytest.raises(Refused, match="line 3") as caught:
        answering(400, json=error).get("/v1/files")
    assert (caught.value.code, caught.value.error_code, caught.value.param) == (
        ExitCode.REFUSED,
        "invalid_data",
        "training_file",
    )


def test_a_model_that_is_not_up_yet_is_unreachable_not_refused():
    with pytest.raises(CliError) as caught:
        answering(503, json={"error": {"message": "starting"}}).get("/v1/models")
    assert caught.value.code == ExitCode.UNREACHABLE


def test_another_program_on_the_port_is_told_apart():
    with pytest.raises(CliError, match="not this service"):
        answering(200, text="<html>").get("/v1/models")
    with pytest.raises(Refused, match="HTTP 404"):
        answering(404, text="<html>").get("/v1/models")


def test_pages_are_followed_to_the_end():
    def page(request: httpx.Request) -> httpx.Response:
        after = int(request.url.params.get("after", 0))
        data = [{"id": str(after + 1)}, {"id": str(after + 2)}]
        return httpx.Response(200, json={"data": data, "has_more": after < 4})

    service = Service("http://127.0.0.1:1", transport=httpx.MockTransport(page))
    assert [item["id"] for item in service.pages("/v1/x")] == ["1", "2", "3", "4", "5", "6"]
