"""Training ids are serving ids: the service's tokenizer makes what AutoTokenizer makes, or the job is refused."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import tokenizers
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto as auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_service.errors import InvalidSpec
from dpo_service.inspection import inspect as inspection
from dpo_service.inspection import probe, stops, tokenizer
from dpo_service.inspection.subject import Subject
from dpo_service.manifests.inspection import InspectionRequest, SampleRow
from dpo_service.rows.rebuilt import AS_STORED, MISDECLARED, RECIPES, REGISTERED
from dpo_service.rows.template import Tokenizer
from dpo_service.train.policy import copy_tokenizer
from tests import vocabularies as build
from tests.vocabularies import CASES, rewritten, unigram

ASKED = [{"role": "user", "content": "Which colour has the red cat?"}, {"role": "assistant", "content": "The boat."}]


def looked(directory, part=tokenizer, **fields):
    subject = Subject(InspectionRequest(directory=str(directory), **fields))
    part.look(subject)
    return subject


def refused(directory, **fields):
    return [fault.message for fault in looked(directory, **fields).faults]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_equals_the_engines_tokenizer(tmp_path, case):
    subject = looked(case(tmp_path))
    assert subject.faults == []
    ours, theirs = Tokenizer.load(tmp_path), tokenizer.engine_tokenizer(subject)
    assert list(islice(tokenizer.differences(ours, theirs, subject), 3)) == []
    assert ours.special_tokens == theirs.special_tokens_map
    said = theirs("a  b ü").input_ids
    assert theirs.decode(said) == ours.decode(said)


@pytest.mark.parametrize(
    ("case", "stored", "built"),
    [
        # With ▁ before every stretch between special tokens, and before the text only.
        (build.llama, 39, 37),
        (build.llama_turns, 28, 27),
        (build.llama_legacy, 39, 39),
        (build.llama_without_prefix, 39, 36),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_conversation_has_as_many_tokens_as_the_engine_counts(tmp_path, case, stored, built):
    ours, theirs = Tokenizer.load(case(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    text = ours.render(ASKED)
    as_stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(as_stored.encode(text, add_special_tokens=False).ids) == stored
    assert len(theirs.apply_chat_template(ASKED)["input_ids"]) == built
    assert len(ours.encode(text, add_special_tokens=False)) == built


def test_tokens_that_only_the_configuration_names_are_one_token(tmp_path):
    ours = Tokenizer.load(build.special_tokens_in_config(tmp_path))
    assert ours.ids("<|tool|><|call|>", add_special_tokens=False) == [353, 354]
    split = Tokenizer.load(build.special_tokens_split(tmp_path / "split"))
    assert split.ids("<|eos|>", add_special_tokens=False) != [1]
    assert split.digest != Tokenizer.load(build.plain(tmp_path / "whole")).digest


def test_classes_are_those_of_transformers():
    """Every model of the causal-LM table is built by the recipe of its class, or read as stored."""
    generic = {"TokenizersBackend", "MistralCommonBackend"}
    known = {kind: (name or "").removesuffix("Fast") for kind, name in auto.TOKENIZER_MAPPING_NAMES.items()}
    expected = {kind: AS_STORED if name in generic else name for kind, name in known.items()}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        name = expected.get(kind, "")
        assert REGISTERED.get(kind, "") == (name if name in RECIPES or name == AS_STORED else ""), kind
    assert {kind: expected[kind] for kind in REGISTERED} == REGISTERED
    wrong = auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert {kind for kind in REGISTERED if kind in wrong and REGISTERED[kind] != AS_STORED} == MISDECLARED


def test_rules_that_only_the_class_has_are_refused_with_the_mend(tmp_path):
    (message,) = refused(unigram(tmp_path))
    assert "of 'Hello world, this is a test.' (a test text) tokenizer.json makes 23 tokens [11, 8, " in message
    assert "AutoTokenizer (T5Tokenizer) 29 tokens [3, 2, " in message
    assert "differ in normalizer, pre_tokenizer, post_processor, because T5Tokenizer builds rules of its own" in message
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    rewritten(tmp_path, "tokenizer_config", tokenizer_class=AS_STORED)
    assert refused(tmp_path) == [], "what the message advises is enough"


def test_the_jobs_own_rows_come_first(tmp_path):
    rows = (SampleRow(line=7, texts=("the", "the A")),)
    (message,) = refused(unigram(tmp_path), samples=rows)
    assert "of 'the' (line 7 of the training file)" in message


def test_rows_are_held_where_no_test_text_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "TEXTS", ())
    monkeypatch.setattr(probe, "texts_with", lambda tokens: [])
    unigram(tmp_path)
    rewritten(tmp_path, "tokenizer_config", chat_template="{{ messages[-1].content }}{{ tools }}")
    monkeypatch.setattr(probe, "CONVERSATIONS", ())
    assert refused(tmp_path) == []
    same = SampleRow(line=1)
    asked = SampleRow(line=2, conversations=(tuple(ASKED),), tools=({"name": "t"},))
    assert refused(tmp_path, samples=(same,)) == []
    (message,) = refused(tmp_path, samples=(same, asked))
    assert "of \"The boat.[{'name': 't'}]\" (line 2 of the training file, as the chat template renders it)" in message


def test_templates_that_refuse_are_alike(tmp_path):
    build.plain(tmp_path, chat_template="{{ raise_exception('no') }}")
    assert refused(tmp_path) == []


def test_a_template_that_only_the_engine_has_otherwise_is_refused(tmp_path, monkeypatch):
    build.plain(tmp_path, chat_template="{{ messages[0].content }}")
    render = Tokenizer.render
    monkeypatch.setattr(Tokenizer, "render", lambda *args, **more: render(*args, **more) + "!")
    (message,) = refused(tmp_path)
    assert "(a test conversation, as the chat template renders it)" in message


def test_a_template_that_writes_the_time_is_rendered_twice(tmp_path, monkeypatch):
    """Between our rendering and the engine's a second may pass."""
    build.plain(tmp_path, chat_template="{{ messages[0].content }}")
    render, seconds = Tokenizer.render, iter(["1", "", *[""] * 100])
    monkeypatch.setattr(Tokenizer, "render", lambda *args, **more: render(*args, **more) + next(seconds))
    assert refused(tmp_path) == []


