import pytest

from dpo_service.errors import InvalidData
from dpo_service.rows.formats import BY_NAME, normalise, recognise
from dpo_service.rows.kinds import as_kind, rows_of
from dpo_service.rows.row import Row

USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Because of Rayleigh scattering."}
BAD = {"role": "assistant", "content": "It is painted."}
PAIR = Row(3, [USER], ([GOOD], [BAD]))
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]


def read(row, line=3) -> tuple[str, Row]:
    found = recognise(row, line)
    return found.name, normalise(row, line, found)


def test_openai_preference():
    row = {"input": {"messages": [USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
    assert read(row) == ("openai_preference", PAIR)


def test_openai_tools_and_calls_reach_the_template_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"q": "sky"}'}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = {
        "input": {"messages": [USER], "tools": TOOLS, "parallel_tool_calls": True},
        "preferred_output": [asks],
        "non_preferred_output": [BAD],
    }
    _, built = read(row)
    assert built.tools == TOOLS
    assert built.answers[0][0]["tool_calls"][0]["function"]["arguments"] == {"q": "sky"}
    assert "content" not in built.answers[0][0]


def test_trl_conversations_with_other_columns():
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "id": 7, "source": "x"}
    assert read(row) == ("trl_conversations", PAIR)


def test_trl_conversations_that_repeat_the_prompt_or_give_a_bare_answer():
    assert read({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]})[1] == PAIR
    assert read({"prompt": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]})[1] == PAIR


def test_trl_text():
    row = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    assert read(row) == ("trl_text", Row(3, "2 + 2 =", (" 4", " 5")))


def test_ultrafeedback_takes_the_prompt_from_the_conversations():
    row = {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}
    assert read(row) == ("ultrafeedback", PAIR)


def test_implicit_conversations():
    assert read({"chosen": [USER, GOOD], "rejected": [USER, BAD]}) == ("implicit_conversations", PAIR)


def test_implicit_text_splits_where_the_answers_part():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert read(row) == ("implicit_text", Row(3, "The sky is bl", ("ue.", "ack.")))
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert read(row) == ("implicit_text", Row(3, "The sky is", (" blue.", " green.")))


def test_hh_text_becomes_a_conversation_and_keeps_its_text():
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why is the sky blue?\n\nAssistant:"
    name, row = read({"chosen": prompt + " Scattering.", "rejected": prompt + " Paint."})
    assert name == "hh_text"
    assert [m["role"] for m in row.prompt] == ["user", "assistant", "user"]
    assert row.answers == (
        [{"role": "assistant", "content": "Scattering."}],
        [{"role": "assistant", "content": "Paint."}],
    )
    assert row.plain == (prompt, " Scattering.", " Paint.")


def test_sharegpt():
    row = {
        "conversations": [{"from": "human", "value": USER["content"]}],
        "chosen": {"from": "gpt", "value": GOOD["content"]},
        "rejected": {"from": "gpt", "value": BAD["content"]},
    }
    assert read(row) == ("sharegpt", PAIR)
    assert read(row | {"system": "Be brief."})[1].prompt == [{"role": "system", "content": "Be brief."}, USER]


def test_supervised_formats():
    answer = Row(3, [USER], ([GOOD],))
    assert read({"messages": [USER, GOOD]}) == ("openai_chat", answer)
    assert read({"prompt": [USER], "completion": [GOOD]}) == ("prompt_completion", answer)
    assert read({"prompt": "1 +", "completion": " 1"}) == ("prompt_completion", Row(3, "1 +", (" 1",)))
    conversation = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": GOOD["content"]}]
    assert read({"conversations": conversation}) == ("sharegpt_chat", answer)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Why is "}, {"type": "text", "text": "the sky blue?"}]
    assert read({"messages": [{"role": "user", "content": parts}, GOOD]})[1].prompt == [USER]


@pytest.mark.parametrize(
    ("extra", "tie"),
    [
        ({"margin": 0}, True),
        ({"margin": 0.0}, True),
        ({"margin": 0.4}, False),
        ({"score_chosen": 7, "score_rejected": 7}, True),
        ({"chosen_score": 1.0, "rejected_score": 2.0}, False),
        ({}, False),
    ],
)
def test_ties_are_seen(extra, tie):
    assert read({"prompt": "a", "chosen": "b", "rejected": "c", **extra})[1].tie is tie


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
        ({"messages": [USER, GOOD], "label": False}, "unpaired_messages"),
        ({"prompt": "a"}, "prompt_only"),
        ({"messages": [GOOD, USER]}, "prompt_messages"),
    ],
)
def test_what_is_neither_pairs_nor_plain_answers_is_refused_for_both(row, name):
    found = recognise(row, 1)
    assert found.name == name
    assert normalise(row, 1, found).prompt
    with pytest.raises(InvalidData, match="needs pairs.*'kto'" if "label" in row else "needs pairs"):
        as_kind(found, "pairs")
    with pytest.raises(InvalidData, match="'supervised' needs"):
        as_kind(found, "answers")
    if "label" not in row:
        with pytest.raises(InvalidData, match="no labels"):
            as_kind(found, "unpaired")


