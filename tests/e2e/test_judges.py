"""The judge that asks a language model, against a real one: our own Serve application, vLLM's routes and its JSON."""

import json

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
LIKED = {'"': 6.0, "}": 5.0, ",": 4.0, ":": 3.0, "{": 2.0, "A": 1.0, "7": 1.0}
"""Of the tokens that may come next it says the one it likes best: held to a form it says the least, and A, or 7."""


def save_stubborn_llama(directory):
    """A model that likes tokens as `LIKED` says, whatever it is asked."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(save_tiny_llama(directory, context=8192))
    model.config.tie_word_embeddings = False
    likes = torch.zeros(model.config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    likes[tokenizer.convert_tokens_to_ids(list(LIKED))] = torch.tensor(list(LIKED.values()))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    torch.nn.init.ones_(model.model.embed_tokens.weight)  # so the last hidden state is all ones
    width = model.config.hidden_size
    model.lm_head.weight = torch.nn.Parameter((likes / width)[:, None].expand(-1, width).contiguous())
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def endpoint(service, client):
    save_stubborn_llama(service.data_dir / "models" / "judging")
    client.post("/deployments", body={"model": "judging"}, cast_to=object)
    wait_deployed(client, "judging")
    yield {"base_url": f"{service.url}/v1", "model": "judging", "max_tokens": 64}
    client.delete("/deployments/judging", cast_to=object)


async def judged(spec, around, times=1):
    """The last of so many verdicts on `REQUEST`, and the metrics of all."""
    judge = build_judge(spec, around).judge
    for _ in range(times):
        verdict = await judge.judge(REQUEST)
    await judge.close()
    return verdict, judge.sums.report()


async def test_a_served_model_that_goes_by_position_makes_a_tie_and_is_counted(endpoint, tmp_path):
    around = Surroundings(cache_file=tmp_path / "verdicts.sqlite")
    spec = PairwiseJudgeSpec.model_validate({"endpoint": endpoint})
    verdict, report = await judged(spec, around)
    assert [json.loads(reply) for reply in verdict.replies] == [{"reason": "", "winner": "A"}] * 2, "held to the form"
    assert verdict.pairs[0].orders == ("first", "second"), "the first shown, in either order"
    assert (verdict.scores, verdict.missing, verdict.complete) == ((None, None), ("tie", "tie"), True)
    assert verdict.usage.calls == 2
    assert verdict.usage.prompt_tokens > 200
    assert verdict.usage.completion_tokens >= 2 * 10
    assert (report["judge/position_flips"], report["judge/ties"], report["judge/failed_comparisons"]) == (1, 1, 0)
    assert (report["judge/calls"], report["judge/prompt_tokens"]) == (2, verdict.usage.prompt_tokens)
    assert report["judge/seconds_p50"] > 0
    again, report = await judged(spec, around, times=2)
    assert (again.cached, again.pairs) == (True, verdict.pairs)
    assert (report["judge/calls"], report["judge/cached"]) == (0, 1)


async def test_a_served_model_is_held_to_the_form_of_a_score_where_the_job_says_so(endpoint):
    verdict, _ = await judged(ScoringJudgeSpec.model_validate({"endpoint": endpoint}), Surroundings())
    assert [json.loads(reply) for reply in verdict.replies] == [{"reason": "", "score": 7}] * 2
    assert (verdict.scores, verdict.complete) == ((7, 7), True)
    free = ScoringJudgeSpec.model_validate({"endpoint": endpoint | {"structured": "text"}})
    verdict, report = await judged(free, Surroundings())
    assert (verdict.scores, verdict.missing) == ((None, None), ("unreadable", "unreadable"))
    assert (verdict.usage.calls, report["judge/missing/unreadable"]) == (4, 2), "each was asked for once more"
