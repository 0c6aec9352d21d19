"""Files: uploaded whole or not at all, checked row by row, listed, downloaded, deleted."""

import errno
import gzip

import openai
import pytest

from dpo_service.errors import StorageFull
from dpo_service.jobs.admit import admit
from tests.api.conftest import Api, closed, lines, opened, pair, pairs


async def test_upload_retrieve_list_download_delete(api):
    made = await api.upload()
    assert (made.object, made.purpose, made.status, made.filename) == ("file", "fine-tune", "processed", "pairs.jsonl")
    assert made.bytes == len(pairs())
    assert made.model_extra["rows"] == "pairs"
    assert made.model_extra["n_rows"] == 16
    assert (await api.sdk.files.retrieve(made.id)).id == made.id
    assert [file.id for file in (await api.sdk.files.list(purpose="fine-tune")).data] == [made.id]
    assert (await api.sdk.files.wait_for_processing(made.id)).status == "processed"
    assert (await api.sdk.files.content(made.id)).content == pairs()
    assert api.stored() == [f"files/{made.id}", f"files/{made.id}/pairs.jsonl"]
    assert (await api.sdk.files.delete(made.id)).deleted
    assert api.stored() == []
    with pytest.raises(openai.NotFoundError):
        await api.sdk.files.retrieve(made.id)


async def test_gzip_is_read_and_kept_as_sent(api):
    made = await api.upload(gzip.compress(pairs()), "pairs.jsonl.gz")
    assert made.model_extra["n_rows"] == 16
    assert gzip.decompress((await api.sdk.files.content(made.id)).content) == pairs()


async def test_download_is_an_attachment(api):
    made = await api.upload(name="../../ev il;<b>.jsonl")
    assert made.filename == "ev il__b_.jsonl"
    headers = (await api.http.get(f"/v1/files/{made.id}/content")).headers
    assert headers["content-disposition"] == "attachment; filename*=utf-8''ev%20il__b_.jsonl"
    assert headers["content-type"] == "application/octet-stream"
    assert headers["x-content-type-options"] == "nosniff"


async def test_list_pages_in_either_order(api):
    made = []
    for _ in range(3):
        api.clock.advance(1)
        made.append((await api.upload()).id)
    assert [file.id async for file in api.sdk.files.list(limit=2)] == made[::-1]
    assert [file.id async for file in api.sdk.files.list(limit=1, order="asc")] == made


async def test_expired_files_are_gone_with_their_bytes(api):
    made = await api.sdk.files.create(
        file=("pairs.jsonl", pairs()),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert made.expires_at == made.created_at + 3600
    api.clock.advance(3601)
    with pytest.raises(openai.NotFoundError):
        await api.sdk.files.retrieve(made.id)
    assert (await api.sdk.files.list()).data == []
    kept = await api.upload()
    assert api.stored() == [f"files/{kept.id}", f"files/{kept.id}/pairs.jsonl"]


async def test_expired_file_of_a_live_job_stays(api):
    made = await api.sdk.files.create(
        file=("a.jsonl", pairs()), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    await api.job(made.id)
    api.clock.advance(3601)
    await api.upload()
    assert f"files/{made.id}/a.jsonl" in api.stored()


@pytest.mark.parametrize("seconds", ["1", "99999999", "-5", "x", "1e9"])
async def test_expiry_out_of_range(api, seconds):
    response = await api.http.post(
        "/v1/files",
        files={"file": ("a.jsonl", pairs())},
        data={"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": seconds},
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "expires_after.seconds"
    assert api.stored() == []


async def test_delete_is_refused_while_a_live_job_uses_the_file(api):
    made = await api.upload()
    job = await api.job(made.id)
    with pytest.raises(openai.ConflictError, match=job.id):
        await api.sdk.files.delete(made.id)
    await api.sdk.fine_tuning.jobs.cancel(job.id)
    assert (await api.sdk.files.delete(made.id)).deleted


async def test_report_without_and_with_a_model(api):
    made = await api.upload()
    plain = (await api.http.get(f"/v1/files/{made.id}/report")).json()
    assert (plain["rows"], plain["kept"], plain["chosen_tokens"]) == (16, 16, None)
    counted = (await api.http.get(f"/v1/files/{made.id}/report?model=tiny&max_length=20&truncation=cut")).json()
    assert counted["chosen_tokens"]["max"] > 0
    assert counted["truncated_prompts"] + counted["truncated_answers"] > 0
    response = await api.http.get(f"/v1/files/{made.id}/report?model=nowhere")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize("purpose", [None, "", "batch", "fine-tune-results"])
async def test_other_purposes_are_refused(api, purpose):
    data = {} if purpose is None else {"purpose": purpose}
    response = await api.http.post("/v1/files", files={"file": ("a.jsonl", pairs())}, data=data)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "purpose"
    assert api.stored() == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"no boundary here"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nab',
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="other"\r\n\r\nab\r\n--x--\r\n',
        ),
        ("multipart/form-data; boundary=" + "x" * 300, b""),
    ],
)
async def test_bodies_that_are_no_form_with_a_file(api, content_type, body):
    response = await api.http.post("/v1/files", content=body, headers={"content-type": content_type})
    assert response.status_code == 400, response.text
    assert api.stored() == []


