"""The last number of an answer against an expected value, exactly: a parser of our own, fractions, nothing executed."""

from __future__ import annotations

import re
from fractions import Fraction

from dpo_service.online.judges.port import Answer, JudgeRequest
from dpo_service.online.judges.verifiers.port import Verifier, expected_of
from dpo_service.specs.verifiers import Arithmetic

LONGEST = 200
"""Characters of an expression; also how deep it can nest."""
LARGEST = 4096
"""Bits of a numerator or denominator: powers of powers outgrow any memory."""

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_LAST = re.compile(rf"(?<![\w.])[-+−]?(?:{_NUMBER})(?:\s*/\s*(?:{_NUMBER}))?\s*%?")
_BOXED = re.compile(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_TOKEN = re.compile(rf"\s*(?:(?P<number>{_NUMBER})|(?P<sign>\*\*|[-+*/^()%]))")


def arithmetic(spec: Arithmetic) -> Verifier:
    allowed = Fraction(spec.tolerance)

    def check(answer: Answer, request: JudgeRequest) -> float | None:
        expected = expected_of(request, spec.expected)
        if expected is None:
            return None
        worked_out = evaluate(expected)
        wanted = worked_out if worked_out is not None else final_number(expected)
        if wanted is None:
            return None
        found = final_number(answer.text)
        return 1.0 if found is not None and abs(found - wanted) <= allowed else 0.0

    return check


def final_number(text: str) -> Fraction | None:
    """The number an answer ends with: in what it boxes (`\\boxed{}`) or says after `####`, else in all of it.

    `1,234.5`, `3/4`, `-2`, `50%` and `\\frac{3}{4}` are numbers. An expression is not worked out: an answer that
    repeats the question has not answered it. None = there is no number.
    """
    boxed = _BOXED.findall(text)
    marked = boxed[-1] if boxed else text.rsplit("####", 1)[-1]
    numbers = _LAST.findall(_FRACTION.sub(r"\1/\2", marked).replace("\\%", "%"))
    return evaluate(numbers[-1]) if numbers else None


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression in + - * / ^ ( ) and %; None where it is none, or its value grows too large."""
    if len(expression) > LONGEST:
        return None
    try:
        return _Parser(expression).value()
    except (_NotArithmetic, ZeroDivisionError):
        return None


class _NotArithmetic(Exception):
    """The text is no expression, or one whose value is too large."""


class _Parser:
    """Recursive descent; a method a level of precedence.

    sum -> product {+|- product}    product -> signed {*|/ signed}    signed -> [+|-] signed | power
    power -> percent [^ signed]     percent -> atom [%]               atom -> number | ( sum )
    """

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text.replace("−", "-").replace("×", "*").replace("÷", "/"))
        self._at = 0

    def value(self) -> Fraction:
        result = self._sum()
        if self._at < len(self._tokens):
            raise _NotArithmetic
        return result

    def _take(self, *wanted: str) -> str | None:
        token = self._tokens[self._at] if self._at < len(self._tokens) else None
        if token is None or token not in wanted:
            return None
        self._at += 1
        return token

    def _sum(self) -> Fraction:
        result = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            result = _bounded(result + other if sign == "+" else result - other)
        return result

    def _product(self) -> Fraction:
        result = self._signed()
        while sign := self._take("*", "/"):
            other = self._signed()
            result = _bounded(result * other if sign == "*" else result / other)
        return result

    def _signed(self) -> Fraction:
        sign = self._take("+", "-")
        if sign is None:
            return self._power()
        return -self._signed() if sign == "-" else self._signed()

    def _power(self) -> Fraction:
        base = self._percent()
        if self._take("^", "**") is None:
            return base
        exponent = self._signed()
        if exponent.denominator != 1 or abs(exponent.numerator) * _bits(base) > LARGEST:
            raise _NotArithmetic
        return Fraction(base**exponent.numerator)

    def _percent(self) -> Fraction:
        value = self._atom()
        return value / 100 if self._take("%") else value

    def _atom(self) -> Fraction:
        if self._take("("):
            value = self._sum()
            if self._take(")") is None:
                raise _NotArithmetic
            return value
        if self._at == len(self._tokens) or not self._tokens[self._at][-1].isdigit():
            raise _NotArithmetic
        self._at += 1
        return Fraction(self._tokens[self._at - 1].replace(",", ""))


def _tokens(text: str) -> list[str]:
    tokens, at, text = [], 0, text.strip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise _NotArithmetic
        tokens.append(found["number"] or found["sign"])
        at = found.end()
    return tokens


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > LARGEST:
        raise _NotArithmetic
    return value
