"""From rows of ids to arrays of fixed shape, and which rows make up which batch.

Lengths are rounded up to a multiple, so that a run sees few shapes and compiles few programs. Masks say what is real;
what stands under the padding does not matter, so EOS may serve as the padding id.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from jaxrl_llm.data.tokenization import PreferenceTokens, Tokens


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
    length = _length([len(row.ids) for row in rows], length, multiple_of)
    tokens, mask = _pad([row.ids for row in rows], length, pad_id)
    return TokenBatch(tokens, mask, _pad([row.loss_mask for row in rows], length, False)[0])


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
    length = _length([len(row.ids) for half in halves for row in half], length, multiple_of)
    return PreferenceBatch(*(collate_sft(half, pad_id=pad_id, length=length) for half in halves))


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
    length = _length([len(prompt) for prompt in prompts], length, multiple_of)
    return PromptBatch(*_pad(prompts, length, pad_id, side="left"))


def batch_indices(num_rows: int, batch_size: int, *, seed: int, step: int) -> Int[np.ndarray, " batch"]:
    """Says which rows make up the batch of a step: a pure function, so that a resumed run needs no state of the data.

    The rows are shuffled anew for every epoch, and the epochs laid end to end; step s takes the places from
    s·batch_size on. A batch at the end of an epoch so goes on into the next one: no row is left out or taken twice in
    an epoch, and all batches have the same size. A batch may be larger than an epoch.

    Args:
        num_rows: Rows of the dataset, at least 1.
        batch_size: Rows of a batch, at least 1.
        seed: At least 0. The order is fixed for one release of numpy.
        step: At least 0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> first_epoch = np.concatenate([batch_indices(4, 2, seed=0, step=step) for step in (0, 1)])
        >>> sorted(first_epoch.tolist())
        [0, 1, 2, 3]
    """
    for name, value, least in (("num_rows", num_rows, 1), ("batch_size", batch_size, 1), ("step", step, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // num_rows, places[-1] // num_rows + 1)
    order = np.concatenate([_permutation(num_rows, seed, epoch) for epoch in epochs])
    return order[places - epochs[0] * num_rows]


def split_indices(
    num_rows: int, *, held_out: int | float, seed: int
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " held_out"]]:
    """Parts the rows into training and held-out rows, as a pure function of the seed.

    Args:
        num_rows: Rows of the dataset.
        held_out: Number of held-out rows, or a fraction in (0, 1), rounded to whole rows, at least one.
        seed: At least 0.

    Returns:
        The indices of both parts, each in increasing order.

    Raises:
        ValueError: If nothing would be left to train on.

    Example:
        >>> train, held_out = split_indices(10, held_out=0.2, seed=0)
        >>> len(train), len(held_out), sorted([*train, *held_out]) == list(range(10))
        (8, 2, True)
    """
    count = max(round(held_out * num_rows), 1) if isinstance(held_out, float) and 0 < held_out < 1 else held_out
    if not (isinstance(count, int) and 0 <= count < num_rows):
        raise ValueError(f"held_out must be a fraction in (0, 1) or a number of rows below {num_rows}, got {held_out}.")
    order = _generator(seed, 1).permutation(num_rows)
    return np.sort(order[count:]), np.sort(order[:count])


@functools.lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch; consecutive steps share it."""
    return _generator(seed, 0, epoch).permutation(num_rows)


def _generator(seed: int, *stream: int) -> np.random.Generator:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    # spawn_key, not a longer seed: SeedSequence([5]) and SeedSequence([5, 0]) are the same stream.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _length(lengths: Sequence[int], length: int | None, multiple_of: int) -> int:
    longest = max(lengths)
    if length is None:
        return -(-longest // multiple_of) * multiple_of
    if longest > length:
        raise ValueError(f"length must be at least that of the longest row, got length={length} and {longest} tokens.")
    return length


def _pad(
    rows: Sequence[np.ndarray], length: int, fill: int | bool, side: Literal["left", "right"] = "right"
) -> tuple[np.ndarray, np.ndarray]:
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
