"""From examples to token ids with a loss mask.

Each segment of an example (`jaxrl_llm.data.templates`) is tokenized by itself. Tokenizing the whole text at once would
let a BPE merge cross the border between prompt and response: the ids of the prompt in training would then differ from
those that the model is given when it generates, and some tokens would belong to both sides. Tokenized by segments, the
ids of a prompt are always the first ids of its examples.

Nothing is shortened in silence: the functions on whole datasets say how many rows were cut at `max_length` (these lose
their EOS, or with "keep_end" their beginning) and how many were dropped because nothing to learn was left.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from jaxtyping import Int32

from jaxrl_llm.data.examples import (
    Completion,
    PreferenceExample,
    Prompt,
    PromptExample,
    RatedExample,
    SupervisedExample,
    UnpairedExample,
)
from jaxrl_llm.data.templates import Segment, render_example, render_prompt
from jaxrl_llm.data.tokenizers import Tokenizer, encode_text
from jaxrl_llm.data.tokens import PreferenceTokens, RatedTokens, TokenizedRows, Tokens, UnpairedTokens

Truncation: TypeAlias = Literal["keep_start", "keep_end"]
T = TypeVar("T")


def tokenize_sft(
    example: SupervisedExample,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    completion_only_loss: bool = True,
    assistant_only_loss: bool = True,
    truncation: Truncation = "keep_start",
) -> Tokens:
    """Tokenizes a row of SFT.

    What is trained (never the first token, which nothing predicts):

    | row | both true | `completion_only_loss` false | `assistant_only_loss` false | both false |
    |---|---|---|---|---|
    | text | all | all | all | all |
    | prompt + completion, instruction | completion | all | completion | all |
    | messages | assistant | assistant | all | all |
    | prompt + completion as messages | assistant in the completion | assistant | completion | all |

    "Assistant" are all its turns, each with its EOS, without the header that the template writes before it: what the
    template marks by `{% generation %}`, and else what it writes after the generation prompt. "Completion" goes on to
    the end, further turns of the user included. What follows the last target is left out.

    Args:
        example: Prompt and completion.
        tokenizer: As `load_tokenizer` gives it.
        max_length: Tokens after which the row is cut, at least 1.
        completion_only_loss: Leave the prompt out of the loss. Says nothing where there is none: text, `messages`.
        assistant_only_loss: Leave all but the assistant's turns out of the loss. Of conversations alone.
        truncation: "keep_start" cuts the end of a row that is too long, and so its EOS; "keep_end" the beginning.

    Returns:
        The row; its loss mask is all false if no target is left.

    Raises:
        ValueError: If `max_length` is below 1 or `truncation` unknown, or from `render_example` and `encode_text`.

    Example:
        >>> from jaxrl_llm.data.tokenizers import character_tokenizer
        >>> tokens = tokenize_sft(SupervisedExample("3+4=", "7"), character_tokenizer("0123456789+="), max_length=8)
        >>> tokens.ids.tolist(), tokens.loss_mask.tolist()
        ([6, 2, 7, 13, 10, 1], [False, False, False, False, True, True])
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}.")
    if truncation not in get_args(Truncation):
        raise ValueError(f"truncation must be one of {get_args(Truncation)}, got {truncation!r}.")
    prompt, completion = example
    is_chat = isinstance(prompt, tuple)
    if isinstance(prompt, tuple) and isinstance(completion, tuple) and not completion_only_loss:
        prompt, completion = (), (*prompt, *completion)
    ids, is_response = _encode(render_example(prompt, completion, tokenizer), tokenizer)
    loss_mask = is_response
    if is_chat and not assistant_only_loss:
        loss_mask = np.logical_or.accumulate(is_response) if prompt else np.ones_like(is_response)
    elif not is_chat and not completion_only_loss:
        loss_mask = np.ones_like(is_response)
    loss_mask[:1] = False
    end = np.flatnonzero(loss_mask)[-1] + 1 if loss_mask.any() else 0
    start = max(end - max_length, 0) if truncation == "keep_end" else 0
    ids, loss_mask = ids[start:end][:max_length], loss_mask[start:end][:max_length]
    loss_mask[:1] = False
    return Tokens(ids, loss_mask, bool(end > max_length))


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
    (prompt_ids, *answers), truncated = _encode_answers(
        example.prompt, (example.chosen, example.rejected), tokenizer, max_length
    )
    return PreferenceTokens(prompt_ids, answers[0], answers[1], truncated, example.margin or 0.0)


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
    assistant_only_loss: bool = True,
    truncation: Truncation = "keep_start",
) -> TokenizedRows[Tokens]:
    """Tokenizes a dataset of SFT (`tokenize_sft`); rows of which no response token is left are dropped and counted.

    Raises:
        ValueError: If no row is left.
    """

    def tokenize(example: SupervisedExample) -> Tokens:
        return tokenize_sft(
            example,
            tokenizer,
            max_length=max_length,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
            truncation=truncation,
        )

    return _collect(map(tokenize, examples), lambda row: row.loss_mask.any(), f"max_length={max_length}")


