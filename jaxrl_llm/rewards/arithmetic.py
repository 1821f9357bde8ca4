"""Arithmetic that is checked by calculation, without `eval`: a small parser over fractions.

It reads numbers ("12", "1,234.5", ".5"), + − * / ^ and their other spellings (× · ÷ **, x between numbers), signs and
parentheses, with the usual precedence: ^ binds strongest and from the right, a sign before it weaker (-2^2 is -4). All is
exact: 0.1 + 0.2 is 0.3, and 1/3 is a third. Names, functions, units and implied products (2(3)) are not arithmetic.
Text from a model can be anything, so there are limits, and what exceeds them is no expression: none raises.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jaxrl_llm.rewards.answers import boxed_answer, tagged_answer
from jaxrl_llm.rewards.loading import makes_reward
from jaxrl_llm.rewards.text import completion_text

MAX_CHARACTERS = 500
"""Of an expression."""
MAX_DEPTH = 20
"""Of parentheses, signs and powers within one another."""
MAX_EXPONENT = 100
"""Of a power, a whole number, in magnitude."""
MAX_BITS = 4096
"""Of a numerator or denominator: about 1,200 digits."""

TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(?P<sign>\*\*|\S))"
)
SPELLINGS = {"×": "*", "·": "*", "⋅": "*", "x": "*", "÷": "/", "**": "^", "−": "-", "–": "-"}
WRAPPERS = str.maketrans({"$": " ", "`": " ", "[": "(", "]": ")"})
CANDIDATE = re.compile(r"(?:[0-9 \t+\-*/^()×·⋅÷−–=]|[.,](?=[0-9])|(?<=[0-9) ])x(?=[0-9( ]))+")
"""A run of what equations are written with; a comma, full stop or new line ends it."""


class Evaluated(NamedTuple):
    """An expression that could be calculated."""

    value: Fraction
    numbers: tuple[Fraction, ...]
    """Those that it is written with, in their order, without signs."""


class _NotArithmeticError(Exception):
    """Leaves the parser; never leaves this module."""


def evaluate_arithmetic(text: str) -> Evaluated | None:
    """Calculates an expression exactly.

    Args:
        text: Such as "3 + 4 * (5 - 1)".

    Returns:
        Its value and its numbers; None if it is no expression, divides by zero, or exceeds a limit of this module. No text
        raises.

    Example:
        >>> evaluate_arithmetic("(3 + 4) / 2").value
        Fraction(7, 2)
        >>> evaluate_arithmetic("__import__('os')") is None
        True
    """
    try:
        return _Parser(text).everything()
    except (_NotArithmeticError, ZeroDivisionError, RecursionError):
        return None


class _Parser:
    """Recursive descent; each level calculates what it reads."""

    def __init__(self, text: str):
        if len(text) > MAX_CHARACTERS:
            raise _NotArithmeticError
        self.tokens = list(_tokens(text))
        self.position = 0
        self.depth = 0
        self.numbers: list[Fraction] = []

    def everything(self) -> Evaluated:
        value = self.sum()
        if self.position < len(self.tokens):
            raise _NotArithmeticError
        return Evaluated(value, tuple(self.numbers))

    def sum(self) -> Fraction:
        value = self.product()
        while sign := self.take("+-"):
            other = self.product()
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while sign := self.take("*/"):
            other = self.signed()
            value = _bounded(value * other if sign == "*" else value / other)
        return value

    def signed(self) -> Fraction:
        sign = self.take("+-")
        if not sign:
            return self.power()
        value = self.deeper(self.signed)
        return -value if sign == "-" else value

    def power(self) -> Fraction:
        base = self.atom()
        if not self.take("^"):
            return base
        exponent = self.deeper(self.signed)
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
            raise _NotArithmeticError
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if size * abs(exponent) > MAX_BITS:
            raise _NotArithmeticError
        return base ** int(exponent)

    def atom(self) -> Fraction:
        if self.take("("):
            value = self.deeper(self.sum)
            if not self.take(")"):
                raise _NotArithmeticError
            return value
        token = self.tokens[self.position] if self.position < len(self.tokens) else ""
        if not isinstance(token, Fraction):
            raise _NotArithmeticError
        self.position += 1
        self.numbers.append(token)
        return token

    def deeper(self, read: Callable[[], Fraction]) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NotArithmeticError
        value = read()
        self.depth -= 1
        return value

    def take(self, signs: str) -> str:
        token = self.tokens[self.position] if self.position < len(self.tokens) else ""
        if not isinstance(token, str) or not token or token not in signs:
            return ""
        self.position += 1
        return token


def _tokens(text: str) -> Iterator[Fraction | str]:
    for match in TOKEN.finditer(text.translate(WRAPPERS).rstrip()):
        number = match["number"]
        if number is not None:
            yield _bounded(Fraction(number.replace(",", "")))
        else:
            yield SPELLINGS.get(match["sign"], match["sign"])


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotArithmeticError
    return value


def correct_equations(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Rewards the share of the equations in a completion that are right; None where there is none.

    Every run of numbers, operators and `=` on a line is an equation, such as "3 + 4*2 = 11" in a sentence, or
    "3+4 = 7 = 14/2", which is right if all its sides are equal: exactly, so that 1/3 = 0.33 is wrong. A run with a side
    that is no expression, or in which nothing is calculated ("7 = 7"), is none. What is verified are the calculations, not
    whether they answer the question.

    Args:
        completions: Strings, or lists of messages, of which the last counts.
        **columns: Not used.

    Example:
        >>> correct_equations(["3 + 4 = 7, and 7 * 2 = 15.", "seven"])
        [0.5, None]
    """

    def score(text: str) -> float | None:
        verdicts = [_verdict(run) for run in CANDIDATE.findall(text) if "=" in run]
        verdicts = [verdict for verdict in verdicts if verdict is not None]
        return sum(verdicts) / len(verdicts) if verdicts else None

    return [score(completion_text(completion)) for completion in completions]


