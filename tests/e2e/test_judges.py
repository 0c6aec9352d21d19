"""The judge that asks a language model, against a real one: our own Serve application, vLLM's routes and its JSON."""

import pytest

from dpo_service.online.judges.build import Surroundings, build_judge
from dpo_service.online.judges.port import Answer, JudgeRequest
from dpo_service.specs.judge import PairwiseJudgeSpec, ScoringJudgeSpec
from tests.e2e.test_service import wait_deployed
from tests.models import save_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(600)]
REQUEST = JudgeRequest(
    ({"role": "user", "content": "Which colour has the cat?"},), (Answer("It is red."), Answer("No idea."))
)


@pytest.fixture(scope="module")
def served(service, client):
    """A random model: what it says means nothing, that it is held to the form is what counts."""
    save_tiny_llama(service.data_dir / "models" / "judging", context=16384)
    client.post("/deployments", body={"model": "judging"}, cast_to=object)
    wait_deployed(client, "judging")
    yield "judging"
    client.delete("/deployments/judging", cast_to=object)


async def test_verdicts_of_a_served_model_are_read_and_counted(service, served, tmp_path):
    endpoint = {"base_url": f"{service.url}/v1", "model": served, "temperature": 1.0, "max_tokens": 4096}
    around = Surroundings(cache_file=tmp_path / "verdicts.sqlite")
    for spec in (
        PairwiseJudgeSpec.model_validate({"endpoint": endpoint}),
        ScoringJudgeSpec.model_validate({"endpoint": endpoint}),
    ):
        judge = build_judge(spec, around).judge
        verdict = await judge.judge(REQUEST)
        assert verdict.complete, verdict
        assert verdict.usage.prompt_tokens > 100 * verdict.usage.calls > 0
        assert (await judge.judge(REQUEST)).cached
        assert judge.sums.cached == 1
        await judge.close()
