import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_service.errors import InvalidData
from dpo_service.rows.encode import Dropped, Encoded, encode, tokenise
from dpo_service.rows.formats import normalise, recognise
from dpo_service.rows.row import Row
from dpo_service.rows.template import Tokenizer
from tests.models import save_tokenizer

ROWS = [
    {"prompt": "Which colour has the red cat?", "chosen": " It is blue.", "rejected": " It may be green or so."},
    {"prompt": "the red ca", "chosen": "t is blue", "rejected": "r"},
    {"chosen": "hello world, it is blue", "rejected": "hello world, it is green"},
    {"prompt": "a test", "chosen": " ends<|eos|>", "rejected": " does not"},
]
USER = {"role": "user", "content": "hello world"}
CONVERSATIONS = [
    {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "The boat is blue."}],
        "rejected": [{"role": "assistant", "content": "The boat is green."}],
    },
    {
        "prompt": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "ok"}, USER],
        "chosen": [{"role": "assistant", "content": "It"}],
        "rejected": [{"role": "assistant", "content": "Of it"}],
    },
    {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "nothing in it matters"}],
        "rejected": [{"role": "assistant", "content": "it matters much"}],
    },
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.load(directory)


def row_of(raw) -> Row:
    return normalise(raw, 5, recognise(raw, 5))


def pair(
    prompt="hello world", chosen=" The boat is blue, x y z.", rejected=" It may be green or so, 9 8 7 6 5."
) -> Row:
    return Row(5, prompt, (chosen, rejected))


@pytest.mark.parametrize("raw", ROWS + CONVERSATIONS)
def test_equals_trl(directory, tokenizer, raw):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    prompt, (chosen, rejected) = tokenise(row_of(raw), tokenizer)
    assert (prompt, chosen, rejected) == trl_tokens(raw, theirs)


def trl_tokens(raw, theirs):
    """What TRL 1.16's DPOTrainer._prepare_dataset does, from the functions that it calls."""
    from trl.data_utils import _tokenize, common_prefix_length, extract_prompt

    row = raw if "prompt" in raw else extract_prompt(raw)
    plain = isinstance(row["prompt"], str)
    if plain:
        eos = theirs.eos_token
        row = row | {k: row[k] if row[k].endswith(eos) else row[k] + eos for k in ("chosen", "rejected")}
    prompt = _tokenize(theirs, row["prompt"], **({} if plain else {"add_generation_prompt": True}))["input_ids"]
    whole = [_tokenize(theirs, row["prompt"] + row[k])["input_ids"] for k in ("chosen", "rejected")]
    length = min(common_prefix_length(prompt, ids) for ids in whole)
    return prompt[:length], whole[0][length:], whole[1][length:]


def test_each_whole_answer_ends_with_one_end_of_sequence(tokenizer):
    for raw in ROWS + CONVERSATIONS:
        _, answers = tokenise(row_of(raw), tokenizer)
        for answer in answers:
            assert answer[-1] == tokenizer.eos_token_id
            assert answer.count(tokenizer.eos_token_id) == 1


def test_conversations_get_one_beginning_of_sequence(tokenizer):
    prompt, _ = tokenise(row_of(CONVERSATIONS[1]), tokenizer)
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_text_formats_fall_back_to_text_without_a_template(tmp_path):
    save_tokenizer(tmp_path, chat_template=None)
    bare = Tokenizer.load(tmp_path)
    text = "\n\nHuman: hello\n\nAssistant:"
    prompt, answers = tokenise(row_of({"chosen": text + " a", "rejected": text + " b"}), bare)
    assert bare.decode(prompt) == text
    assert bare.decode(answers[0]) == " a<|eos|>"


