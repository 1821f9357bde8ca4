"""From rows of ids to arrays of fixed shape.

Lengths are rounded up to a multiple (or see `bucket_length`), so that a run sees few shapes and compiles few programs.
Masks say what is real; what stands under the padding does not matter, so EOS may serve as the padding id.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped

from jaxrl_llm.data.tokens import PreferenceTokens, RatedTokens, Tokens, UnpairedTokens


class TokenBatch(NamedTuple):
    """Rows padded on the right. A loss at `tokens[:, t]` needs the model's output at `t - 1`."""

    tokens: Int32[np.ndarray, "batch time"]
    mask: Bool[np.ndarray, "batch time"]
    """True on real tokens."""
    loss_mask: Bool[np.ndarray, "batch time"]
    """True on the tokens that are targets."""


class PreferenceBatch(NamedTuple):
    """Pairs, with prompt and answer in one row; `loss_mask` is true on the answer.

    Both halves have one shape, so a loss can join them to one forward pass of 2 × batch rows. They are kept apart
    because whoever splits the batch axis (micro-batches, devices) must not part a pair.
    """

    chosen: TokenBatch
    rejected: TokenBatch


class UnpairedBatch(NamedTuple):
    """Single answers, with the prompt in one row; `loss_mask` is true on the answer."""

    completions: TokenBatch
    labels: Bool[np.ndarray, " batch"]
    """True where the answer is wanted."""


class RatedBatch(NamedTuple):
    """Rated texts, or answers with the prompt in one row; `loss_mask` is true on the answer."""

    texts: TokenBatch
    scores: Float32[np.ndarray, " batch"]


class PromptBatch(NamedTuple):
    """Prompts padded on the LEFT, so that all responses begin at the same position."""

    prompt_ids: Int32[np.ndarray, "batch time"]
    prompt_mask: Bool[np.ndarray, "batch time"]


def collate_sft(rows: Sequence[Tokens], *, pad_id: int, length: int | None = None, multiple_of: int = 64) -> TokenBatch:
    """Pads rows of SFT on the right.

    Args:
        rows: At least one.
        pad_id: What to fill with (`padding_id`); never looked at again.
        length: Tokens of every row; None for the longest row rounded up to `multiple_of`.
        multiple_of: In tokens, at least 1.

    Raises:
        ValueError: If a row is longer than `length`.

    Example:
        >>> row = Tokens(np.array([6, 2, 7], np.int32), np.array([False, False, True]), truncated=False)
        >>> collate_sft([row], pad_id=0, multiple_of=4).tokens
        array([[6, 2, 7, 0]], dtype=int32)
    """
    length = padded_length([len(row.ids) for row in rows], length, multiple_of)
    tokens, mask = pad_rows([row.ids for row in rows], length, pad_id)
    return TokenBatch(tokens, mask, pad_rows([row.loss_mask for row in rows], length, False)[0])


def collate_preference(
    rows: Sequence[PreferenceTokens], *, pad_id: int, length: int | None = None, multiple_of: int = 64
) -> PreferenceBatch:
    """Joins prompts to both answers and pads on the right, chosen and rejected to the same length (`collate_sft`).

    Raises:
        ValueError: If a row is longer than `length`.
    """
    halves = [
        [_joined(row.prompt_ids, answer) for row, answer in zip(rows, answers, strict=True)]
        for answers in ([row.chosen_ids for row in rows], [row.rejected_ids for row in rows])
    ]
    length = padded_length([len(row.ids) for half in halves for row in half], length, multiple_of)
    return PreferenceBatch(*(collate_sft(half, pad_id=pad_id, length=length) for half in halves))


def collate_unpaired(
    rows: Sequence[UnpairedTokens], *, pad_id: int, length: int | None = None, multiple_of: int = 64
) -> UnpairedBatch:
    """Joins prompts to completions and pads on the right (arguments as in `collate_sft`).

    Raises:
        ValueError: If a row is longer than `length`.
    """
    joined = [_joined(row.prompt_ids, row.completion_ids) for row in rows]
    batch = collate_sft(joined, pad_id=pad_id, length=length, multiple_of=multiple_of)
    return UnpairedBatch(batch, np.array([row.label for row in rows], bool))


