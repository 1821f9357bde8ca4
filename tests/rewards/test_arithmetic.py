"""The arithmetic verifier: right by exact calculation, equal to Python's own, and deaf to garbage."""

import re
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxrl_llm.rewards import correct_equations, evaluate_arithmetic, uses_numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("3 + 4 * 2", 11),
        ("(3 + 4) * 2", 14),
        ("8 - 3 - 2", 3),
        ("8 / 4 / 2", 1),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("2**-1", Fraction(1, 2)),
        ("- -3", 3),
        ("2 * -3", -6),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1,234.5 × 2 ÷ .5", 4938),
        ("3 x 4 − 2·5", 2),
        ("[3 + $4$]", 7),
        ("1e3", None),
        ("2(3)", None),
        ("1 2", None),
        ("12,34", None),
        ("(1", None),
        ("1)", None),
        ("+", None),
        ("", None),
        ("1/0", None),
        ("0^-1", None),
        ("2^0.5", None),
        ("2^101", None),
        ("10^100^100", None),
        ("9^9^9^9", None),
        ("1" * 501, None),
        ("1" * 499, int("1" * 499)),
        ("(" * 20 + "1" + ")" * 20, 1),
        ("(" * 21 + "1" + ")" * 21, None),
        ("-" * 400 + "1", None),
        ("99^99 * 99^99 * 99^99 * 99^99 * 99^99 * 99^99 * 99^99", None),
        ("__import__('os').system('true')", None),
        ("１＋１", None),
    ],
)
def test_values_are_exact_and_what_is_no_expression_has_none(text, value):
    found = evaluate_arithmetic(text)
    assert (None if found is None else found.value) == value


def test_the_numbers_are_those_that_are_written():
    assert evaluate_arithmetic("-3 + 4.5 * (3 - 1)").numbers == (3, Fraction(9, 2), 3, 1)


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(" ".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=8,
)


@hypothesis.given(EXPRESSIONS)
def test_it_calculates_as_python_does(text):
    try:
        expected = eval(re.sub(r"[0-9]+", r"Fraction(\g<0>)", text))
    except ZeroDivisionError:
        expected = None
    found = evaluate_arithmetic(text)
    assert (None if found is None else found.value) == expected


@hypothesis.given(st.one_of(st.text(), st.text("0123456789+-*/^()=., x", max_size=60)))
def test_garbage_never_raises(text):
    evaluate_arithmetic(text)
    (share,) = correct_equations([text])
    assert share is None or 0 <= share <= 1
    assert uses_numbers()([text], numbers=[[1, 2]], target=[3])[0] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("3+4*2 = 11", 1.0),
        ("3+4*2 = 14", 0.0),
        ("First, 3 + 4 = 7. Then 7 × 2 = 15, so it is 15.", 0.5),
        ("1. 3+4=7\n2. 7*2=14", 1.0),
        ("3+4 = 7 = 14/2", 1.0),
        ("3+4 = 7 = 8", 0.0),
        ("1/3 = 0.33", 0.0),
        ("1,000 + 1 = 1,001", 1.0),
        ("7 = 7", None),
        ("x = 3 + 4", None),
        ("3 + 4 =", None),
        ("the answer is 7", None),
        ("box 3+4=7", 1.0),
        ("3 x 4=12", 1.0),
        ("", None),
    ],
)
def test_equations_are_found_in_the_text_and_checked(text, reward):
    assert correct_equations([text]) == [reward]


@pytest.mark.parametrize(
    ("text", "all_numbers", "some_numbers"),
    [
        ("(8 - 2) * 4", 1, 1),
        ("(8 - 2) * 4 = 24", 1, 1),
        ("<think>8*4</think><answer>4 * (8 - 2)</answer>", 1, 1),
        (r"so \boxed{4 \cdot 6}", 0, 0),
        (r"so \boxed{(8-2)*4}", 1, 1),
        ("8 * (4 - 1)", 0, 0),
        ("4 * 8 - 8", 0, 0),
        ("24", 0, 0),
        ("8 + 2 * 4", 0, 0),
        ("I do not know", 0, 0),
    ],
)
def test_an_expression_makes_the_target_from_the_numbers(text, all_numbers, some_numbers):
    columns = {"numbers": [[2, 4, 8]], "target": [24]}
    assert uses_numbers()([text], **columns) == [all_numbers]
    assert uses_numbers(use_all=False)([text], **columns) == [some_numbers]


def test_numbers_may_be_left_where_not_all_must_be_used():
    columns = {"numbers": [[2, 4, 8], None], "target": [12, 12]}
    assert uses_numbers()(["4 + 8"] * 2, **columns) == [0.0, None]
    assert uses_numbers(use_all=False)(["4 + 8"] * 2, **columns) == [1.0, None]