def test_a_generation_prompt_of_its_own_is_left_out(tmp_path):
    save_tokenizer(
        tmp_path,
        chat_template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>(thinks){% endif %}",
    )
    tokenizer = Tokenizer.load(tmp_path)
    prompt, answers = tokenise(row_of(CONVERSATIONS[0]), tokenizer)
    assert tokenizer.decode(prompt + answers[0]) == "<|user|>hello world<|eos|><|assistant|>The boat is blue.<|eos|>"


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    save_tokenizer(tmp_path, chat_template="{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InvalidData, match="line 5: the model's chat template renders the prompt differently"):
        tokenise(row_of(CONVERSATIONS[0]), Tokenizer.load(tmp_path))


def test_a_prompt_that_melts_into_its_answers_is_kept_apart(tokenizer):
    row = Row(5, "he", ("llo", "llo world"))
    assert len(tokenizer.encode("hello")) == 1
    prompt, answers = tokenise(row, tokenizer)
    assert tokenizer.decode(prompt) == "he"
    assert [tokenizer.decode(answer) for answer in answers] == ["llo<|eos|>", "llo world<|eos|>"]


def test_a_long_answer_is_refused_with_the_way_out(tokenizer):
    tokens = max(len(answer) for answer in tokenise(pair(), tokenizer)[1])
    with pytest.raises(
        InvalidData, match=f"line 5: the longer answer has {tokens} tokens and max_length is 10"
    ) as caught:
        encode(pair(), tokenizer, 10, "refuse")
    assert caught.value.param == "max_length"
    assert f"at least {tokens + 1}" in caught.value.message
    assert isinstance(encode(pair(), tokenizer, tokens + 1, "refuse"), Encoded)


def test_a_long_answer_is_dropped_or_cut(tokenizer):
    prompt, answers = tokenise(pair(), tokenizer)
    assert encode(pair(), tokenizer, 10, "drop") == Dropped("answer_too_long")
    cut = encode(pair(), tokenizer, 10, "cut")
    assert cut == Encoded(prompt[-1:], tuple(a[:9] for a in answers), prompt_cut=True, answer_cut=True)


def test_a_long_prompt_loses_its_beginning_but_not_its_first_token_of_all(tokenizer):
    prompt, answers = tokenise(row_of(CONVERSATIONS[1]), tokenizer)
    longest = max(map(len, answers))
    made = encode(row_of(CONVERSATIONS[1]), tokenizer, longest + 5, "refuse")
    assert made.prompt == [tokenizer.bos_token_id, *prompt[-4:]]
    assert made.prompt_cut
    assert not made.answer_cut
    assert made.answers == answers


def test_answers_that_are_equal_or_empty_as_tokens_are_dropped(tokenizer, tmp_path):
    same_start = pair(chosen=" The boat is blue and so on and so on", rejected=" The boat is blue and never")
    assert encode(same_start, tokenizer, 5, "cut") == Dropped("chosen_equals_rejected")
    save_tokenizer(tmp_path, chat_template="<|user|>{{ messages[0].content }}")
    silent = Tokenizer.load(tmp_path)
    assert encode(row_of(CONVERSATIONS[0]), silent, 100, "refuse") == Dropped("empty_answer")


@given(
    prompt=st.text(min_size=1, max_size=40).filter(str.strip),
    answers=st.tuples(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40)),
    max_length=st.integers(8, 60),
    single=st.booleans(),
)
def test_truncation_keeps_its_promises(tokenizer, prompt, answers, max_length, single):
    # A space keeps the border between prompt and answer from melting.
    row = Row(1, prompt + " !", answers[:1] if single else answers)
    whole_prompt, whole_answers = tokenise(row, tokenizer)
    made = encode(row, tokenizer, max_length, "cut")
    if isinstance(made, Dropped):
        assert made.reason == "chosen_equals_rejected"
        return
    assert made.prompt
    assert all(made.answers)
    assert len(made.prompt) + max(map(len, made.answers)) <= max_length
    assert made.prompt_cut == (len(made.prompt) < len(whole_prompt))
    assert made.answer_cut == (made.answers != whole_answers)
    for answer, whole in zip(made.answers, whole_answers, strict=True):
        assert answer == whole[: len(answer)]
        assert (answer[-1] == tokenizer.eos_token_id) == (len(answer) == len(whole))
