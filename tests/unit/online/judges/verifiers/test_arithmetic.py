from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_service.online.judges.verifiers.arithmetic import evaluate, final_number


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("-2^2", -4),
        ("2**-1", Fraction(1, 2)),
        ("2^3^2", 512),
        ("1,234.5", Fraction(2469, 2)),
        ("50%", Fraction(1, 2)),
        ("3/4 − 1/4", Fraction(1, 2)),
        (".1 + .2", Fraction(3, 10)),
        ("6 ÷ 4 × 2", 3),
        ("--3", 3),
    ],
)
def test_expressions_are_worked_out_exactly(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "1 +", "(1", "1)", "1 2", "x", "__import__('os')", "1/0", "0^-1", "2^0.5", "9^9^9^9", "9" * 201, "1//2", "*1"],
)
def test_what_is_no_expression_or_too_large_has_no_value(expression):
    assert evaluate(expression) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("First 12, then 7. So it is 1,250.", 1250),
        ("She pays $3.50 in the end", Fraction(7, 2)),
        ("x = -3", -3),
        ("from 5-3 we get 2", 2),
        (r"The 1st way gives \boxed{\frac{3}{4}}, see page 9", Fraction(3, 4)),
        ("12 apples #### 7", 7),
        ("about 3/4 of them", Fraction(3, 4)),
        ("half, or 50%.", Fraction(1, 2)),
        (r"50\% of them", Fraction(1, 2)),
        ("What is 2+2", 2),
        ("version v2", None),
        ("none at all", None),
        ("divided: 1/0", None),
    ],
)
def test_the_last_number_of_an_answer(text, value):
    assert final_number(text) == value


def written(operator, one, other):
    """The expression and its value, from those of its two parts."""
    value = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}[operator](one[1], other[1])
    return f"({one[0]}) {operator} ({other[0]})", value


numbers = st.integers(0, 10**6).map(lambda n: (f"{n:,}", Fraction(n)))
decimals = st.decimals(0, 100, places=2).map(lambda n: (str(n), Fraction(n)))
expressions = st.recursive(
    numbers | decimals, lambda part: st.builds(written, st.sampled_from("+-*"), part, part), max_leaves=8
)


@settings(deadline=None)
@given(expressions)
def test_any_expression_has_its_value_or_is_too_long(expression):
    text, value = expression
    assert evaluate(text) == (value if len(text) <= 200 else None)


@settings(deadline=None)
@given(st.text("0123456789+-*/^()%., #$\\{}boxedfrac", max_size=300))
def test_no_text_does_harm(text):
    evaluate(text)
    final_number(text)
