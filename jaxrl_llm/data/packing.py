"""Packing: several rows in one, so that little of a batch is padding, without their seeing one another.

Each row becomes a segment. The model attends within a segment alone and counts positions from its beginning
(`segment_ids`), and the first token of a segment, which nothing predicts, is never a target: loss and gradient of
packed rows are those of the same rows unpacked. A long stream without borders is cut by `text_windows` instead.
"""

import bisect
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Int32

from jaxrl_llm.data.collation import pad_rows, padded_length
from jaxrl_llm.data.tokens import Tokens

PackingStrategy: TypeAlias = Literal["bfd", "bfd_split", "wrapped"]


class PackedTokens(NamedTuple):
    """Several rows in one."""

    ids: Int32[np.ndarray, " time"]
    loss_mask: Bool[np.ndarray, " time"]
    """True where the token is a target; never on the first token of a segment."""
    segment_ids: Int32[np.ndarray, " time"]
    """1 on the tokens of the first segment, 2 on those of the second, and so on; 0 is left for padding."""


class PackedBatch(NamedTuple):
    """Packed rows padded on the right, for `score_tokens(…, segment_ids=…)`."""

    tokens: Int32[np.ndarray, "batch time"]
    mask: Bool[np.ndarray, "batch time"]
    """True on real tokens."""
    loss_mask: Bool[np.ndarray, "batch time"]
    """True on the tokens that are targets."""
    segment_ids: Int32[np.ndarray, "batch time"]
    """From 1 on in each row; 0 on padding."""
    positions: Int32[np.ndarray, "batch time"]
    """Place of each token in its segment, from 0 on; 0 on padding. Our models count the same from `segment_ids`."""


def pack_rows(rows: Sequence[Tokens], length: int, *, packing_strategy: PackingStrategy = "bfd") -> list[PackedTokens]:
    """Packs rows into as few as it can of at most `length` tokens. Rows without tokens are left out.

    - "bfd", best fit decreasing: the longest row first, each to where the least space is left that it fits into. What
      of a row is beyond `length` is lost: tokenize with `max_length=length`, which counts such rows.
    - "bfd_split": the same, but a row beyond `length` is cut into pieces, each a segment.
    - "wrapped": the rows one after the other, cut at every `length` tokens. Nothing but the last row has padding.

    Wherever a row is cut, the first token of the next piece has lost its context and is no target. No strategy lets a
    segment see another one (TRL's "wrapped" does).

    Args:
        rows: In their order.
        length: Tokens of a packed row, at least 1.
        packing_strategy: As above.

    Raises:
        ValueError: If `length` is below 1 or the strategy unknown.

    References:
        Ding et al., 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.

    Example:
        >>> rows = [Tokens(np.arange(n, dtype=np.int32), np.arange(n) > 0, truncated=False) for n in (2, 3, 1)]
        >>> [(row.ids.tolist(), row.segment_ids.tolist()) for row in pack_rows(rows, 4)]
        [([0, 1, 2, 0], [1, 1, 1, 2]), ([0, 1], [1, 1])]
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}.")
    if packing_strategy not in get_args(PackingStrategy):
        raise ValueError(f"packing_strategy must be one of {get_args(PackingStrategy)}, got {packing_strategy!r}.")
    rows = [row for row in rows if len(row.ids)]
    if packing_strategy == "wrapped":
        return [_join(pieces) for pieces in _wrap(rows, length)]
    if packing_strategy == "bfd":
        pieces = [_piece(row, 0, length) for row in rows]
    else:
        pieces = [_piece(row, start, start + length) for row in rows for start in range(0, len(row.ids), length)]
    bins = _best_fit([len(piece.ids) for piece in pieces], length)
    return [_join([pieces[index] for index in indices]) for indices in bins]


def text_windows(ids: Sequence[int] | Int32[np.ndarray, " stream"], length: int) -> list[Tokens]:
    """Cuts one long text into windows of `length` targets, for pretraining and for bits per byte.

    A window has `length` + 1 tokens and begins with the last token of the one before, so that every token of the text
    but its very first is a target exactly once. The last window may be shorter. The windows are views of the text.

    Args:
        ids: The whole text (documents with an EOS after each), at least 2 tokens.
        length: Targets of a window, at least 1: the tokens that the model reads at once.

    Raises:
        ValueError: If `length` is below 1, or there are fewer than 2 tokens.

    Example:
        >>> [window.ids.tolist() for window in text_windows([5, 6, 7, 8, 9, 10], 2)]
        [[5, 6, 7], [7, 8, 9], [9, 10]]
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}.")
    if len(ids) < 2:
        raise ValueError(f"The text must have at least 2 tokens, one to predict from another, got {len(ids)}.")
    stream, loss_mask = np.asarray(ids, np.int32), np.arange(min(length + 1, len(ids))) > 0
    windows = [stream[start : start + length + 1] for start in range(0, len(stream) - 1, length)]
    return [Tokens(window, loss_mask[: len(window)], truncated=False) for window in windows]


