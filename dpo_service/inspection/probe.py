"""Texts and conversations on which tokenizers are known to differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

TEXTS = (
    "Hello world, this is a test.",
    " leading space",
    "trailing spaces   ",
    "two  spaces,   three,    four",
    "line\nline\n\nparagraph\r\nreturn\n",
    "\ttab\tand \t mixed",
    " ",
    "\n",
    "numbers 1 22 333 4444 12345678 3.14 1,000 ¾ ² ٣",
    "I'll, you're, it's, DON'T, we'd've, l'été",
    "def f(x: int) -> int:\n    if x:\n        return x ** 2  # done\n",
    '{"a": [1, 2], "b": null}</s><s>[INST]',
    "日本語のテキスト。中文文本,한국어 문장",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "e\u0301 n\u0303 A\u030a \u212b \ufb01 \u1e9b\u0323 ①",  # composed and decomposed, ligatures
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u200fabc",  # right to left
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",  # marks that are letters of their own
    "no-break\u00a0space, em\u2003space, zero\u200bwidth, soft\u00adhyphen, \u2581 underline",
    "CamelCase snake_case UPPER lower ÀÉÎ ß ẞ İ ı",
    "«quotes» “curly” ‘single’ — dash… ``ticks''",
    "\x07\x1b\ufffd\U0001f9ff\U0010fffd",
)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> & here",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
_ASK = {"role": "user", "content": "  What is 12 + 34?\n"}
_SAY = {"role": "assistant", "content": "It is 46.  "}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "é"}}}
    ],
}
_RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"rain": true}'}
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [_ASK],
    [_ASK, _SAY],
    [{"role": "system", "content": "Be brief."}, _ASK, _SAY, {"role": "user", "content": "日本 <b>x</b>"}, _SAY],
    [_ASK, {**_SAY, "reasoning_content": "Adding."}],
    [_ASK, _CALL, _RESULT, _SAY],
)


def texts_with(tokens: Iterable[str]) -> list[str]:
    """Each added token alone, within words and between spaces, and all of them in a row."""
    tokens = list(tokens)
    around = [text for token in tokens for text in (token, f"a{token}b", f"a {token} \n b")]
    return [*around, "".join(tokens), " ".join(tokens)] if tokens else []