def test_tokens_without_a_row_in_the_embedding_are_no_difference(tmp_path):
    rewritten(build.special_tokens_in_config(tmp_path), "config", vocab_size=353)
    assert refused(tmp_path) == []


def test_a_tokenizer_that_needs_code_is_refused(tmp_path):
    build.plain(tmp_path, tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.Own", None]})
    (tmp_path / "config.json").write_text("{}")
    (message,) = refused(tmp_path)
    assert "cannot load the model's tokenizer" in message
    assert "without code of the model's own" in message


def test_a_row_that_the_class_fills_in_is_refused(tmp_path):
    """Code Llama's class reads one of its tokens as a place to fill in, and moves what follows it."""
    build.code_llama(tmp_path)
    assert refused(tmp_path, samples=(SampleRow(line=1, texts=("def f():",)),)) == []
    (message,) = refused(tmp_path, samples=(SampleRow(line=1, texts=("def <FILL_ME>:",)),))
    assert "of 'def <FILL_ME>:' (line 1 of the training file)" in message
    assert "AutoTokenizer (CodeLlamaTokenizer)" in message


def test_tekken_comes_before_tokenizer_json(tmp_path):
    """Where mistral-common is installed, transformers reads Mistral's own file."""
    pytest.importorskip("mistral_common")
    build.mistral(tmp_path)
    assert refused(tmp_path) == []
    (tmp_path / "tekken.json").write_text("{}")
    (message,) = refused(tmp_path)
    assert "AutoTokenizer" in message


def test_the_inspection_has_the_parts(tmp_path):
    assert {tokenizer.look, stops.look} <= set(inspection.PARTS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_published_tokenizer_is_that_of_the_base(tmp_path, case):
    base, published = case(tmp_path / "base"), tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_bytes((base / "config.json").read_bytes())
    copy_tokenizer(base, published)
    assert_same(base, published)


def assert_same(base, published):
    first, second = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(published)
    texts = [*probe.TEXTS, *probe.texts_with(str(token) for token in first.added_tokens_decoder.values())]
    assert first(texts).input_ids == second(texts).input_ids
    assert type(first) is type(second)
    assert (first.chat_template, first.special_tokens_map) == (second.chat_template, second.special_tokens_map)


@pytest.mark.parametrize(("model_type", "published_as"), [("qwen3_5", "qwen3_5_text"), ("llava", "llama")])
def test_a_language_model_of_a_larger_one_keeps_its_class(tmp_path, model_type, published_as):
    base, published = build.qwen2(tmp_path / "base", model_type=model_type), tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_text(json.dumps({"model_type": published_as}))
    copy_tokenizer(base, published)
    assert_same(base, published)


def test_every_file_of_a_tokenizer_is_copied(tmp_path):
    names = (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "vocab.txt", "tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model",
        "qwen.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    )  # fmt: skip
    base = build.plain(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    for name in names:
        if not (base / name).is_file():
            (base / name).write_text("{}")
    (tmp_path / "published").mkdir()
    copy_tokenizer(base, tmp_path / "published")
    assert {path.name for path in (tmp_path / "published").iterdir()} == {*names, "additional_chat_templates"}


CLOSED = "{% for m in messages %}{{ m.content }}{{ '<|pad|>\n' if m.role == 'assistant' }}{% endfor %}"


@pytest.mark.parametrize(
    ("generation", "config", "stopped"),
    [
        ({"eos_token_id": 1}, {}, False),
        ({"eos_token_id": [1, 2]}, {}, True),
        ({"eos_token_id": 2}, {}, True),
        (None, {}, False),
        (None, {"eos_token_id": 2}, True),
        (None, {"text_config": {"eos_token_id": [2]}}, True),
        ({}, {"eos_token_id": 2}, False),
    ],
)
def test_an_answer_ends_where_the_engine_stops(tmp_path, generation, config, stopped):
    rewritten(build.plain(tmp_path, chat_template=CLOSED), "config", **config)
    if generation is not None:
        rewritten(tmp_path, "generation_config", **generation)
    notes = looked(tmp_path, stops).notes
    if stopped:
        assert notes == []
        return
    (note,) = notes
    assert r"writes '<|pad|>\n' (2, " in note
    assert "stops at '<|eos|>' (1)" in note
    assert "generation_config.json" in note


def test_a_template_that_closes_with_the_tokenizers_own_end_is_stopped(tmp_path):
    build.plain(tmp_path, chat_template="{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}")
    assert looked(rewritten(tmp_path, "generation_config", eos_token_id=2), stops).notes == []


def test_a_template_that_ends_nothing_is_noted(tmp_path):
    build.plain(tmp_path, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    (note,) = looked(tmp_path, stops).notes
    assert "writes nothing after an answer" in note


def test_plain_text_needs_an_end_of_sequence(tmp_path):
    assert looked(build.plain(tmp_path), stops).notes == []
    (note,) = looked(build.plain(tmp_path, eos_token=None), stops).notes
    assert "no end-of-sequence token" in note


def test_a_directory_without_tokenizer_json_is_left_to_those_who_read_rows(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert (looked(tmp_path).faults, looked(tmp_path, stops).notes) == ([], [])
    with pytest.raises(InvalidSpec, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
