import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from dpo_service.errors import InvalidData, InvalidSpec
from dpo_service.rows.encode import tokenise
from dpo_service.rows.row import Row
from dpo_service.rows.template import Tokenizer
from tests.models import CHAT_TEMPLATE, save_tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "hello world"}],
    [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "Größe? 🙂"}],
    [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": " a cat\n", "tool_calls": None},
        {"role": "user", "content": "  again  "},
    ],
]
TEXTS = ["hello world", "", " leading", "<|bos|>hello<|eos|>", "日本語 🙂 naïve\n\n\ttabs", "<|user|>x<|assistant|>"]
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "a < b", "parameters": {}}}]
RICH_TEMPLATE = """{%- set ns = namespace(seen=0) -%}
{{- bos_token }}
{%- if tools %}
<|system|>{{ tools | tojson }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' ~ message.role) }}
    {%- endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {%- if ns.seen > 50 %}{% break %}{% endif %}
    {{- '<|' + message.role + '|>' + (message.reasoning_content or '') }}
    {%- generation %}{{ message['content'] | trim }}{% endgeneration %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def model(tmp_path, template: str | None = CHAT_TEMPLATE, *, bos_in_processor=False, files=None):
    save_tokenizer(tmp_path, chat_template=template)
    if bos_in_processor:
        backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
        )
        backend.save(str(tmp_path / "tokenizer.json"))
    for name, text in (files or {}).items():
        (tmp_path / name).write_text(text)
    return tmp_path


def transformers_tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("bos_in_processor", [False, True])
@pytest.mark.parametrize("files", [{}, {"chat_template.jinja": RICH_TEMPLATE}])
def test_equals_transformers(tmp_path, bos_in_processor, files):
    directory = model(tmp_path, bos_in_processor=bos_in_processor, files=files)
    ours, theirs = Tokenizer.load(directory), transformers_tokenizer(directory)
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        if not text.startswith("<|bos|>"):
            assert ours.encode(text) == theirs(text).input_ids
    for conversation in CONVERSATIONS:
        for generation in (False, True):
            for tools in (None, TOOLS):
                text = ours.render(conversation, add_generation_prompt=generation, tools=tools)
                given = {"add_generation_prompt": generation, "tools": tools}
                assert text == theirs.apply_chat_template(conversation, tokenize=False, **given)
                ids = theirs.apply_chat_template(conversation, **given)["input_ids"]
                assert ours.encode(text, add_special_tokens=False) == ids


def test_equals_transformers_for_reasoning_and_declared_tokens(tmp_path):
    directory = model(tmp_path, RICH_TEMPLATE)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["image_token"] = "<|image|>"
    config["unk_token"] = {
        "__type": "AddedToken",
        "content": "<|unk|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(directory), transformers_tokenizer(directory)
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "thinking": "hm", "content": "hello <|image|>"}]
    assert ours.render(said) == theirs.apply_chat_template(said, tokenize=False)
    assert "hm" in ours.render(said)
    assert ours.encode("a<|unk|>b") == theirs("a<|unk|>b").input_ids


def test_a_text_with_its_own_beginning_gets_no_second_one(tmp_path):
    tokenizer = Tokenizer.load(model(tmp_path, bos_in_processor=True))
    assert tokenizer.encode("hello").count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode("<|bos|>hello").count(tokenizer.bos_token_id) == 1


def test_templates_by_name(tmp_path):
    directory = model(tmp_path, None)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.render(CONVERSATIONS[0]) == "plain"
    assert tokenizer.render(CONVERSATIONS[0], tools=TOOLS) == "tools"


def test_digests_name_what_they_depend_on(tmp_path):
    first = Tokenizer.load(model(tmp_path / "a"))
    same = Tokenizer.load(model(tmp_path / "b"))
    other_template = Tokenizer.load(model(tmp_path / "c", "{{ messages[0].content }}"))
    save_tokenizer(tmp_path / "d", vocabulary=300)
    other_words = Tokenizer.load(tmp_path / "d")
    assert (first.digest, first.template_digest) == (same.digest, same.template_digest)
    assert first.digest == other_template.digest
    assert first.template_digest != other_template.template_digest
    assert first.digest != other_words.digest


def test_conversations_need_a_template(tmp_path):
    tokenizer = Tokenizer.load(model(tmp_path, None))
    assert tokenizer.chat_template is None
    assert tokenizer.template_digest is None
    with pytest.raises(InvalidData, match=r"line 4: .* no chat template; choose"):
        tokenizer.render(CONVERSATIONS[0], line=4)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.more }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
    ],
)
def test_a_template_that_refuses_or_oversteps_is_the_rows_error(tmp_path, template):
    tokenizer = Tokenizer.load(model(tmp_path, template))
    with pytest.raises(InvalidData, match="line 1: the model's chat template refuses"):
        tokenizer.render(CONVERSATIONS[0], line=1)


def test_directories_without_a_usable_tokenizer_are_refused(tmp_path):
    with pytest.raises(InvalidSpec, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(InvalidSpec, match="not valid Jinja"):
        Tokenizer.load(model(tmp_path / "a", "{% for %}"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidSpec, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_tokens_per_byte_follows_the_normalizer(tmp_path):
    from tokenizers import normalizers

    directory = model(tmp_path)
    assert Tokenizer.load(directory).tokens_per_byte == 1
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    for normalizer, bound in [
        (normalizers.NFC(), 3),
        (normalizers.NFKC(), None),
        (normalizers.Sequence([normalizers.Prepend("x"), normalizers.NFC()]), 3),
    ]:
        backend.normalizer = normalizer
        backend.save(str(directory / "tokenizer.json"))
        assert Tokenizer.load(directory).tokens_per_byte == bound


def with_embedding(directory, rows):
    (directory / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return Tokenizer.load(directory)


def test_an_id_without_a_row_in_the_embedding_is_refused_where_a_row_has_it(tmp_path):
    save_tokenizer(tmp_path)
    ids = with_embedding(tmp_path, 400).encode("hello world")
    smaller = with_embedding(tmp_path, max(ids))
    with pytest.raises(InvalidData, match=rf"the id {max(ids)}, for which the model's embedding has no row") as caught:
        tokenise(Row(line=3, prompt="hello", answers=(" world",)), smaller)
    assert (caught.value.line, caught.value.param) == (3, "model")
    assert smaller.encode("h") == with_embedding(tmp_path, 400).encode("h"), "others are not concerned"