def tokenize_preference_rows(
    examples: Sequence[PreferenceExample], tokenizer: Tokenizer, *, max_length: int | None = None
) -> TokenizedRows[PreferenceTokens]:
    """Tokenizes a dataset of DPO (`tokenize_preference`).

    Rows with an answer wholly cut, or with answers that are the same within the limit, are dropped and counted.

    Raises:
        ValueError: If no row is left.
    """

    def differ(row: PreferenceTokens) -> bool:
        return min(len(row.chosen_ids), len(row.rejected_ids)) > 0 and not np.array_equal(*row[1:3])

    rows = (tokenize_preference(example, tokenizer, max_length=max_length) for example in examples)
    return _collect(rows, differ, f"max_length={max_length}")


def tokenize_unpaired_rows(
    examples: Sequence[UnpairedExample], tokenizer: Tokenizer, *, max_length: int | None = None
) -> TokenizedRows[UnpairedTokens]:
    """Tokenizes a dataset of KTO or BCO; rows with a completion wholly cut are dropped and counted.

    Args:
        examples: Single answers with a label.
        tokenizer: As `load_tokenizer` gives it.
        max_length: As in `tokenize_preference`.

    Raises:
        ValueError: If no row is left.
    """

    def tokenize(example: UnpairedExample) -> UnpairedTokens:
        (prompt, completion), truncated = _encode_answers(example.prompt, (example.completion,), tokenizer, max_length)
        return UnpairedTokens(prompt, completion, example.label, truncated)

    return _collect(map(tokenize, examples), lambda row: len(row.completion_ids), f"max_length={max_length}")


def tokenize_rated_rows(
    examples: Sequence[RatedExample], tokenizer: Tokenizer, *, max_length: int | None = None
) -> TokenizedRows[RatedTokens]:
    """Tokenizes a dataset of ratings; rows with a completion wholly cut are dropped and counted.

    Args:
        examples: Texts, or answers to prompts, with a score.
        tokenizer: As `load_tokenizer` gives it.
        max_length: As in `tokenize_preference`.

    Raises:
        ValueError: If no row is left.
    """

    def tokenize(example: RatedExample) -> RatedTokens:
        (prompt, completion), truncated = _encode_answers(example.prompt, (example.completion,), tokenizer, max_length)
        return RatedTokens(prompt, completion, example.score, truncated)

    return _collect(map(tokenize, examples), lambda row: len(row.completion_ids), f"max_length={max_length}")


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
    return ids, np.repeat(np.array([segment.train for segment in segments], bool), [len(ids) for ids in encoded])


def _encode_answers(
    prompt: Prompt, answers: Sequence[Completion], tokenizer: Tokenizer, max_length: int | None
) -> tuple[list[np.ndarray], bool]:
    """The ids of the prompt and of each answer, cut at `max_length`, and whether one was cut."""
    prompt_ids = tokenize_prompt(prompt, tokenizer)
    responses = [_last_response(prompt, answer, tokenizer) for answer in answers]
    room = max(map(len, responses)) if max_length is None else max(max_length - len(prompt_ids), 0)
    truncated = any(len(response) > room for response in responses)
    return [prompt_ids, *(response[:room] for response in responses)], truncated


def _last_response(prompt: Prompt, answer: Completion, tokenizer: Tokenizer) -> np.ndarray:
    responses = [segment for segment in render_example(prompt, answer, tokenizer) if segment.train]
    return _encode(responses, tokenizer)[0]


def _collect(rows: Iterable[T], has_signal: Callable[[T], Any], limit: str) -> TokenizedRows[T]:
    everything = list(rows)
    if not everything:
        raise ValueError("There are no examples to tokenize: the dataset is empty.")
    kept = [index for index, row in enumerate(everything) if has_signal(row)]
    if not kept:
        raise ValueError(
            f"None of the {len(everything)} rows has a response (or prompt) within {limit}. Raise the limit."
        )
    selected = [everything[index] for index in kept]
    num_truncated = sum(bool(getattr(row, "truncated", False)) for row in selected)
    return TokenizedRows(selected, kept, num_truncated, len(everything) - len(kept))
