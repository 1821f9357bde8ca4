r"""Rewards of an answer that stands in a longer completion: after `####`, in \boxed{}, or between tags."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any, Literal, get_args

from jaxrl_llm.rewards.loading import makes_reward
from jaxrl_llm.rewards.text import NUMBER, completion_text

Mark = Literal["hash", "boxed", "tag"]


def hash_answer(text: str) -> str | None:
    r"""Takes what follows the last `####` on its line, as GSM8K writes answers; None if there is none.

    Example:
        >>> hash_answer("5 + 7 = 12\n#### 12")
        '12'
    """
    _, mark, after = text.rpartition("####")
    return after.strip().split("\n")[0].strip() if mark else None


def boxed_answer(text: str) -> str | None:
    r"""Takes what stands in the last \boxed{…} whose braces are balanced; None if there is none.

    Braces may be nested; those with a backslash before them are characters.

    Example:
        >>> boxed_answer(r"so it is \boxed{\frac{1}{3}}.")
        '\\frac{1}{3}'
    """
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[match.end() : match.end() + brace.start()].strip()
    return None


def tagged_answer(text: str, tag: str = "answer") -> str | None:
    """Takes what stands between the last <tag> that is closed and its </tag>; None if there is none.

    Args:
        text: The completion.
        tag: Name of the tag.

    Example:
        >>> tagged_answer("<think>5 + 7</think> <answer> 12 </answer>")
        '12'
    """
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else None


def same_answer(got: str, right: str) -> bool:
    """Compares two answers: as numbers where both are numbers ("28,080" and "28080.0"), else as texts.

    White space counts as one space, or as none at the ends. A full stop behind a number does not count.
    """
    numbers = [NUMBER.fullmatch(text.strip().rstrip(".")) for text in (got, right)]
    if all(numbers):
        left, other = (Decimal(number[0].replace(",", "")) for number in numbers if number)
        return left == other
    return got.split() == right.split()


@makes_reward
def answer_match(*, mark: Mark = "hash", tag: str = "answer") -> Callable[..., list[float | None]]:
    r"""Makes a reward of 1 where the marked answer of the completion is the right one, else 0.

    Args:
        mark: "hash": after the last `####`; "boxed": in the last \boxed{}; "tag": in the last <tag>…</tag>.
        tag: Name of the tag.

    Returns:
        `reward(completions, answer)`. The column `answer` holds answers, or texts that mark them in the same way; None
        gives None. A completion without a mark gets 0.

    Raises:
        ValueError: If `mark` is another.

    Example:
        >>> answer_match(mark="boxed")([r"It is \boxed{7.0}", "It is 7"], answer=["7", "7"])
        [1.0, 0.0]
    """
    if mark not in get_args(Mark):
        raise ValueError(f"mark must be one of {get_args(Mark)}, got {mark!r}")
    extract = {"hash": hash_answer, "boxed": boxed_answer, "tag": partial(tagged_answer, tag=tag)}[mark]

    def reward(completion: Any, right: Any) -> float | None:
        if right is None:
            return None
        got, target = extract(completion_text(completion)), extract(str(right))
        return float(got is not None and same_answer(got, str(right) if target is None else target))

    def answer_match(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
        return [reward(completion, right) for completion, right in zip(completions, answer, strict=True)]

    return answer_match
