"""From examples to token ids with a loss mask.

Each segment of an example (`jaxrl_llm.data.templates`) is tokenized by itself. Tokenizing the whole text at once would
let a BPE merge cross the border between prompt and response: the ids of the prompt in training would then differ from
those that the model is given when it generates, and some tokens would belong to both sides. Tokenized by segments, the
ids of a prompt are always the first ids of its examples.

Nothing is shortened in silence: the functions on whole datasets say how many rows were cut at `max_length` (these lose
their EOS) and how many were dropped because nothing to learn was left.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int32

from jaxrl_llm.data.formats import Completion, PreferenceExample, Prompt, PromptExample, SupervisedExample
from jaxrl_llm.data.templates import Segment, render_example, render_prompt
from jaxrl_llm.data.tokenizers import Tokenizer, encode_text


class Tokens(NamedTuple):
    """A tokenized row of SFT."""

    ids: Int32[np.ndarray, " time"]
    loss_mask: Bool[np.ndarray, " time"]
    """True where the token is a target: responses with their EOS. Never the first token, which nothing predicts."""
    truncated: bool
    """Whether tokens were cut off at `max_length`."""


class PreferenceTokens(NamedTuple):
    """A tokenized row of DPO. Both responses end with EOS unless they were cut."""

    prompt_ids: Int32[np.ndarray, " prompt"]
    chosen_ids: Int32[np.ndarray, " chosen"]
    rejected_ids: Int32[np.ndarray, " rejected"]
    truncated: bool
    """Whether a response was cut off at `max_length`."""


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TokenizedRows(Generic[T]):
    """The rows of a dataset that have something to learn from, and what became of the others."""

    rows: list[T]
    kept: list[int]
    """For each row the index of its example."""
    num_truncated: int
    """Rows that were kept, but cut."""
    num_dropped: int
    """Examples that had to be left out: nothing of a response (or of a prompt its end) was within the limit."""

    def __str__(self) -> str:
        total = len(self.rows) + self.num_dropped
        return f"{len(self.rows)} of {total} rows ({self.num_truncated} truncated, {self.num_dropped} dropped)"


def tokenize_sft(
    example: SupervisedExample, tokenizer: Tokenizer, *, max_length: int, completion_only_loss: bool = True
) -> Tokens:
    """Tokenizes a row of SFT.

    Args:
        example: Prompt and completion; of messages, every response of the assistant in the completion is trained.
        tokenizer: As `load_tokenizer` gives it.
        max_length: Tokens after which the row is cut, at least 1.
        completion_only_loss: Train on responses alone (for conversations, what TRL calls `assistant_only_loss`). What
            the template writes after the last response is then left out. If false, every token but the first is a
            target.

    Returns:
        The row; its loss mask is all false if no token of a response is left.

    Raises:
        ValueError: If `max_length` is below 1, or from `render_example` and `encode_text`.

    Example:
        >>> from jaxrl_llm.data.tokenizers import character_tokenizer
        >>> tokens = tokenize_sft(SupervisedExample("3+4=", "7"), character_tokenizer("0123456789+="), max_length=8)
        >>> tokens.ids.tolist(), tokens.loss_mask.tolist()
        ([6, 2, 7, 13, 10, 1], [False, False, False, False, True, True])
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}.")
    ids, is_response = _encode(render_example(example.prompt, example.completion, tokenizer), tokenizer)
    loss_mask = is_response if completion_only_loss else np.ones_like(is_response)
    loss_mask[:1] = False
    end = np.flatnonzero(loss_mask)[-1] + 1 if loss_mask.any() else 0
    return Tokens(ids[:end][:max_length], loss_mask[:end][:max_length], bool(end > max_length))