def test_a_pair_may_say_how_likely_its_chosen_answer_wins():
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert read(pair)[1].label is None
    assert read(pair | {"chosen_probability": 0.75})[1].label == 0.75
    assert read(pair | {"chosen_probability": None})[1].label is None
    assert [
        row.label for row in rows_of(pair | {"chosen_probability": 0.6}, 1, as_kind(BY_NAME["trl_text"], "unpaired"))
    ] == [1, 0]
    for wrong in (1.5, -0.1, "0.5", True):
        with pytest.raises(InvalidData, match="line 3: `chosen_probability` must be a number from 0 to 1"):
            read(pair | {"chosen_probability": wrong})


def test_unpaired_rows_have_a_label():
    text, chat = {"prompt": "a", "completion": "b", "label": 1}, {"messages": [USER, GOOD], "label": False}
    assert read(text) == ("unpaired", Row(3, "a", ("b",), label=1.0))
    assert read(chat) == ("unpaired_messages", Row(3, [USER], ([GOOD],), label=0.0))


def test_a_pair_is_two_unpaired_answers():
    for row in (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    ):
        found = as_kind(recognise(row, 3), "unpaired")
        pair = normalise(row, 3, found)
        good, bad = rows_of(row, 3, found)
        assert (good.prompt, good.answers, good.label) == (pair.prompt, pair.answers[:1], 1.0)
        assert (bad.prompt, bad.answers, bad.label) == (pair.prompt, pair.answers[1:], 0.0)
    turns = "\n\nHuman: Hi\n\nAssistant:"
    row = {"chosen": f"{turns} Yes.", "rejected": f"{turns} No."}
    good, bad = rows_of(row, 3, as_kind(recognise(row, 3), "unpaired"))
    assert (good.plain, bad.plain) == ((turns, " Yes."), (turns, " No."))


def test_a_file_of_the_wrong_kind_is_refused_with_the_way_out():
    with pytest.raises(InvalidData, match=r"single answers \(OpenAI chat\).*method 'supervised'"):
        as_kind(BY_NAME["openai_chat"], "pairs")
    with pytest.raises(InvalidData, match="'supervised' needs `messages`"):
        as_kind(BY_NAME["trl_text"], "answers")
    as_kind(BY_NAME["trl_text"], "pairs")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "no `rejected`"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "no `rejected`"),
        ({"chosen": "b"}, "no `rejected`"),
        ({"input": {"messages": [USER]}, "preferred_output": [GOOD]}, "no `non_preferred_output`"),
        ({"input": {}, "preferred_completion": [], "non_preferred_completion": []}, "old name; rename"),
        ({"question": "a", "answer": "b"}, "none of the known formats"),
        ({}, "none of the known formats"),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "are equal"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "are equal"),
        ({"chosen": "same text", "rejected": "same text"}, "are equal"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "are equal"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "`chosen` is empty"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "`prompt` is empty"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "`prompt` must be a text"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "`chosen` must be a list of messages"),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": " "}]},
            "`rejected` is empty",
        ),
        ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "last message of `prompt` is the assistant's"),
        (
            {"input": {"messages": [USER, GOOD]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "last message of `input.messages` is the assistant's",
        ),
        ({"prompt": [{"role": "boss", "content": "x"}], "chosen": [GOOD], "rejected": [BAD]}, "unknown role 'boss'"),
        ({"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]}, "has no `content`"),
        ({"prompt": ["hi"], "chosen": [GOOD], "rejected": [BAD]}, "must be a message"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "chosen": [GOOD], "rejected": [BAD]},
            "is no text",
        ),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "has a message of role 'user'"),
        ({"chosen": "abc", "rejected": "xyz"}, "share no beginning"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "?"}, BAD]}, "share no first message"),
        ({"input": [USER], "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "an object with `messages`"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": "{"}, "`tools` is a text that is not JSON"),
        ({"messages": [GOOD]}, "has an answer only"),
        ({"messages": [USER, GOOD | {"weight": 0}]}, "weight 0"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "`label` must be true .desirable. or false"),
    ],
)
def test_bad_rows_are_refused_with_their_line(row, says):
    with pytest.raises(InvalidData, match=says) as caught:
        read(row, line=12)
    assert caught.value.line == 12
    assert str(caught.value).startswith("line 12: ")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "no `rejected`"),
        ({"prompt": "a"}, "no `chosen`, `rejected`"),
        ({"chosen": "a b", "rejected": "a c"}, "no `prompt`"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "another format"),
        ({"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "another format"),
        ({"messages": [USER, GOOD]}, "another format"),
        ({"preferred_completion": [GOOD], "non_preferred_completion": [BAD]}, "old name"),
    ],
)
def test_a_row_unlike_the_rows_before_it_is_refused(row, says):
    with pytest.raises(InvalidData, match=says):
        normalise(row, 2, BY_NAME["trl_text"])


def test_a_conversation_without_an_answer_is_no_row_to_learn_from():
    with pytest.raises(InvalidData, match="must be the assistant's"):
        normalise({"messages": [USER]}, 2, BY_NAME["openai_chat"])