def collate_packed(
    rows: Sequence[PackedTokens], *, pad_id: int, length: int | None = None, multiple_of: int = 64
) -> PackedBatch:
    """Pads packed rows on the right (arguments as in `collate_sft`).

    Raises:
        ValueError: If a row is longer than `length`.

    Example:
        >>> row = PackedTokens(np.array([5, 6, 7], np.int32), np.array([False, True, False]), np.array([1, 1, 2], np.int32))
        >>> batch = collate_packed([row], pad_id=0, length=4)
        >>> batch.segment_ids.tolist(), batch.positions.tolist()
        ([[1, 1, 2, 0]], [[0, 1, 0, 0]])
    """
    length = padded_length([len(row.ids) for row in rows], length, multiple_of)
    tokens, mask = pad_rows([row.ids for row in rows], length, pad_id)
    loss_mask, segment_ids, positions = (
        pad_rows(values, length, 0)[0]
        for values in (
            [row.loss_mask for row in rows],
            [row.segment_ids for row in rows],
            [_positions(row.segment_ids) for row in rows],
        )
    )
    return PackedBatch(tokens, mask, loss_mask, segment_ids, positions)


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts items into bins, longest first, each into the bin with the least space that holds it, else into a new one.

    There are at most `capacity` different spaces, kept sorted, and for each a queue of bins: an item costs a bisection.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []
    waiting: dict[int, deque[list[int]]] = {}
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        at = bisect.bisect_left(spaces, lengths[index])
        if at == len(spaces):
            space, chosen = capacity, []
            bins.append(chosen)
        else:
            space = spaces[at]
            chosen = waiting[space].popleft()
            if not waiting[space]:
                del spaces[at]
        chosen.append(index)
        space -= lengths[index]
        if space:
            queue = waiting.setdefault(space, deque())
            if not queue:
                bisect.insort(spaces, space)
            queue.append(chosen)
    return bins


def _wrap(rows: Sequence[Tokens], length: int) -> list[list[Tokens]]:
    """Lays the rows end to end and cuts at every `length` tokens, and where a row ends."""
    wrapped: list[list[Tokens]] = []
    room = 0
    for row in rows:
        start = 0
        while start < len(row.ids):
            if not room:
                wrapped.append([])
                room = length
            piece = _piece(row, start, start + room)
            wrapped[-1].append(piece)
            start, room = start + len(piece.ids), room - len(piece.ids)
    return wrapped


def _piece(row: Tokens, start: int, stop: int) -> Tokens:
    return Tokens(row.ids[start:stop], row.loss_mask[start:stop], row.truncated)


def _join(pieces: Sequence[Tokens]) -> PackedTokens:
    lengths = [len(piece.ids) for piece in pieces]
    loss_mask = np.concatenate([piece.loss_mask for piece in pieces])
    loss_mask[np.cumsum([0, *lengths[:-1]])] = False
    segment_ids = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), lengths)
    return PackedTokens(np.concatenate([piece.ids for piece in pieces]), loss_mask, segment_ids)


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    place = np.arange(len(segment_ids), dtype=np.int32)
    begins = np.diff(segment_ids, prepend=0) != 0
    return place - np.maximum.accumulate(np.where(begins, place, 0))
