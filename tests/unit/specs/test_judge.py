import pytest
from pydantic import TypeAdapter, ValidationError

from dpo_service.specs.judge import JudgeSpec

FREE = {"prompt": 0, "completion": 0}
ENDPOINT = {"base_url": "http://127.0.0.1:8000/v1", "model": "m"}


def spec(**fields):
    return TypeAdapter(JudgeSpec).validate_python(fields)


def rules(**rule):
    return spec(kind="rules", rules=[rule])


def test_an_address_loses_its_last_slash():
    assert spec(kind="pairwise", endpoint={**ENDPOINT, "base_url": "https://host/v1/"}).endpoint.base_url.endswith("v1")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "pairwise"}, "endpoint"),
        ({"kind": "oracle"}, "rules"),
        ({"kind": "pairwise", "endpoint": {**ENDPOINT, "api_key": "sk"}}, "api_key"),
        ({"kind": "pairwise", "endpoint": {**ENDPOINT, "api_key_env": "AWS_SECRET_ACCESS_KEY"}}, "DPO_JUDGE_"),
        ({"kind": "pairwise", "endpoint": {**ENDPOINT, "base_url": "file:///etc"}}, "no base address"),
        ({"kind": "pairwise", "endpoint": {**ENDPOINT, "base_url": "https://u:p@host/v1"}}, "api_key_env"),
        ({"kind": "pairwise", "endpoint": {**ENDPOINT, "base_url": "https://host:123456/v1"}}, "[Pp]ort"),
        ({"kind": "pairwise", "endpoint": {**ENDPOINT, "spend_cap": 1}}, "price"),
        (
            {"kind": "pairwise", "endpoint": {**ENDPOINT, "spend_cap": 1, "price": FREE}},
            "price",
        ),
        ({"kind": "scoring", "samples": 3, "endpoint": ENDPOINT}, "every sample is the same"),
        ({"kind": "self_rewarding", "temperature": 0}, "every sample is the same"),
        ({"kind": "rules", "rules": []}, "at least 1"),
        ({"kind": "reward_model", "model": "m", "gpus": 1}, "set engine to vllm"),
        ({"kind": "reward_model", "model": "m", "cpus": 2}, "set engine to vllm"),
    ],
)
def test_what_cannot_work_is_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        spec(**fields)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"rule": "os.system"}, "exact_match"),
        ({"rule": "registered", "name": "os:system"}, "pattern"),
        ({"rule": "pattern", "pattern": "("}, "no regular expression"),
        ({"rule": "length"}, "without minimum and maximum"),
        ({"rule": "length", "minimum": 5, "maximum": 4}, "no answer fits"),
        ({"rule": "json_schema", "json_schema": {"type": "objekt"}}, "no JSON Schema"),
        ({"rule": "json_schema", "json_schema": {"properties": {"a": {"$ref": "http://x/y"}}}}, "refers to"),
        ({"rule": "exact_match", "weight": 0}, "greater than 0"),
    ],
)
def test_rules_that_cannot_work_are_refused(rule, says):
    with pytest.raises(ValidationError, match=says):
        rules(**rule)


def test_what_no_package_registers_is_named():
    assert rules(rule="registered", name="nobodys").unregistered() == ("nobodys",)
