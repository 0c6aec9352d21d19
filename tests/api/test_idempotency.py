"""A create is done once, however often it is sent."""

import asyncio

import pytest


async def body(api):
    file = await api.upload()
    return {"model": "tiny", "training_file": file.id, "method": {"type": "dpo"}}


async def jobs(api):
    return [job.id for job in (await api.sdk.fine_tuning.jobs.list()).data]


async def create(api, content, **headers):
    return await api.http.post("/v1/fine_tuning/jobs", json=content, headers=headers)


async def test_same_key_same_answer(api):
    content = await body(api)
    first = await create(api, content, **{"idempotency-key": "k"})
    await api.sdk.fine_tuning.jobs.cancel(first.json()["id"])
    api.clock.advance(24 * 3600)
    again = await create(api, content, **{"idempotency-key": "k"})
    assert again.json() == first.json()
    assert len(await jobs(api)) == 1
    other = await create(api, content, **{"idempotency-key": "k2"})
    assert other.json()["id"] != first.json()["id"]


async def test_same_key_other_body_is_409(api):
    content = await body(api)
    await create(api, content, **{"idempotency-key": "k"})
    response = await create(api, content | {"seed": 9}, **{"idempotency-key": "k"})
    assert response.status_code == 409
    assert response.headers["x-should-retry"] == "false"
    assert len(await jobs(api)) == 1


async def test_key_is_forgotten_in_the_end(api):
    content = await body(api)
    first = await create(api, content, **{"idempotency-key": "k"})
    api.clock.advance(49 * 3600)
    again = await create(api, content, **{"idempotency-key": "k"})
    assert again.json()["id"] != first.json()["id"]


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_keys_that_are_none(api, key):
    response = await create(api, await body(api), **{"idempotency-key": key})
    assert response.status_code == 400
    assert await jobs(api) == []


async def test_refused_request_does_not_use_up_its_key(api):
    content = await body(api)
    assert (await create(api, content | {"model": "nowhere"}, **{"idempotency-key": "k"})).status_code == 400
    assert (await create(api, content, **{"idempotency-key": "k"})).status_code == 200


@pytest.mark.parametrize("headers", [{"idempotency-key": "k"}, {"x-stainless-retry-count": "1"}])
async def test_two_at_once_make_one(api, headers):
    content = await body(api)
    answers = await asyncio.gather(*(create(api, content, **headers) for _ in range(5)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(await jobs(api)) == 1


async def test_two_processes_at_once_make_one(api):
    """Another application on the same database: no lock is shared, the primary key decides."""
    from dpo_service.api.app import create_app

    content = await body(api)
    other = api.__class__(api.settings.data_dir)
    other.app = create_app(other.settings, other.database, other.store, other.cluster, clock=other.clock)
    answers = await asyncio.gather(*(create(one, content, **{"idempotency-key": "k"}) for one in (api, other)))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert len(await jobs(api)) == 1
    await other.database.close()


async def test_retry_of_the_client_library_is_recognised_without_a_key(api):
    content = await body(api)
    first = await create(api, content, **{"x-stainless-retry-count": "0"})
    retried = await create(api, content, **{"x-stainless-retry-count": "1"})
    assert retried.json()["id"] == first.json()["id"]
    other = await create(api, content | {"seed": 5}, **{"x-stainless-retry-count": "1"})
    assert other.json()["id"] != first.json()["id"]
    api.clock.advance(121)
    late = await create(api, content, **{"x-stainless-retry-count": "1"})
    assert late.json()["id"] != first.json()["id"]


async def test_two_wishes_are_two_jobs(api):
    content = await body(api)
    for _ in range(2):
        await create(api, content, **{"x-stainless-retry-count": "0"})
    assert len(await jobs(api)) == 2