def collate_rated(
    rows: Sequence[RatedTokens], *, pad_id: int, length: int | None = None, multiple_of: int = 64
) -> RatedBatch:
    """Joins prompts to completions and pads on the right (arguments as in `collate_sft`).

    Raises:
        ValueError: If a row is longer than `length`.
    """
    joined = [_joined(row.prompt_ids, row.completion_ids) for row in rows]
    batch = collate_sft(joined, pad_id=pad_id, length=length, multiple_of=multiple_of)
    return RatedBatch(batch, np.array([row.score for row in rows], np.float32))


def rotate_completions(
    rows: Sequence[UnpairedTokens], *, max_length: int | None = None, shift: int = 1
) -> list[UnpairedTokens]:
    """Pairs each prompt with the completion of an earlier row: the mismatched rows of KTO's KL term.

    Rotate the whole batch before it is split, and split both alike; labels stay with their prompts.

    Args:
        rows: Of one batch, at least 2.
        max_length: Tokens of prompt and completion together after which a completion is cut; None for no limit.
        shift: How many rows earlier.

    Raises:
        ValueError: If there are fewer than 2 rows, or `shift` is a whole round, as a prompt would keep its own completion.

    References:
        Ethayarajh et al., 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, section 4.
    """
    if not 0 < shift < max(len(rows), 2):
        raise ValueError(f"shift must be between 1 and the number of rows less one, got {shift} for {len(rows)} rows.")
    if len(rows) < 2:
        raise ValueError(f"KTO's KL term needs a batch of at least 2 rows to exchange completions, got {len(rows)}.")
    rotated = []
    for row, before in zip(rows, [*rows[-shift:], *rows[:-shift]], strict=True):
        room = None if max_length is None else max(max_length - len(row.prompt_ids), 0)
        ids = before.completion_ids[:room]
        truncated = before.truncated or len(ids) < len(before.completion_ids)
        rotated.append(row._replace(completion_ids=ids, truncated=truncated))
    return rotated


def collate_prompts(
    prompts: Sequence[Int32[np.ndarray, "_"]], *, pad_id: int, length: int | None = None, multiple_of: int = 16
) -> PromptBatch:
    """Pads prompts on the left (arguments as in `collate_sft`).

    Raises:
        ValueError: If a prompt is longer than `length`.

    Example:
        >>> batch = collate_prompts([np.array([5, 6], np.int32)], pad_id=0, multiple_of=4)
        >>> batch.prompt_ids.tolist(), batch.prompt_mask.tolist()
        ([[0, 0, 5, 6]], [[False, False, True, True]])
    """
    length = padded_length([len(prompt) for prompt in prompts], length, multiple_of)
    return PromptBatch(*pad_rows(prompts, length, pad_id, side="left"))


def count_rows_without_targets(loss_mask: Bool[np.ndarray, "batch time"]) -> int:
    """Counts the rows of a batch that add nothing to the loss: where rows are read lazily, none is dropped before.

    Example:
        >>> count_rows_without_targets(np.array([[False, True], [False, False]]))
        1
    """
    return int((~loss_mask.any(axis=1)).sum())


def padded_length(lengths: Sequence[int], length: int | None, multiple_of: int) -> int:
    """The length that rows are padded to: the given one, or the longest rounded up.

    Raises:
        ValueError: If a row is longer than `length`.
    """
    longest = max(lengths)
    if length is None:
        return max(-(-longest // multiple_of), 1) * multiple_of
    if longest > length:
        raise ValueError(f"length must be at least that of the longest row, got length={length} and {longest} tokens.")
    return length


def pad_rows(
    rows: Sequence[Shaped[np.ndarray, "_"]], length: int, fill: int | bool, side: Literal["left", "right"] = "right"
) -> tuple[Shaped[np.ndarray, "batch time"], Bool[np.ndarray, "batch time"]]:
    """Fills rows up to a length; returns them and a mask that is true on what was there."""
    values = np.full((len(rows), length), fill, rows[0].dtype)
    mask = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        values[index, where], mask[index, where] = row, True
    return values, mask


def _joined(prompt_ids: np.ndarray, answer_ids: np.ndarray) -> Tokens:
    ids = np.concatenate([prompt_ids, answer_ids])
    loss_mask = np.arange(len(ids)) >= max(len(prompt_ids), 1)
    return Tokens(ids, loss_mask, truncated=False)
