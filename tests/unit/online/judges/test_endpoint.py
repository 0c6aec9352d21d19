"""The endpoint when things go wrong, over real HTTP: codes, timeouts, the breaker, keys, the spend cap."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from fastapi.responses import JSONResponse, PlainTextResponse

from dpo_service.errors import InvalidSpec, JudgeCallFailed, JudgeError, SpendCapReached
from dpo_service.online.judges.build import Surroundings, build_judge
from dpo_service.online.judges.chat import ChatRequest, Said
from dpo_service.online.judges.endpoint import Endpoint
from dpo_service.online.judges.port import JudgeRequest, Usage
from dpo_service.online.judges.resilience import protected
from dpo_service.online.judges.spend import Purse, SpentFile
from dpo_service.specs.judge import EndpointSpec, PairwiseJudgeSpec, PriceSpec
from dpo_service.storage.store import Store
from tests.unit.online.judges.openai_kit import PAIR, chat, status

HELLO = ChatRequest((Said("user", "hello"),))


class Naps:
    """Sleeps nobody waits for; how long they would have been."""

    def __init__(self):
        self.seconds = []

    async def __call__(self, seconds):
        self.seconds.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
async def asking(server):
    """Makes functions that ask the server, within the limits given."""
    endpoints = []

    def make(naps=None, **limits):
        spec = EndpointSpec.model_validate({"base_url": server.url, "model": "m", "limits": limits})
        endpoints.append(Endpoint(spec))
        return protected(endpoints[-1].complete, spec.limits, naps or Naps())

    yield make
    for endpoint in endpoints:
        await endpoint.close()


async def failure(complete):
    with pytest.raises(JudgeCallFailed) as failed:
        await complete(HELLO)
    return failed.value.reason


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503])
async def test_what_passes_is_asked_again(server, asking, code):
    server.script(status(code), status(code), "yes")
    assert (await asking(attempts=3)(HELLO)).text == "yes"
    assert len(server.bodies) == 3


@pytest.mark.parametrize("code", [400, 413, 422])
async def test_what_is_refused_is_not_asked_again(server, asking, code):
    server.script(status(code), "yes")
    assert await failure(asking()) == "refused"
    assert len(server.bodies) == 1


@pytest.mark.parametrize(("code", "says"), [(401, "key"), (403, "key"), (404, "no such model"), (302, "no such model")])
async def test_a_wrong_key_address_or_model_ends_it(server, asking, code, says):
    server.script(status(code))
    with pytest.raises(JudgeError, match=says) as raised:
        await asking()(HELLO)
    assert not isinstance(raised.value, JudgeCallFailed)
    assert not raised.value.retryable
    assert len(server.bodies) == 1


async def test_the_last_failure_is_what_is_told(server, asking):
    server.script(status(500), status(429))
    assert await failure(asking(attempts=2)) == "rate_limited"


async def test_waits_grow_and_follow_what_the_endpoint_says(server, asking):
    naps = Naps()
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=50), usegmt=True)
    told = [("soon", 500), ("7", 429), (in_a_minute, 503)]
    server.script(status(500), *(status(code, **{"Retry-After": value}) for value, code in told), "yes")
    await asking(naps, attempts=5)(HELLO)
    first, second, in_seconds, dated = naps.seconds
    assert 0.25 <= first <= 0.5 <= second <= 1.0
    assert 7 < in_seconds <= 7.5
    assert 40 < dated <= 51


async def test_an_endpoint_that_wants_too_long_a_wait_is_not_waited_for(server, asking):
    naps = Naps()
    server.script(status(429, **{"Retry-After": "3600"}))
    assert await failure(asking(naps)) == "rate_limited"
    assert naps.seconds == []


async def test_silence_ends_in_a_timeout_and_is_asked_again(server, asking):
    server.script(30.0, "yes")
    assert (await asking(timeout_seconds=0.3, attempts=9)(HELLO)).text == "yes"
    server.script(30.0)
    assert await failure(asking(timeout_seconds=0.1, attempts=2)) == "timeout"


async def test_no_connection_is_a_failure_that_passes():
    spec = EndpointSpec(base_url="http://127.0.0.1:9/v1", model="m")
    naps = Naps()
    assert await failure(protected(Endpoint(spec).complete, spec.limits, naps)) == "connection"
    assert len(naps.seconds) == spec.limits.attempts - 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (PlainTextResponse("<html>"), "malformed"),
        (JSONResponse({"choices": []}), "malformed"),
        (JSONResponse(["choices"]), "malformed"),
        (JSONResponse(chat(None)), "refused"),
    ],
)
async def test_replies_that_are_no_completion(server, asking, reply, reason):
    server.script(reply)
    assert await failure(asking(attempts=1)) == reason


async def test_no_more_calls_at_once_than_allowed(server, asking):
    server.script(0.05)
    complete = asking(concurrency=3)
    await asyncio.gather(*(complete(HELLO) for _ in range(12)))
    assert server.most_at_once == 3


async def test_the_key_comes_from_the_environment_and_is_in_no_message(server):
    spec = EndpointSpec(base_url=server.url, model="m", api_key_env="DPO_JUDGE_KEY")
    with pytest.raises(InvalidSpec, match="DPO_JUDGE_KEY is not set"):
        Endpoint(spec, {})
    server.script("hello")
    endpoint = Endpoint(spec, {"DPO_JUDGE_KEY": "sk-secret"})
    await endpoint.complete(HELLO)
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    server.script(PlainTextResponse("not sk-secret", 401))
    with pytest.raises(JudgeError, match=r"not \*\*\*") as refused:
        await endpoint.complete(HELLO)
    assert "sk-secret" not in str(refused.value)
    await endpoint.close()


def paid(server, spent_file=None, **endpoint):
    price = {"prompt": 1000.0, "completion": 5000.0}
    endpoint = {"base_url": server.url, "model": "m", "price": price, **endpoint}
    spec = PairwiseJudgeSpec.model_validate({"endpoint": endpoint})
    return build_judge(spec, Surroundings(spent_file=spent_file))


async def test_tokens_are_paid_for_and_the_cap_ends_it(server):
    built = paid(server, spend_cap=0.5)  # a call costs 100 * 1000 / 1e6 + 10 * 5000 / 1e6 = 0.15
    verdict = await built.judge.judge(PAIR)
    assert verdict.usage.cost == pytest.approx(0.3)
    await built.judge.judge(PAIR)
    asked = len(server.bodies)
    with pytest.raises(SpendCapReached, match=r"has cost 0\.6000 and may cost 0\.5") as reached:
        await built.judge.judge(PAIR)
    assert len(server.bodies) == asked == 4
    assert (reached.value.spent, reached.value.cap) == (pytest.approx(0.6), 0.5)
    await built.judge.close()


async def test_what_was_spent_before_a_restart_counts(server, tmp_path):
    """Each judge is a process of its own; none of them ends as it should."""
    file = SpentFile(Store(tmp_path), "spent.json")
    for spent in (0.3, 0.6):
        killed = paid(server, file, spend_cap=0.5)
        await killed.judge.judge(PAIR)
        assert killed.judge.take().report()["judge/spent"] == pytest.approx(spent)
    with pytest.raises(SpendCapReached, match=r"has cost 0\.6000"):
        await paid(server, file, spend_cap=0.5).judge.judge(PAIR)
    assert len(server.bodies) == 4


async def test_no_reply_is_used_before_its_cost_is_kept_and_one_write_keeps_many(server, tmp_path, monkeypatch):
    file, written = SpentFile(Store(tmp_path), "spent.json"), []
    writing = threading.Event()
    write = file.write

    def slowly(self, spent):
        written.append(spent)
        writing.wait(10)
        write(spent)

    monkeypatch.setattr(SpentFile, "write", slowly)
    purse = Purse(PriceSpec(prompt=1000.0, completion=5000.0), None, file)
    purse.pay(Usage(1, 100, 10))
    asked = [asyncio.create_task(purse.keep()) for _ in range(4)]
    await asyncio.sleep(0.05)
    assert [task for task in asked if task.done()] == []
    writing.set()
    await asyncio.gather(*asked)
    assert (written, file.read()) == ([pytest.approx(0.15)], pytest.approx(0.15))


def test_a_damaged_file_of_what_was_spent_is_not_taken_for_nothing(tmp_path):
    (tmp_path / "spent.json").write_text("{}")
    with pytest.raises(JudgeError, match=r"spent\.json does not say what the judge has cost"):
        Purse(None, None, SpentFile(Store(tmp_path), "spent.json"))


async def test_a_cap_needs_an_endpoint_that_says_what_it_used(server):
    server.script(JSONResponse({**chat('{"winner": "A"}'), "usage": None}))
    with pytest.raises(JudgeError, match="does not report"):
        await paid(server, spend_cap=1.0).judge.judge(PAIR)
    assert (await paid(server).judge.judge(PAIR)).usage.cost == 0


async def test_the_end_of_one_comparison_calls_off_the_others(server):
    server.answer = lambda body: status(401) if len(server.bodies) == 1 else 30.0
    request = JudgeRequest("p", PAIR.answers * 2)
    built = paid(server)
    with pytest.raises(JudgeError, match="key"):
        await built.judge.judge(request)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in others if "_compare" in repr(task.get_coro())]
    await built.judge.close()
