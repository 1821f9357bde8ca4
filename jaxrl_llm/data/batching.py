"""Which rows make up which batch, and how long they are padded: pure functions of seed and step.

A training loop that asks for the batch of a step needs no state of the data, so a resumed run goes on exactly where it
stopped. With `lengths`, rows of like length share a batch, and `bucket_length` rounds its longest up to one of a few
lengths: little padding, and few programs to compile.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

MEGA_BATCH = 50
"""Batches whose rows are sorted together: enough for rows of like length, few enough to stay random."""


def batch_indices(
    num_rows: int,
    batch_size: int,
    *,
    seed: int,
    step: int,
    lengths: Sequence[int] | Int[np.ndarray, " rows"] | None = None,
) -> Int[np.ndarray, " batch"]:
    """Says which rows make up the batch of a step: a pure function, so that a resumed run needs no state of the data.

    The rows are shuffled anew for every epoch, and the epochs laid end to end; step s takes the places from
    s·batch_size on. A batch at the end of an epoch so goes on into the next one: no row is left out or taken twice in
    an epoch, and all batches have the same size. A batch may be larger than an epoch.

    With `lengths`, every 50 batches' worth of shuffled rows are sorted by length, cut into batches, and all batches of
    the epoch shuffled. The batch that lies across two epochs is of any lengths.

    Args:
        num_rows: Rows of the dataset, at least 1.
        batch_size: Rows of a batch, at least 1.
        seed: At least 0. The order is fixed for one release of numpy.
        step: At least 0.
        lengths: Length of each row, for batches of like lengths; any unit. An array is read faster than a list.

    Raises:
        ValueError: If an argument is out of its range, or there are more or fewer lengths than rows.

    Example:
        >>> first_epoch = np.concatenate([batch_indices(4, 2, seed=0, step=step) for step in (0, 1)])
        >>> sorted(first_epoch.tolist())
        [0, 1, 2, 3]
        >>> batches = [batch_indices(4, 2, seed=0, step=step, lengths=[1, 9, 1, 9]) for step in (0, 1)]
        >>> sorted(sorted(batch.tolist()) for batch in batches)
        [[0, 2], [1, 3]]
    """
    for name, value, least in (("num_rows", num_rows, 1), ("batch_size", batch_size, 1), ("step", step, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if lengths is not None and len(lengths) != num_rows:
        raise ValueError(f"lengths must have one entry for each of the {num_rows} rows, got {len(lengths)}.")
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // num_rows, places[-1] // num_rows + 1)
    if lengths is None:
        orders = [_permutation(num_rows, seed, epoch) for epoch in epochs]
    else:
        key = np.asarray(lengths, np.int64).tobytes()
        orders = [_order_by_length(key, batch_size, seed, epoch) for epoch in epochs]
    return np.concatenate(orders)[places - epochs[0] * num_rows]


def bucket_length(longest: int, *, multiple_of: int = 64, max_length: int | None = None) -> int:
    """Rounds a length up to `multiple_of` times a power of two, or to `max_length` if that is less.

    So all lengths up to `max_length` become one of log₂(max_length / multiple_of) + 1, and as many programs compile.

    Args:
        longest: Tokens of the longest row of a batch, at least 1.
        multiple_of: The least length, in tokens.
        max_length: The greatest length, in tokens; None for no limit.

    Raises:
        ValueError: If `longest` is above `max_length`, or an argument below 1.

    Example:
        >>> [bucket_length(longest, max_length=400) for longest in (1, 64, 65, 200, 300)]
        [64, 64, 128, 256, 400]
    """
    for name, value in (("longest", longest), ("multiple_of", multiple_of)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if max_length is not None and longest > max_length:
        raise ValueError(f"longest must be at most max_length={max_length}, got {longest}. Truncate the rows before.")
    bucket = multiple_of << (-(-longest // multiple_of) - 1).bit_length()
    return bucket if max_length is None else min(bucket, max_length)


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


@functools.lru_cache(maxsize=4)
def _order_by_length(lengths: bytes, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch in batches of like lengths; the lengths come as bytes, which can be a key of the cache."""
    sizes = np.frombuffer(lengths, np.int64)
    order = _permutation(len(sizes), seed, epoch)
    # What completes the last batch of the epoch before stands first, and what begins the next epoch's last.
    first = min(-epoch * len(sizes) % batch_size, len(sizes))
    num_batches = (len(sizes) - first) // batch_size
    end = first + num_batches * batch_size
    inner = order[first:end]
    mega_batch = np.arange(len(inner)) // (MEGA_BATCH * batch_size)
    batches = inner[np.lexsort((sizes[inner], mega_batch))].reshape(num_batches, batch_size)
    batches = _generator(seed, 2, epoch).permutation(batches)
    return np.concatenate([order[:first], batches.reshape(-1), order[end:]])


def _generator(seed: int, *stream: int) -> np.random.Generator:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    # spawn_key, not a longer seed: SeedSequence([5]) and SeedSequence([5, 0]) are the same stream.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))