async def test_file_over_the_limit_is_413_announced_or_not(tmp_path):
    api = await opened(Api(tmp_path, max_upload_bytes=1000))
    try:
        big = lines(pair(n) for n in range(1000))
        with pytest.raises(openai.APIStatusError) as refused:
            await api.upload(big)
        assert refused.value.status_code == 413

        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'

        async def chunks():
            yield head
            for start in range(0, len(big), 500):
                yield big[start : start + 500]
            yield b"\r\n--x--\r\n"

        kind = {"content-type": "multipart/form-data; boundary=x"}
        response = await api.http.post("/v1/files", content=chunks(), headers=kind)
        assert response.status_code == 413
        assert api.stored() == []
    finally:
        await closed(api)


async def test_bytes_come_through_whatever_the_chunks(api):
    content = pairs()
    body = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    body += (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + content + b"\r\n--x--\r\n"
    )

    async def chunks():
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    response = await api.http.post(
        "/v1/files", content=chunks(), headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert response.status_code == 200, response.text
    assert (await api.sdk.files.content(response.json()["id"])).content == content


async def test_cancelled_upload_leaves_nothing(api):
    """The client goes away in the middle of the body."""
    messages = [
        {"type": "http.request", "body": b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nab'},
        {"type": "http.request", "body": b"more", "more_body": True},
        {"type": "http.disconnect"},
    ]
    messages[0]["more_body"] = True
    seen, sent = [], []

    async def receive():
        seen.append(api.stored())
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/files",
        "raw_path": b"/v1/files",
        "query_string": b"",
        "headers": [(b"content-type", b"multipart/form-data; boundary=x"), (b"host", b"localhost")],
        "scheme": "http",
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 1),
        "root_path": "",
    }
    await api.app(scope, receive, send)
    assert any(path.endswith(".arriving") for path in seen[-1])
    assert api.stored() == []
    assert sent == []


