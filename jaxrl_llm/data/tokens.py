"""Tokenized rows of each kind: arrays of different lengths, before they are padded to batches."""

import dataclasses
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int32


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
    margin: float = 0.0
    """By how much `chosen` is better, in units of the reward; 0 if the row does not say."""


class UnpairedTokens(NamedTuple):
    """A tokenized row of KTO or BCO."""

    prompt_ids: Int32[np.ndarray, " prompt"]
    completion_ids: Int32[np.ndarray, " completion"]
    """Ends with EOS unless it was cut."""
    label: bool
    """Whether the answer is wanted."""
    truncated: bool
    """Whether the completion was cut off at `max_length`."""


class RatedTokens(NamedTuple):
    """A tokenized row of a pointwise reward model."""

    prompt_ids: Int32[np.ndarray, " prompt"]
    """Empty (or a BOS) for a text alone."""
    completion_ids: Int32[np.ndarray, " completion"]
    """Ends with EOS unless it was cut."""
    score: float
    truncated: bool
    """Whether the completion was cut off at `max_length`."""


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
