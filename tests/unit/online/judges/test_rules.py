"""Rules as a judge: what each says, how they combine, and that what fails or abstains gives no score."""

import sys

import pytest

from dpo_service.errors import InvalidSpec, JudgeError
from dpo_service.online.judges.port import Answer, Judge, JudgeRequest
from dpo_service.online.judges.rules import RulesJudge
from dpo_service.online.judges.verifiers import patterns
from dpo_service.specs.judge import RulesJudgeSpec

PACKAGE = """
import math, threading

gate = threading.Event()

def starts_with(options):
    if set(options) != {"text"}:
        raise ValueError("give text, and nothing else")
    return lambda answer, request: 1.0 if answer.text.startswith(options["text"]) else None

def broken(options):
    return lambda answer, request: {"raise": 1 / 0} if answer.text == "raise" else options["score"]

def infinite(options):
    return lambda answer, request: math.inf

def slow(options):
    return lambda answer, request: gate.wait()
"""


def judge(*rules):
    return RulesJudge(RulesJudgeSpec.model_validate({"rules": rules}))


async def scores(rules, *texts, reference=None, row=None, **answer):
    request = JudgeRequest("p", tuple(Answer(text, **answer) for text in texts), reference=reference, row=row or {})
    return await judge(*rules).judge(request)


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """A package that is installed as pip leaves it, with verifiers of its own."""
    (tmp_path / "somebodys_verifiers.py").write_text(PACKAGE)
    info = tmp_path / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    names = {"prefix": "starts_with", "broken": "broken", "infinite": "infinite", "slow": "slow", "absent": "absent"}
    points = "".join(f"{name} = somebodys_verifiers:{function}\n" for name, function in names.items())
    (info / "entry_points.txt").write_text(f"[dpo_service.verifiers]\n{points}")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("somebodys_verifiers", None)


async def test_it_is_a_judge():
    assert isinstance(judge({"rule": "finished"}), Judge)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"rule": "exact_match"}, "  four\n", "for"),
        ({"rule": "exact_match", "ignore_case": True}, "FOUR", "fo ur"),
        ({"rule": "exact_match", "ignore_space": False}, "four", " four"),
        ({"rule": "pattern", "pattern": r"fo+"}, "a foot", "a fit"),
        ({"rule": "pattern", "pattern": r"\d+", "whole": True}, "12", "12 "),
        ({"rule": "pattern", "pattern": "sorry", "forbidden": True}, "yes", "sorry, no"),
        ({"rule": "length", "maximum": 2}, "two words", "and three words"),
        ({"rule": "length", "unit": "characters", "minimum": 3}, "abc", "ab"),
        ({"rule": "words_in_form"}, "four", "five"),
    ],
)
async def test_rules_on_text(rule, good, bad):
    assert (await scores([rule], good, bad, reference="four")).scores == (1.0, 0.0)


async def test_json_answers_are_held_to_their_schema():
    schema = {"$defs": {"n": {"type": "integer"}}, "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}
    texts = ['{"n": 1}', '```json\n{"n": 1}\n```', '{"n": "1"}', "n = 1", '{"n": NaN}', "[" * 100_000]
    rule = {"rule": "json_schema", "json_schema": schema}
    assert (await scores([rule], *texts)).scores == (1, 1, 0, 0, 0, 0)
    assert (await scores([{**rule, "fenced": False}], *texts[:2])).scores == (1, 0)


async def test_arithmetic_compares_exactly_or_within_a_tolerance():
    exact, near = {"rule": "arithmetic"}, {"rule": "arithmetic", "tolerance": 0.01}
    assert (await scores([exact], "so 0.75", "0.7500001", "12*(3+4)", reference="3/4")).scores == (1, 0, 0)
    assert (await scores([near], "0.745", "0.7", reference="3/4")).scores == (1, 0)
    assert (await scores([{**exact, "expected": "value"}], "84", "7", row={"value": "12*(3+4)"})).scores == (1, 0)


async def test_tokens_are_counted_where_there_are_any():
    rule = {"rule": "length", "unit": "tokens", "maximum": 2}
    assert (await scores([rule], "a b c", token_ids=(1, 2))).scores == (1,)
    assert (await scores([rule], "a b c")).missing == ("abstained",)


async def test_an_answer_that_was_cut_off_is_not_finished():
    assert (await scores([{"rule": "finished"}], "a", finished=False)).scores == (0,)


async def test_several_rules_are_a_weighted_mean():
    rules = [{"rule": "exact_match", "weight": 3}, {"rule": "length", "maximum": 1}]
    assert (await scores(rules, "four", "five", "it is four", reference="four")).scores == (1, 0.25, 0)


async def test_without_an_expected_value_there_is_no_score_and_not_zero():
    verdict = await scores([{"rule": "length", "maximum": 9}, {"rule": "exact_match", "expected": "answer"}], "four")
    assert verdict.scores == (None,)
    assert verdict.missing == ("abstained",)
    assert not verdict.complete


async def test_a_pattern_that_backtracks_without_end_costs_the_score_only(monkeypatch):
    monkeypatch.setattr(patterns, "LONGEST_SECONDS", 0.2)
    verdict = await scores([{"rule": "pattern", "pattern": r"(?:a|aa)*[bc]", "whole": True}], "a" * 60, "b")
    assert (verdict.scores, verdict.missing) == ((None, 1.0), ("timeout", None))


@pytest.mark.usefixtures("registered")
async def test_an_installed_package_brings_verifiers():
    rule = {"rule": "registered", "name": "prefix", "options": {"text": "Yes"}}
    verdict = await scores([rule], "Yes, it is", "No")
    assert (verdict.scores, verdict.missing) == ((1.0, None), (None, "abstained"))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("name", "text", "options", "why"),
    [
        ("broken", "raise", {}, "verifier_failed"),
        ("broken", "a", {"score": 7}, "not_a_score"),
        ("infinite", "a", {}, "not_a_score"),
        ("slow", "a", {}, "timeout"),
    ],
)
async def test_a_verifier_that_fails_gives_no_score(name, text, options, why):
    rule = {"rule": "registered", "name": name, "options": options, "timeout_seconds": 0.2 if name == "slow" else 60}
    try:
        verdict = await scores([rule], text)
    finally:
        sys.modules["somebodys_verifiers"].gate.set()
    assert (verdict.scores, verdict.missing) == ((None,), (why,))


@pytest.mark.usefixtures("registered")
def test_what_cannot_be_had_is_said_before_anything_is_judged():
    with pytest.raises(InvalidSpec, match="give text"):
        judge({"rule": "registered", "name": "prefix"})
    with pytest.raises(InvalidSpec, match=r"registered: absent, broken, infinite, prefix, slow"):
        judge({"rule": "registered", "name": "os.system"})
    with pytest.raises(JudgeError, match="cannot be imported"):
        judge({"rule": "registered", "name": "absent"})


def test_the_digest_is_that_of_the_rules():
    one, other = judge({"rule": "length", "maximum": 3}), judge({"rule": "length", "maximum": 4})
    assert one.digest == judge({"rule": "length", "maximum": 3}).digest != other.digest
