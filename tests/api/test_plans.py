"""POST /v1/fine_tuning/jobs/plan: admission without creating."""

import pytest

from tests.api.conftest import save_model

PATH = "/v1/fine_tuning/jobs/plan"
LARGE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


async def ask(api, query="", **fields):
    file = await api.upload()
    body = {"model": "tiny", "training_file": file.id, "method": {"type": "dpo"}} | fields
    return await api.http.post(PATH + query, json=body)


async def test_a_plan_decides_as_a_job_would_and_makes_nothing(api):
    answer = await ask(api, seed=3)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["object"] == "fine_tuning.job.plan"
    assert (found["plan"]["gpu"], found["plan"]["fits"], found["dataset"]["kept"]) == ("cpu", True, 16)
    assert found["plan"]["bytes"] == sum(part["bytes"] for part in found["plan"]["parts"])
    assert (await api.sdk.fine_tuning.jobs.list()).data == []
    job = await api.job((await api.upload()).id, seed=3)
    assert job.model_extra["run"] == found["run"]
    assert found["plan"]["steps"] == found["run"]["batch"]["n_epochs"] * 16
    assert str(api.settings.data_dir) not in answer.text


async def test_ktos_mismatched_answers_are_planned_for(api):
    """Each pair is two rows: the prompt twice, and each answer once by its own prompt and once by another's."""
    tokens, scoring = {}, {}
    for method in ("dpo", "kto"):
        found = (await ask(api, method={"type": method})).json()
        plan = found["plan"]
        tokens[method] = plan["tokens_a_step"] * plan["steps"] / found["run"]["batch"]["n_epochs"]
        scoring[method] = plan["reference_seconds"]
    assert tokens["kto"] == pytest.approx(2 * tokens["dpo"])
    assert scoring["kto"] == pytest.approx(2 * scoring["dpo"], rel=0.02)


async def test_what_does_not_fit_says_what_would(api):
    save_model(api.store.root / "models" / "large", **LARGE)
    # The cluster has no GPU: a plan is for one that need not be there.
    plan = (await ask(api, "?gpu=H100-80&gpus=2", model="large")).json()["plan"]
    assert (plan["gpu"], plan["workers"], plan["fits"]) == ("H100-80", 2, False)
    assert plan["bytes"] > plan["limit"]
    assert {"lora": {"rank": 16}} in [fix["change"] for fix in plan["fixes"]]
    assert all(fix["bytes"] < plan["bytes"] for fix in plan["fixes"] if fix["change"])
    assert {other["gpu"]: other["fits"] for other in plan["elsewhere"]}["B200"] is True
    again = (await ask(api, "?gpu=H100-80&gpus=2", model="large", lora={"rank": 16})).json()["plan"]
    assert again["fits"]


@pytest.mark.parametrize(
    ("query", "fields", "param", "said"),
    [
        ("?gpu=V100", {}, "gpu", "H100-80"),
        ("", {"training_file": "file-none"}, "training_file", "file-none"),
        ("", {"model": "none"}, "model", "none"),
        ("?gpus=17", {}, "resources.workers", "at most 16"),
    ],
)
async def test_a_plan_is_refused_as_the_job_would_be(api, query, fields, param, said):
    answer = await ask(api, query, **fields)
    assert answer.status_code in (400, 404, 422), answer.text
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]
