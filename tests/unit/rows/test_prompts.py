"""Prompts whose answers are sampled: of files of prompts, and of any other."""

from __future__ import annotations

import pytest

from dpo_service.errors import InvalidData
from dpo_service.rows.check import check_file
from dpo_service.rows.encode import Encoded, encode
from dpo_service.rows.formats import recognise
from dpo_service.rows.kinds import as_kind, rows_of, usable
from dpo_service.rows.plan import PromptOrder
from dpo_service.rows.template import Tokenizer
from tests.models import save_tokenizer

USER = {"role": "user", "content": "How much is 2 + 2?"}
GOOD = {"role": "assistant", "content": "It is 4."}
BAD = {"role": "assistant", "content": "It is 5."}
TEXTS = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}


def read(row, kind="prompts"):
    (built,) = rows_of(row, 1, as_kind(recognise(row, 1), kind))
    return built


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "2 + 2 ="}, "2 + 2 =", None),
        ({"prompt": "2 + 2 =", "answer": 4}, "2 + 2 =", "4"),
        ({"prompt": "2 + 2 =", "reference": "four"}, "2 + 2 =", "four"),
        ({"messages": [USER], "answer": "4"}, [USER], "4"),
        ({"messages": [USER, GOOD]}, [USER], "It is 4."),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], "It is 4."),
        (TEXTS, "2 + 2 =", " 4"),
        ({"prompt": "2 + 2 =", "completion": " 4", "label": True}, "2 + 2 =", " 4"),
        ({"prompt": "2 + 2 =", "completion": " 5", "label": False}, "2 + 2 =", None),
    ],
)
def test_every_file_has_prompts(row, prompt, reference):
    built = read(row)
    assert (built.prompt, built.reference, built.answers, built.label) == (prompt, reference, (), None)


def test_the_other_columns_are_for_those_who_judge():
    row = {"prompt": "?", "answer": "4", "level": 3, "metadata": {"level": 1, "source": "book"}, "none": None}
    columns = read(row).columns
    assert columns == {"answer": "4", "level": 3, "source": "book", "metadata": {"level": 1, "source": "book"}}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (TEXTS, " 4"),
        ({"messages": [USER, GOOD]}, [GOOD]),
        ({"prompt": "2 + 2 =", "answer": "4"}, "4"),
        ({"messages": [USER], "answer": "It is 4."}, [GOOD]),
    ],
)
def test_a_demonstration_has_the_answer_that_samples_are_measured_against(row, answer):
    assert read(row, "demonstrations").answers == (answer,)


def test_what_is_no_demonstration_is_refused():
    with pytest.raises(InvalidData, match="give `answer`, or remove the row") as refused:
        read({"prompt": "2 + 2 ="}, "demonstrations")
    assert refused.value.line == 1
    with pytest.raises(InvalidData, match="one good answer a prompt"):
        read({"prompt": "a", "completion": "b", "label": True}, "demonstrations")


def test_what_prompts_are_good_for():
    assert usable("prompts", "prompts")
    assert usable("prompts", "demonstrations")
    for kind in ("pairs", "answers", "unpaired"):
        assert usable(kind, "prompts")
        assert not usable("prompts", kind)


def test_a_prompt_leaves_room_for_its_answer(tokenizer):
    row = read({"messages": [USER], "answer": "4"})
    whole = encode(row, tokenizer, 200, "refuse", 100)
    assert isinstance(whole, Encoded)
    assert whole.answers == ()
    rendered = tokenizer.render([USER], add_generation_prompt=True)
    assert whole.prompt == tokenizer.encode(rendered, add_special_tokens=False)
    cut = encode(row, tokenizer, 110, "refuse", 100)
    assert isinstance(cut, Encoded)
    assert cut.prompt_cut
    assert cut.prompt[-9:] == whole.prompt[-9:]
    assert len(cut.prompt) == 10


def test_a_reference_that_is_not_trained_on_may_have_any_length(tokenizer):
    row = {"prompt": "Tell me.", "answer": "very long " * 100}
    assert isinstance(encode(read(row), tokenizer, 64, "refuse", 32), Encoded)
    with pytest.raises(InvalidData, match="max_length"):
        encode(read(row, "demonstrations"), tokenizer, 64, "refuse", 32)


def test_a_file_of_prompts_is_reported_on(tmp_path, tokenizer):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a?", "answer": "b"}\n{"prompt": "a?"}\n{"prompt": "c?"}\n')
    report = check_file(path, path.name, tokenizer=tokenizer, max_length=64)
    assert (report.format, report.rows, report.kept, report.references) == ("prompt_only", 3, 2, 1)
    assert report.prompt_tokens is not None
    assert report.answer_tokens is None


def test_prompts_come_in_a_fixed_order_without_an_end():
    order = PromptOrder(10, batch_size=4, n_epochs=2, max_steps=None, shuffle=True, seed=3)
    first, second = ([order.row(place) for place in range(start, start + 10)] for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert (order.steps_per_epoch, order.total_steps, order.epoch(15)) == (2, 5, 1.5)
    again = PromptOrder(10, batch_size=2, n_epochs=1, max_steps=7, shuffle=True, seed=3)
    assert [again.row(place) for place in range(10)] == first
    assert again.total_steps == 7
