"""The demo's base model is an ordinary model directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dpo_service.demo.corpus import generate
from dpo_service.demo.model import CONTEXT, END, VOCABULARY, make_base_model
from dpo_service.rows.template import Tokenizer


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def texts():
    return [f"{prompt}\n{answer}" for prompt, answer in generate(2000, 1, 1).supervised]


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "demo-base"
    make_base_model(directory, texts)
    return directory


def test_transformers_loads_it_and_it_is_small(model):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert 1e6 < loaded.num_parameters() < 6e6
    assert loaded.config.vocab_size == VOCABULARY


def test_its_tokenizer_renders_conversations_as_transformers_does(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    conversation = [{"role": "user", "content": "Say apple two times."}]
    answered = [*conversation, {"role": "assistant", "content": "apple apple"}]
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(answered, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == f" apple apple{END}"
    assert tokenizer.model_max_length == CONTEXT
    ours = Tokenizer.load(model)
    assert ours.eos_token_id == tokenizer.eos_token_id == whole[-1]
    assert ours.chat_template == tokenizer.chat_template


def test_the_same_texts_and_seed_give_the_same_files(model, texts, tmp_path):
    make_base_model(tmp_path / "again", texts)
    assert digests(tmp_path / "again") == digests(model)
    make_base_model(tmp_path / "again", texts, seed=1)
    changed = digests(tmp_path / "again")
    assert changed["model.safetensors"] != digests(model)["model.safetensors"]
    assert changed["tokenizer.json"] == digests(model)["tokenizer.json"]
