"""What a job sampled, over REST and through the command that shows it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_service.cli.cmd_samples import show
from dpo_service.storage import paths


def prompt(step, position, **fields):
    """A row as online/samples.py writes it."""
    row = {
        "step": step,
        "position": position,
        "prompt_index": position,
        "prompt_ids": [1, 2],
        "prompt_text": json.dumps([{"role": "user", "content": f"How much is {position}?"}]),
        "answer_ids": [[3, 4], [5]],
        "answer_texts": ["It is so.", "No"],
        "finished": [True, False],
        "logps": [-1.5, -0.5],
        "versions": [step, step],
        "judge": "pairwise",
        "scores": [1.0, None],
        "missing": [None, "timeout"],
        "comparisons": [
            {
                "first": 0,
                "second": 1,
                "first_shown_first": "first",
                "second_shown_first": None,
                "missing": "timeout",
            }
        ],
        "replies": ["A is better"],
        "cached": False,
        "chosen": [0],
        "rejected": [1],
        "dropped": None,
    }
    return row | fields


def keep(api, job_id, step, rows):
    with api.store.replacing(paths.samples_file(job_id, step)) as path:
        pq.write_table(pa.Table.from_pylist(rows), path)


async def test_the_newest_steps_come_first_page_by_page(api):
    job = await api.job((await api.upload()).id)
    for step in (1, 2):
        keep(api, job.id, step, [prompt(step, 2 * step - 2 + place) for place in range(2)])
    url = f"/v1/fine_tuning/jobs/{job.id}/samples"
    whole = (await api.http.get(url)).json()
    assert [one["id"] for one in whole["data"]] == ["2-2", "2-3", "1-0", "1-1"]
    assert whole["has_more"] is False
    seen, after = [], {}
    while True:
        page = (await api.http.get(url, params={"limit": 1, **after})).json()
        seen += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert seen == [one["id"] for one in whole["data"]]
    of_one = (await api.http.get(url, params={"step": 1})).json()["data"]
    assert [one["step"] for one in of_one] == [1, 1]
    assert (await api.http.get(url, params={"step": 7})).json()["data"] == []


async def test_a_sample_tells_all_that_became_of_it(api):
    job = await api.job((await api.upload()).id)
    keep(api, job.id, 1, [prompt(1, 0)])
    (one,) = (await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/samples")).json()["data"]
    assert one["prompt"] == [{"role": "user", "content": "How much is 0?"}]
    assert one["answers"][1] == {
        "text": "No",
        "finished": False,
        "logp": -0.5,
        "version": 1,
        "score": None,
        "missing": "timeout",
    }
    assert one["comparisons"][0]["second_shown_first"] is None
    assert one["pairs"] == [{"chosen": 0, "rejected": 1}]


async def test_a_prompt_without_a_verdict_is_shown_too(api):
    job = await api.job((await api.upload()).id)
    unsaid = dict.fromkeys(("judge", "scores", "missing", "comparisons", "replies", "cached"))
    keep(api, job.id, 1, [prompt(1, 0), prompt(1, 1, **unsaid, chosen=[], rejected=[], dropped="stale")])
    one = (await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/samples")).json()["data"][1]
    assert (one["judge"], one["pairs"], one["dropped"], one["answers"][0]["score"]) == (None, [], "stale", None)


async def test_jobs_without_samples_and_wrong_places(api):
    job = await api.job((await api.upload()).id)
    url = f"/v1/fine_tuning/jobs/{job.id}/samples"
    assert (await api.http.get(url)).json()["data"] == []
    refused = await api.http.get(url, params={"after": "nothing"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "after")
    before = await api.http.get(url, params={"step": 0})
    assert (before.status_code, before.json()["error"]["param"]) == (400, "step")
    assert (await api.http.get("/v1/fine_tuning/jobs/ftjob-none/samples")).status_code == 404


async def test_a_person_can_read_it(api, capsys):
    job = await api.job((await api.upload()).id)
    keep(api, job.id, 3, [prompt(3, 0), prompt(3, 1, chosen=[], rejected=[], dropped="same_text")])
    for one in (await api.http.get(f"/v1/fine_tuning/jobs/{job.id}/samples")).json()["data"]:
        show(one, full=True)
    text = capsys.readouterr().out
    for said in (
        "step 3, prompt 0, judged by pairwise",
        "user: How much is 0?",
        "cut off",
        "0, and no reply the other way round (timeout)",
        "the judge: A is better",
        "pair: 0 over 1",
        "no pair: same text",
    ):
        assert said in text
