"""The reward model judge on real checkpoints: a tiny decoder and a tiny encoder with one output."""

import asyncio
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from dpo_service.errors import InvalidSpec
from dpo_service.online.judges.build import Surroundings, build_judge
from dpo_service.online.judges.reward_inprocess import RewardModel, by_length, padding_id
from dpo_service.online.judges.reward_model import longest
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.judge import RewardModelJudgeSpec
from tests.models import save_tokenizer
from tests.unit.online.judges.reward_kit import CONVERSATION, HEADS, SIZES, TEXTS, judge, request, save_reward_model


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoder")
    save_tokenizer(directory, chat_template=None)
    torch.manual_seed(2)
    BertForSequenceClassification(BertConfig(**SIZES, **HEADS, pad_token_id=2)).save_pretrained(directory)
    return directory


@torch.inference_mode()
def one_by_one(directory, sequences):
    """What transformers says of each sequence alone, its last token being its last whichever it is."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    model.config.pad_token_id = None
    return [model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]


@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
async def test_a_conversation_is_scored_as_the_template_writes_it(decoder, batch_tokens):
    verdict = await judge(decoder, batch_tokens=batch_tokens).judge(request(CONVERSATION))
    tokenizer = Tokenizer.load(decoder)
    texts = [f"<|bos|><|user|>Which colour?<|eos|><|assistant|>{text}<|eos|>" for text in TEXTS]
    expected = one_by_one(decoder, [tokenizer.encode(text, add_special_tokens=False) for text in texts])
    assert verdict.scores == pytest.approx(expected, abs=1e-5)
    assert len(set(verdict.scores)) == len(TEXTS)
    assert verdict.complete


@pytest.mark.parametrize("batch_tokens", [90, 10_000])
async def test_plain_text_is_scored_by_an_encoder(encoder, batch_tokens):
    verdict = await judge(encoder, batch_tokens=batch_tokens).judge(request("Say: "))
    tokenizer = Tokenizer.load(encoder)
    expected = one_by_one(encoder, [tokenizer.encode("Say: " + text) for text in TEXTS])
    assert verdict.scores == pytest.approx(expected, abs=1e-5)


async def test_requests_at_the_same_time_are_computed_together_and_each_gets_its_own(decoder):
    shared, alone = judge(decoder), judge(decoder)
    requests = [request(({"role": "user", "content": f"q{number}"},), TEXTS[:number]) for number in range(1, 6)]
    together = await asyncio.gather(*(shared.judge(one) for one in requests))
    for one, verdict in zip(requests, together, strict=True):
        assert verdict.scores == pytest.approx((await alone.judge(one)).scores, abs=1e-5)
    await shared.close()


async def test_what_does_not_fit_has_no_score_and_the_others_have(decoder):
    tokenizer = Tokenizer.load(decoder)
    longest = max(len(tokenizer.encode(f"<|bos|><|user|>Which colour?<|eos|><|assistant|>{t}<|eos|>")) for t in TEXTS)
    verdict = await judge(decoder, max_length=longest - 1).judge(request(CONVERSATION))
    assert verdict.missing == (None, None, "too_long", None, None)
    assert [score is None for score in verdict.scores] == [False, False, True, False, False]


async def test_the_models_own_window_bounds_too(decoder):
    verdict = await judge(decoder, max_length=100_000).judge(request(CONVERSATION, ["a", "word " * 300]))
    assert verdict.missing == (None, "too_long")


def test_the_tokenizers_bound_holds_too(decoder, tmp_path):
    """Some models have positions that no token takes (RoBERTa's first two)."""
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((decoder / file).read_text())
    spec = RewardModelJudgeSpec(model="rm", max_length=1000)
    assert longest(tmp_path, spec) == 256
    document = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(document | {"model_max_length": 254}))
    assert longest(tmp_path, spec) == 254


async def test_a_model_without_a_template_has_nothing_to_say_of_a_conversation(encoder):
    assert (await judge(encoder).judge(request(CONVERSATION, ["a"]))).missing == ("template_refused",)


async def test_a_score_that_is_no_number_is_none(decoder, tmp_path):
    for file in decoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["score.weight"] *= float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    verdict = await judge(tmp_path).judge(request(CONVERSATION, ["a", "b"]))
    assert (verdict.scores, verdict.missing) == ((None, None), ("not_finite", "not_finite"))


async def test_scores_in_half_precision_are_float32_and_near(decoder):
    exact = (await judge(decoder).judge(request(CONVERSATION))).scores
    near = (await judge(decoder, precision="bfloat16").judge(request(CONVERSATION))).scores
    assert near == pytest.approx(exact, abs=0.05)


async def test_known_answers_are_not_computed_again_and_other_weights_are_another_judge(decoder, tmp_path):
    first = await judge(decoder, cache_file=tmp_path / "v.sqlite").judge(request(CONVERSATION))
    again = await judge(decoder, cache_file=tmp_path / "v.sqlite").judge(request(CONVERSATION))
    other = await judge(decoder, "other", tmp_path / "v.sqlite").judge(request(CONVERSATION))
    assert (again.cached, again.scores, other.cached) == (True, first.scores, False)


def test_what_is_no_reward_model_is_refused(decoder, tmp_path):
    with pytest.raises(InvalidSpec, match="was not found"):
        build_judge(RewardModelJudgeSpec(model="rm"), Surroundings())
    save_tokenizer(tmp_path)
    config = LlamaConfig(**SIZES, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InvalidSpec, match="no reward model"):
        judge(tmp_path)
    document = json.loads((decoder / "config.json").read_text())
    document["id2label"] = {"0": "a", "1": "b"}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(InvalidSpec, match="2 outputs"):
        judge(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidSpec, match="cannot be loaded"):
        judge(tmp_path)


def test_batches_hold_all_within_the_budget_but_for_what_is_longer_alone():
    lengths = [5, 100, 3, 8, 8, 1]
    batches = list(by_length(lengths, 16))
    assert sorted(place for batch in batches for place in batch) == list(range(6))
    assert batches == [[1], [3, 4], [0, 2, 5]]


def test_padding_is_never_a_token_of_the_batch():
    assert padding_id([[5, 6], [7]], 2, 10) == 2
    assert padding_id([[0, 2], [1]], 2, 10) == 3
    assert padding_id([[0, 2], [1]], None, 3) is None
    assert padding_id([[0, 2], [2, 2]], 2, 3) == -1


def test_a_batch_that_uses_the_whole_vocabulary_is_split(decoder):
    model = RewardModel(decoder, RewardModelJudgeSpec(model="rm", batch_tokens=10**6))
    ids = list(range(400))
    sequences = [ids[:150], ids[150:300], ids[300:], [1, 1, 7, 1]]
    assert model.scores(sequences) == pytest.approx(one_by_one(decoder, sequences), abs=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_score_does_not_depend_on_longer_answers_beside_it_or_before_it(tmp_path, kind):
    scaled = {"dynamic": {"factor": 4.0}, "longrope": {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}}[kind]
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, "original_max_position_embeddings": 32} | scaled
    length = 32 if kind == "dynamic" else 256
    directory = save_reward_model(tmp_path, rope_parameters=parameters, max_position_embeddings=length)
    model = RewardModel(directory, RewardModelJudgeSpec(model="rm"))
    sequences = [[number % 300 + 5 for number in range(start, start + length)] for start, length in ((1, 9), (3, 90))]
    expected = [one_by_one(directory, [ids])[0] for ids in sequences]
    assert model.scores(sequences) == pytest.approx(expected, abs=1e-5)
    assert model.scores(sequences[:1]) == pytest.approx(expected[:1], abs=1e-5)
