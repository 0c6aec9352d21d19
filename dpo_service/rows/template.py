"""A model's tokenizer and chat template, without transformers: `tokenizers` and a Jinja sandbox.

Its output equals that of transformers 5 (`AutoTokenizer`, `apply_chat_template`), which TRL and vLLM use; tests hold
it to that, and so does the inspection of each model (`inspection/tokenizer.py`). This is the one place of the service
that turns text into token ids.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import tokenizers

from dpo_service.errors import InvalidData, InvalidSpec
from dpo_service.rows.backend import build, read_json
from dpo_service.rows.messages import Message

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class Tokenizer:
    """What of a model directory decides how text becomes token ids."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], templates: Mapping[str, str]
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self._templates = dict(templates)
        self._compiled = {name: _environment().from_string(text) for name, text in templates.items()}
        self.bos_token = special_tokens.get("bos_token")
        self.eos_token = special_tokens.get("eos_token")
        self.bos_token_id = backend.token_to_id(self.bos_token) if self.bos_token else None
        self.eos_token_id = backend.token_to_id(self.eos_token) if self.eos_token else None
        self._beyond: frozenset[int] = frozenset()
        """Ids that the model's embedding has no row for."""
        split = ("split_special_tokens",) if backend.encode_special_tokens else ()
        self.digest = _digest(backend.to_str(), json.dumps(self.special_tokens, sort_keys=True), *split)
        """sha256 of the tokenizer: vocabulary, rules and special tokens."""

    @staticmethod
    def load(model_dir: Path) -> Tokenizer:
        """The tokenizer of a directory in the Hugging Face layout.

        Raises:
            InvalidSpec: it has no tokenizer.json, or a file that cannot be read.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise InvalidSpec(
                "the model has no tokenizer.json; load it with transformers' AutoTokenizer and save it again",
                param="model",
            )
        try:
            built = build(model_dir)
            tokenizer = Tokenizer(built.backend, built.named, _templates(model_dir, built.config))
            tokenizer._beyond = _beyond(built.backend, read_json(model_dir / "config.json"))
            return tokenizer
        except jinja2.TemplateSyntaxError as error:
            raise InvalidSpec(f"the model's chat template is not valid Jinja: {error}", param="model") from None
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InvalidSpec(f"the model's tokenizer cannot be read: {error}", param="model") from error

    @property
    def chat_template(self) -> str | None:
        """The template's text; None = the model knows no conversations."""
        return self._templates.get("default")

    @property
    def template_digest(self) -> str | None:
        return _digest(*(f"{n}\0{t}" for n, t in sorted(self._templates.items()))) if self._templates else None

    @functools.cached_property
    def tokens_per_byte(self) -> int | None:
        """At most so many tokens come of one byte of UTF-8 text; None = no such bound is known."""
        state = self.rules()["normalizer"] if self._backend.normalizer is not None else None
        kinds = [state] if state and state["type"] != "Sequence" else (state or {}).get("normalizers", [])
        # NFC makes at most three characters of one (Unicode UAX #15, table 6); compatibility forms make up to eighteen.
        bounds = {"NFC": 3, "Prepend": 1, "Replace": 1, "Lowercase": 3}
        if any(kind["type"] not in bounds for kind in kinds):
            return None
        return max([1, *(bounds[kind["type"]] for kind in kinds)])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. One that brings its own beginning-of-sequence token does not get a second one.

        Raises:
            InvalidData: the model has no row for a token.
        """
        if self.bos_token and text.startswith(self.bos_token):
            add_special_tokens = False
        ids = self.ids(text, add_special_tokens=add_special_tokens)
        if self._beyond and not self._beyond.isdisjoint(ids):
            raise self._not_embedded(next(number for number in ids if number in self._beyond))
        return ids

    def ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, whatever it begins with and whatever the model has rows for."""
        # The batch call leaves out the offsets, which costs a third of the time.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def rules(self) -> Mapping[str, Any]:
        """The tokenizer in the layout of a tokenizer.json."""
        state: Mapping[str, Any] = json.loads(self._backend.to_str())
        return state

    def _not_embedded(self, number: int) -> InvalidData:
        return InvalidData(
            f"token {self._backend.id_to_token(number)!r} has the id {number}, for which the model's embedding has no "
            f"row (nor for any from {min(self._beyond)} on); use the tokenizer that belongs to the model, or give the "
            "model rows for it (resize_token_embeddings)",
            param="model",
        )

    def decode(self, ids: Sequence[int], *, special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=not special_tokens)

    def render(
        self,
        conversation: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Message] | None = None,
        line: int | None = None,
    ) -> str:
        """The conversation as the chat template writes it, special tokens included: encode it without adding any.

        Raises:
            InvalidData: the model has no chat template, or its template refuses the conversation.
        """
        template = self._compiled.get("tool_use" if tools else "default") or self._compiled.get("default")
        if template is None:
            raise InvalidData(
                "this is a conversation, and the model has no chat template; choose a model that has one, or give "
                "prompt, chosen and rejected as plain text",
                line=line,
            )
        try:
            return template.render(
                messages=[_template_message(message) for message in conversation],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidData(f"the model's chat template refuses this conversation: {error}", line=line) from None


def _digest(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _beyond(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> frozenset[int]:
    """Some tokenizers name tokens of another model of their family (Gemma 3's of images): an id is refused where a row
    has it, not for being there."""
    rows = (config.get("text_config") or config).get("vocab_size")
    if not isinstance(rows, int) or backend.get_vocab_size() < rows:
        ids: Iterable[int] = backend.get_added_tokens_decoder()
    else:
        ids = backend.get_vocab().values()
    return frozenset(number for number in ids if isinstance(rows, int) and number >= rows)


def _templates(model_dir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files of their own take precedence over tokenizer_config.json."""
    files = {path.stem: path for path in sorted((model_dir / "additional_chat_templates").glob("*.jinja"))}
    if (model_dir / "chat_template.jinja").is_file():
        files["default"] = model_dir / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    given = config.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        return {entry["name"]: entry["template"] for entry in given}
    return dict(given or {})


def _template_message(message: Message) -> Message:
    """As transformers hands it to templates: nothing that is None, and reasoning under each of its names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING_FIELDS if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said; here its text is all that matters."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    @staticmethod
    def _said(caller: Any) -> str:
        return str(caller())


def _environment() -> jinja2.Environment:
    """Templates come with models, so they are untrusted: a sandbox that can change nothing."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    environment.globals["namespace"] = jinja2.utils.Namespace
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
