"""Ready rewards on text: does the completion give the right answer?"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

NUMBER = re.compile(r"(?:(?<![0-9])-)?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
"""A number as people write it: "-4", "1,234.5". The minus of "7-4" is a difference, not a sign."""


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Rewards 1 for a completion that is the answer, white space around it apart, else 0.

    Args:
        prompts: Not used.
        completions: Strings, or lists of messages, of which the last counts.
        answer: The column with the right answers; numbers are compared as they print. None gives None: not applicable.
        **columns: Not used.

    Example:
        >>> exact_match(["3+4="] * 3, [" 7", "7.", "Hi"], answer=["7", "7", None])
        [1.0, 0.0, None]
    """
    return [
        None if right is None else float(completion_text(got).strip() == str(right).strip())
        for got, right in zip(completions, answer, strict=True)
    ]


def numeric_match(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Rewards 1 where the last number of the completion equals the last number of the answer, else 0.

    Reasoning before the number does not matter, nor does the way it is written ("1,234.50" equals 1234.5).

    Args:
        prompts: Not used.
        completions: Strings, or lists of messages, of which the last counts.
        answer: The column with the right answers, numbers or texts (GSM8K: "… #### 28080"). None gives None.
        **columns: Not used.

    Raises:
        ValueError: If an answer holds no number.

    Example:
        >>> numeric_match([""] * 2, ["3 and 4 make 7.0", "I think 8"], answer=[7, "3 + 4 #### 7"])
        [1.0, 0.0]
    """
    targets = [None if right is None else _target(right) for right in answer]
    return [
        None if target is None else float(_last_number(completion_text(got)) == target)
        for got, target in zip(completions, targets, strict=True)
    ]


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of the last message."""
    if isinstance(completion, str):
        return completion
    return (completion[-1]["content"] or "") if completion else ""


def _target(answer: Any) -> Decimal:
    number = _last_number(str(answer))
    if number is None:
        raise ValueError(f"numeric_match needs a number in the column `answer`, got {str(answer)[:60]!r}.")
    return number


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