async def test_full_disk_leaves_nothing(api, monkeypatch):
    """The room runs out before, and in the middle of, the body."""

    def no_room(_bytes):
        raise StorageFull("no room")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target, fake in [
        ("dpo_service.storage.store.Store.require_room", lambda self, n: no_room(n)),
        ("os.fsync", full),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(target, fake)
            with pytest.raises(openai.APIStatusError) as refused:
                await api.upload()
        assert refused.value.status_code == 413
        assert refused.value.code == "storage_full"
        assert api.stored() == []
    assert (await api.sdk.files.list()).data == []


async def test_bytes_that_are_gone_are_404(api):
    made = await api.upload()
    api.store.delete(f"files/{made.id}")
    assert (await api.http.get(f"/v1/files/{made.id}/content")).status_code == 404


async def test_file_deleted_while_the_job_is_checked(api, monkeypatch):
    """The rows are read outside the transaction; a deletion in between must not leave a job without its file."""
    made = await api.upload()

    async def slow_admit(spec, **parts):
        admitted = await admit(spec, **parts)
        await api.sdk.files.delete(made.id)
        return admitted

    monkeypatch.setattr("dpo_service.api.routes.jobs.admit", slow_admit)
    with pytest.raises(openai.NotFoundError, match=made.id):
        await api.job(made.id)
    assert (await api.sdk.fine_tuning.jobs.list()).data == []


# --- uploads in parts


async def test_upload_in_parts(api):
    content = pairs(40)
    upload = await api.sdk.uploads.create(
        bytes=len(content), filename="big.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    assert upload.status == "pending"
    second = await api.sdk.uploads.parts.create(upload.id, data=content[1000:])
    first = await api.sdk.uploads.parts.create(upload.id, data=content[:1000])
    done = await api.sdk.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert done.status == "completed"
    assert (await api.sdk.files.content(done.file.id)).content == content
    assert [path for path in api.stored() if path.startswith("uploads/")] == []
    with pytest.raises(openai.ConflictError):
        await api.sdk.uploads.complete(upload.id, part_ids=[first.id, second.id])


async def test_parts_that_do_not_make_the_file(api):
    content = pairs()
    upload = await api.sdk.uploads.create(
        bytes=len(content), filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    part = await api.sdk.uploads.parts.create(upload.id, data=content[:-10])
    for body, param in [
        ({"part_ids": [part.id]}, "part_ids"),
        ({"part_ids": ["part_x"]}, "part_ids.0"),
        ({"part_ids": [part.id, part.id]}, "part_ids"),
        ({"part_ids": []}, "part_ids"),
        ({"part_ids": [part.id], "md5": "x"}, "md5"),
    ]:
        response = await api.http.post(f"/v1/uploads/{upload.id}/complete", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    rest = await api.sdk.uploads.parts.create(upload.id, data=content[-10:])
    with pytest.raises(openai.BadRequestError, match="md5"):
        await api.sdk.uploads.complete(upload.id, part_ids=[part.id, rest.id], md5="0" * 32)
    assert (await api.sdk.uploads.complete(upload.id, part_ids=[part.id, rest.id])).status == "completed"


async def test_refused_rows_leave_the_upload_pending_and_no_file(api):
    content = b'{"prompt": "a", "chosen": "b"}\n'
    upload = await api.sdk.uploads.create(bytes=len(content), filename="a.jsonl", mime_type="x", purpose="fine-tune")
    part = await api.sdk.uploads.parts.create(upload.id, data=content)
    with pytest.raises(openai.BadRequestError, match="line 1"):
        await api.sdk.uploads.complete(upload.id, part_ids=[part.id])
    assert [path for path in api.stored() if path.startswith("files/")] == []
    assert (await api.sdk.files.list()).data == []
    assert (await api.sdk.uploads.cancel(upload.id)).status == "cancelled"
    assert api.stored() == []
    with pytest.raises(openai.ConflictError):
        await api.sdk.uploads.parts.create(upload.id, data=b"x")


async def test_uploads_that_were_never_completed_are_swept(api):
    upload = await api.sdk.uploads.create(bytes=9, filename="a.jsonl", mime_type="x", purpose="fine-tune")
    await api.sdk.uploads.parts.create(upload.id, data=b"x")
    api.clock.advance(3601)
    with pytest.raises(openai.ConflictError, match="expired"):
        await api.sdk.uploads.cancel(upload.id)
    await api.sdk.uploads.create(bytes=9, filename="b.jsonl", mime_type="x", purpose="fine-tune")
    assert api.stored() == []


async def test_announced_too_large(tmp_path):
    api = await opened(Api(tmp_path, max_upload_bytes=1000))
    with pytest.raises(openai.APIStatusError) as refused:
        await api.sdk.uploads.create(bytes=1001, filename="a", mime_type="x", purpose="fine-tune")
    assert refused.value.status_code == 413
    await closed(api)