def _verdict(equation: str) -> bool | None:
    sides = [evaluate_arithmetic(side) for side in equation.split("=")]
    known = [side for side in sides if side is not None]
    if len(known) < len(sides) or all(len(side.numbers) < 2 for side in known):
        return None
    return len({side.value for side in known}) == 1


@makes_reward
def uses_numbers(*, use_all: bool = True, tag: str = "answer") -> Callable[..., list[float | None]]:
    """Makes a reward of 1 for an expression of given numbers that has the value of a target, else 0 (Countdown, 24).

    The expression stands in the last <tag>, else in the last boxed answer, else it is the whole completion; what follows
    an `=` is left out. Each number may be used as often as it is given.

    Args:
        use_all: Whether all numbers must be used.
        tag: Name of the tag.

    Returns:
        `reward(completions, numbers, target)`, with columns of lists of numbers and of numbers; None gives None.

    Example:
        >>> uses_numbers()(["(8 - 2) * 4", "4 * 6"], numbers=[[2, 4, 8]] * 2, target=[24, 24])
        [1.0, 0.0]
    """

    def uses_numbers(
        completions: Sequence[Any], numbers: Sequence[Any], target: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return [
            None
            if given is None or value is None
            else solves(_expression(completion_text(text), tag), given, value, use_all)
            for text, given, value in zip(completions, numbers, target, strict=True)
        ]

    return uses_numbers


def solves(expression: str, numbers: Sequence[Any], target: Any, use_all: bool = True) -> float:
    """Tells whether an expression uses given numbers, each at most as often as it is given, and has a value: 1 or 0.

    Args:
        expression: Of the numbers; anything else gives 0.
        numbers: What is given, without signs.
        target: The value.
        use_all: Whether all numbers must be used.
    """
    found = evaluate_arithmetic(expression)
    if found is None or found.value != Fraction(str(target)):
        return 0.0
    given, used = Counter(Fraction(str(number)) for number in numbers), Counter(found.numbers)
    return float(used == given if use_all else used <= given)


def _expression(text: str, tag: str) -> str:
    marked = tagged_answer(text, tag)
    marked = boxed_answer(text) if marked is None else marked
    return (text if marked is None else marked).partition("=")[0].strip()