def tokenize_preference(
    example: PreferenceExample, tokenizer: Tokenizer, *, max_length: int | None = None
) -> PreferenceTokens:
    """Tokenizes a row of DPO.

    Args:
        example: One prompt with two answers.
        tokenizer: As `load_tokenizer` gives it.
        max_length: Tokens of prompt and answer together after which an answer is cut at its end; None for no limit. The
            prompt stays whole, so it may leave an answer empty.

    Example:
        >>> from jaxrl_llm.data.tokenizers import character_tokenizer
        >>> tokens = tokenize_preference(PreferenceExample("1+1=", "2", "3"), character_tokenizer("123+="))
        >>> tokens.prompt_ids.tolist(), tokens.chosen_ids.tolist(), tokens.rejected_ids.tolist()
        ([3, 2, 3, 6], [4, 1], [5, 1])
    """
    prompt_ids = tokenize_prompt(example.prompt, tokenizer)
    answers = [_last_response(example.prompt, answer, tokenizer) for answer in (example.chosen, example.rejected)]
    room = max(map(len, answers)) if max_length is None else max(max_length - len(prompt_ids), 0)
    return PreferenceTokens(
        prompt_ids, answers[0][:room], answers[1][:room], truncated=any(len(answer) > room for answer in answers)
    )


def tokenize_prompt(prompt: Prompt, tokenizer: Tokenizer) -> Int32[np.ndarray, " time"]:
    """Tokenizes a prompt, up to the point where the response begins: the same ids with which its examples begin.

    Example:
        >>> from jaxrl_llm.data.tokenizers import character_tokenizer
        >>> tokenize_prompt("1+1=", character_tokenizer("123+=")).tolist()
        [3, 2, 3, 6]
    """
    return _encode(render_prompt(prompt, tokenizer), tokenizer)[0]


def tokenize_sft_rows(
    examples: Sequence[SupervisedExample],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    completion_only_loss: bool = True,
) -> TokenizedRows[Tokens]:
    """Tokenizes a dataset of SFT (`tokenize_sft`); rows of which no response token is left are dropped and counted.

    Raises:
        ValueError: If no row is left.
    """

    def tokenize(example: SupervisedExample) -> Tokens:
        return tokenize_sft(example, tokenizer, max_length=max_length, completion_only_loss=completion_only_loss)

    return _collect(map(tokenize, examples), lambda row: row.loss_mask.any(), f"max_length={max_length}")


def tokenize_preference_rows(
    examples: Sequence[PreferenceExample], tokenizer: Tokenizer, *, max_length: int | None = None
) -> TokenizedRows[PreferenceTokens]:
    """Tokenizes a dataset of DPO (`tokenize_preference`); rows with an answer wholly cut are dropped and counted.

    Raises:
        ValueError: If no row is left.
    """
    rows = (tokenize_preference(example, tokenizer, max_length=max_length) for example in examples)
    return _collect(rows, lambda row: len(row.chosen_ids) and len(row.rejected_ids), f"max_length={max_length}")


def tokenize_prompt_rows(
    examples: Sequence[PromptExample], tokenizer: Tokenizer, *, max_prompt_length: int | None = None
) -> TokenizedRows[np.ndarray]:
    """Tokenizes the prompts of a dataset of GRPO or PPO to id arrays.

    Prompts longer than `max_prompt_length` are dropped and counted, not cut: half a prompt asks something else. Use
    `kept` to select the columns of the rewards.

    Raises:
        ValueError: If no prompt is left.
    """
    rows = (tokenize_prompt(example.prompt, tokenizer) for example in examples)

    def fits(ids: np.ndarray) -> bool:
        return len(ids) > 0 and (max_prompt_length is None or len(ids) <= max_prompt_length)

    return _collect(rows, fits, f"max_prompt_length={max_prompt_length}")


def _encode(segments: Sequence[Segment], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    encoded = [encode_text(segment.text, tokenizer) for segment in segments]
    ids = np.array([token for tokens in encoded for token in tokens], np.int32)
    return ids, np.repeat([segment.train for segment in segments], [len(tokens) for tokens in encoded])


def _last_response(prompt: Prompt, answer: Completion, tokenizer: Tokenizer) -> np.ndarray:
    responses = [segment for segment in render_example(prompt, answer, tokenizer) if segment.train]
    return _encode(responses, tokenizer)[0]


def _collect(rows: Iterable[T], has_signal: Callable[[T], Any], limit: str) -> TokenizedRows[T]:
    everything = list(rows)
    kept = [index for index, row in enumerate(everything) if has_signal(row)]
    if not kept:
        raise ValueError(
            f"None of the {len(everything)} rows has a response (or prompt) within {limit}. Raise the limit."
        )
    selected = [everything[index] for index in kept]
    num_truncated = sum(bool(getattr(row, "truncated", False)) for row in selected)
    return TokenizedRows(selected, kept, num_truncated, len(everything) - len(kept))
