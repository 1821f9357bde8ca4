"""Rewards that shape: of the length of a completion and of what it repeats, counted in tokens, and the guide's example.

Lengths are those of the column `completion_ids`, one list of tokens a completion with its EOS, which recipes give.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxrl_llm.rewards.calls import Reward, accepted_arguments
from jaxrl_llm.rewards.loading import load_reward, makes_reward
from jaxrl_llm.rewards.text import completion_text

KEYWORDS = ("好", "优秀", "正确", "是的")


@makes_reward
def soft_overlong(*, max_completion_length: int, cache: int) -> Callable[..., list[float]]:
    """Makes a punishment of completions that come near the longest length, from 0 down to −1.

    With L the longest length, C the cache and n the tokens: 0 if n ≤ L − C; −1 if n > L; else (L − C − n) / C.

    Args:
        max_completion_length: L, in tokens, at least 1.
        cache: C, in tokens, from 0 (a step at L) to L.

    Returns:
        `reward(completion_ids)`.

    Raises:
        ValueError: If a length is out of range.

    References:
        Yu et al. (2025), "DAPO", equation 13.

    Example:
        >>> soft_overlong(max_completion_length=100, cache=20)(completion_ids=[[1] * n for n in (50, 90, 110)])
        [0.0, -0.5, -1.0]
    """
    if max_completion_length < 1 or not 0 <= cache <= max_completion_length:
        raise ValueError(
            f"0 <= cache <= max_completion_length is meant, got cache={cache} and {max_completion_length=}"
        )
    free = max_completion_length - cache

    def punishment(length: int) -> float:
        if length <= free:
            return 0.0
        return -1.0 if length > max_completion_length else (free - length) / cache

    def soft_overlong(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [punishment(len(ids)) for ids in completion_ids]

    return soft_overlong


@makes_reward
def repetition_penalty(*, ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """Makes a penalty of repeated n-grams of tokens: (1 − different n-grams / n-grams) × max_penalty.

    Args:
        ngram_size: n, in tokens, at least 1. A shorter completion gets 0.
        max_penalty: What a completion that only repeats itself comes near; not positive.

    Returns:
        `reward(completion_ids)`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Yeo et al. (2025), "Demystifying Long Chain-of-Thought Reasoning in LLMs", appendix C.2.

    Example:
        >>> repetition_penalty(ngram_size=2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]])
        [0.0, -0.75]
    """
    if ngram_size < 1 or not max_penalty <= 0:
        raise ValueError(f"ngram_size >= 1 and max_penalty <= 0 are meant, got {ngram_size=} and {max_penalty=}")

    def penalty(ids: Sequence[int]) -> float:
        ngrams = [tuple(ids[start : start + ngram_size]) for start in range(len(ids) - ngram_size + 1)]
        repeated = len(ngrams) - len(set(ngrams))
        return max_penalty * repeated / len(ngrams) if repeated else 0.0

    def repetition_penalty(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [penalty(ids) for ids in completion_ids]

    return repetition_penalty


@makes_reward
def cosine_scaled(
    *,
    max_length: int,
    correct: str | Reward = "numeric_match",
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """Makes a reward of correct answers that falls with their length, and of wrong ones that rises with it.

    With n tokens and p = min(n / max_length, 1): long + (short − long) · (1 + cos πp) / 2, where short and long are the
    values of a completion of no length and of the greatest.

    Args:
        max_length: In tokens, at least 1; a longer completion counts as one of this length.
        correct: The reward that tells what is correct, or its name: positive is correct, None gives None.
        min_value_wrong: Of a wrong completion of no length.
        max_value_wrong: Of a wrong completion of the greatest length.
        min_value_correct: Of a correct completion of the greatest length.
        max_value_correct: Of a correct completion of no length.

    Returns:
        `reward(prompts, completions, completion_ids)`, which takes the columns of `correct` too.

    Raises:
        ValueError: If `max_length` is out of range, or there is no such reward.

    References:
        Yeo et al. (2025), "Demystifying Long Chain-of-Thought Reasoning in LLMs", appendix C.1.

    Example:
        >>> reward = cosine_scaled(max_length=100, correct="exact_match")
        >>> reward(["3+4="] * 2, ["7", "8"], completion_ids=[[1] * 50] * 2, answer=["7"] * 2)
        [0.75, -0.75]
    """
    if max_length < 1:
        raise ValueError(f"max_length >= 1 is meant, got {max_length}")
    judge = load_reward(correct) if isinstance(correct, str) else correct

    def scaled(judged: float | None, length: int) -> float | None:
        if judged is None:
            return None
        right = judged > 0
        short, long = (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
        return long + (short - long) * (1 + math.cos(math.pi * min(length / max_length, 1))) / 2

    def cosine_scaled(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        judged = judge(**accepted_arguments(judge, given))
        return [scaled(value, len(ids)) for value, ids in zip(judged, completion_ids, strict=True)]

    return cosine_scaled


def guide_example(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Rewards as the guide's example does: 1.0 for 50 to 200 characters, and 0.5 for each of 好, 优秀, 正确 and 是的.

    A keyword counts once. It shows how a reward is written, and how one is hacked: the words need not mean anything.

    Args:
        completions: Strings, or lists of messages, of which the last counts.
        **columns: Not used.

    Example:
        >>> guide_example(["好" * 50, "是的，正确", ""])
        [1.5, 1.0, 0.0]
    """

    def score(text: str) -> float:
        return float(50 <= len(text) <= 200) + 0.5 * sum(word in text for word in KEYWORDS)

    return [score(completion_text(completion)) for completion in completions]
