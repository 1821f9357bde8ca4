"""Rewards of the form of a completion: is the reasoning where it belongs?"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxrl_llm.rewards.loading import makes_reward
from jaxrl_llm.rewards.text import completion_text


def think_format(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Rewards 1 for a completion that begins with its reasoning in <think>…</think>, else 0.

    Both tags must occur once. Nothing may stand before the first one, not even a space; anything may follow, and the
    reasoning may be empty. TRL lets further closing tags pass.

    Args:
        completions: Strings, or lists of messages, of which the last counts.
        **columns: Not used.

    Example:
        >>> think_format(["<think>3 and 4</think>7", "7"])
        [1.0, 0.0]
    """
    texts = map(completion_text, completions)
    return [float(text.startswith("<think>") and _parts(text, ("think",)) is not None) for text in texts]


@makes_reward
def tag_format(*, tags: Sequence[str] = ("think", "answer"), strict: bool = True) -> Callable[..., list[float]]:
    r"""Makes a reward of 1 for a completion that opens and closes each tag once, one after the other, else 0.

    Args:
        tags: Names, in their order.
        strict: Nothing but white space may stand outside the tags.

    Returns:
        `reward(completions)`.

    Raises:
        ValueError: If there is no tag, or a tag is no word or given twice.

    Example:
        >>> tag_format()(["<think>3 and 4</think>\n<answer>7</answer>", "<answer>7</answer><think></think>"])
        [1.0, 0.0]
    """
    tags = tuple(tags)
    if not tags or len(set(tags)) < len(tags) or not all(re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise ValueError(f"tags must be one or more different words, got {tags!r}")

    def score(text: str) -> float:
        outside = _parts(text, tags)
        return float(outside is not None and not (strict and outside.strip()))

    def tag_format(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [score(completion_text(completion)) for completion in completions]

    return tag_format


def _parts(text: str, tags: Sequence[str]) -> str | None:
    """What stands outside the tags; None if they do not each open and close once, in this order."""
    outside, position = [], 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        start, end = text.find(opening), text.find(closing)
        if text.count(opening) != 1 or text.count(closing) != 1 or not position <= start < end:
            return None
        outside.append(text[position:start])
        position = end + len(closing)
    return "".join([*outside, text[position:]])
