"""One row to token ids: prompt, and each answer as it continues the prompt.

Token ids equal those of TRL 1.16's DPOTrainer, where nothing is truncated: the prompt and each prompt-plus-answer are
tokenised whole, and the answers begin where these diverge from the prompt. Truncation differs, on purpose: TRL cuts the
end of the whole (answers may vanish); here a prompt loses its beginning and an answer its end, and neither is emptied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_service.errors import InvalidData
from dpo_service.rows.messages import Message
from dpo_service.rows.row import Row
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.data import Truncation

DropReason = Literal["answer_too_long", "empty_answer", "chosen_equals_rejected"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a row; `len(prompt) + max(len(answer)) <= max_length`, and neither is empty. A prompt whose answers
    are sampled has none."""

    prompt: list[int]
    answers: tuple[list[int], ...]
    """(chosen, rejected) or (answer,). Each ends with the end-of-sequence token, unless it was cut."""
    prompt_cut: bool = False
    answer_cut: bool = False


@dataclass(frozen=True, slots=True)
class Dropped:
    reason: DropReason


def encode(
    row: Row, tokenizer: Tokenizer, max_length: int, truncation: Truncation, answer_room: int = 0
) -> Encoded | Dropped:
    """Tokenise a row and make it fit; `answer_room` tokens stay free for an answer that is sampled.

    Raises:
        InvalidData: an answer is too long and `truncation` is "refuse", or the chat template does not take the row.
    """
    prompt, answers = tokenise(row, tokenizer)
    if not all(answers):
        return Dropped("empty_answer")
    limit = max_length - 1  # one token of the prompt always stays: the first answer token is predicted from it
    longest = max((len(answer) for answer in answers), default=0)
    if longest > limit and truncation == "refuse":
        raise _too_long(row, longest, max_length)
    if longest > limit and truncation == "drop":
        return Dropped("answer_too_long")
    answers = tuple(answer[:limit] for answer in answers)
    if len(answers) == 2 and answers[0] == answers[1]:
        return Dropped("chosen_equals_rejected")
    kept = _keep_end(prompt, max_length - max(min(longest, limit), answer_room), tokenizer.bos_token_id)
    return Encoded(kept, answers, prompt_cut=len(kept) < len(prompt), answer_cut=longest > limit)


def tokenise(row: Row, tokenizer: Tokenizer) -> tuple[list[int], tuple[list[int], ...]]:
    """Token ids of the prompt and of each answer, at full length."""
    try:
        return _tokenise(row, tokenizer)
    except InvalidData as error:
        raise error.at(row.line) from None


def _tokenise(row: Row, tokenizer: Tokenizer) -> tuple[list[int], tuple[list[int], ...]]:
    prompt, answers = row.prompt, row.answers
    if row.plain is not None and tokenizer.chat_template is None:
        prompt, answers = row.plain[0], row.plain[1:]
    if isinstance(prompt, str):
        texts = [_with_eos(prompt + str(answer), tokenizer.eos_token) for answer in answers]
        return _split(prompt, texts, tokenizer, row.line, add_special_tokens=True)
    rendered = tokenizer.render(prompt, add_generation_prompt=True, tools=row.tools, line=row.line)
    texts = [_render_whole(row, prompt, answer, rendered, tokenizer) for answer in answers]
    return _split(rendered, texts, tokenizer, row.line, add_special_tokens=False)


def _with_eos(text: str, eos: str | None) -> str:
    return text if not eos or text.endswith(eos) else text + eos


def _render_whole(row: Row, prompt: list[Message], answer: object, rendered: str, tokenizer: Tokenizer) -> str:
    """Prompt and answer, rendered. A template may end the generation prompt its own way, but not rewrite the prompt."""
    assert isinstance(answer, list)
    whole = tokenizer.render([*prompt, *answer], tools=row.tools, line=row.line)
    if whole.startswith(rendered):
        return whole
    if not whole.startswith(tokenizer.render(prompt, tools=row.tools, line=row.line)):
        raise InvalidData(
            "the model's chat template renders the prompt differently once an answer follows it, so the answer cannot "
            "be told from the prompt; change the template to render a conversation's beginning always alike",
            line=row.line,
        )
    return whole


def _split(
    prompt: str, texts: list[str], tokenizer: Tokenizer, line: int, *, add_special_tokens: bool
) -> tuple[list[int], tuple[list[int], ...]]:
    """The common beginning of all is the prompt. Tokens that merge across the border go to the answers."""
    ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    if not ids:
        raise InvalidData("the prompt has no tokens; give a prompt", line=line)
    whole = [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]
    shared = min((_common(ids, other) for other in whole), default=len(ids))
    if shared == 0:  # a prompt so short that all of it merges with an answer: the border is kept by hand
        apart = (tokenizer.encode(text.removeprefix(prompt), add_special_tokens=False) for text in texts)
        return ids, tuple(apart)
    return ids[:shared], tuple(other[shared:] for other in whole)


def _common(first: list[int], second: list[int]) -> int:
    if second[: len(first)] == first:
        return len(first)
    return next(i for i in range(len(first)) if i >= len(second) or first[i] != second[i])


def _keep_end(prompt: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` (>= 1) tokens of the prompt; a beginning-of-sequence token stays where two have room."""
    if len(prompt) <= room:
        return prompt
    if prompt[0] == bos and room > 1:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


def _too_long(row: Row, tokens: int, max_length: int) -> InvalidData:
    name = "the longer answer" if len(row.answers) == 2 else "the answer"
    return InvalidData(
        f"{name} has {tokens:,} tokens and max_length is {max_length:,} (for prompt and answer together); raise "
        f"max_length to at least {tokens + 1:,}, shorten the answer, or set truncation to 'cut' or 'drop'",
        line=row.line,
        param="max_length",
    )
