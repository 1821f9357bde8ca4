"""Calls reward functions on completions and adds their rewards up. What happens when one fails is told here.

| a reward function … | what happens |
|---|---|
| needs a column that is not there | `ValueError` at once: a mistake in the program or the data |
| returns no list, a list of another length, or an entry that is no number | `ValueError` at once, whatever `on_error` |
| raises (or calls `sys.exit`) | by `on_error`, for the rows on which it raises when it is called with each alone |
| returns NaN, an infinity, or more than float32 holds | by `on_error`, for that row |
| takes longer than `timeout` | by `on_error`, for all rows of the call |
| returns None | does not apply to the row; where nothing applies the total is NaN, and the advantage 0 |

`on_error="raise"` stops with a `RewardError` that names the function, the row, its prompt and its completion. "ignore"
counts the row as None and adds it to `RewardTable.errors`, which recipes log as `rewards/<name>/errors`.

A function that raised is called again with one row at a time, to find the row. One that compares the rows of its call
should therefore catch its own exceptions.

A timeout runs the function in a thread, which Python cannot kill: after the timeout it goes on in the background until it
ends, and takes its share of the processor. What waits, sleeps or loops in Python is bounded. A single call into C that
keeps the interpreter's lock (a regular expression that backtracks for ever, a huge power) is not, for then nobody can look
at the clock. Run such a thing in a process of its own.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from jaxtyping import Float32, Int

from jaxrl_llm.rewards.calls import LARGEST, OnError, Reward, RewardCall, reward_name


class RewardTable(NamedTuple):
    """Rewards of N completions by K functions."""

    total: Float32[np.ndarray, " rows"]
    """Weighted sum over the functions that apply. NaN where none applies: such a row shall get advantage 0."""
    per_function: Float32[np.ndarray, "rows functions"]
    """Before weighting; NaN where a function does not apply."""
    names: tuple[str, ...]
    """Of the functions, for metrics. A name that occurs again gets a number."""
    errors: Int[np.ndarray, " functions"]
    """Rows on which a function failed and was ignored."""


def evaluate_rewards(
    reward_funcs: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    reward_weights: Sequence[float] | None = None,
    on_error: OnError = "raise",
    timeout: float | None = None,
) -> RewardTable:
    """Scores every completion by every function.

    Args:
        reward_funcs: At least one. A function without `**columns` in its signature is given the columns that it names.
        prompts: One for each completion (the completions of one prompt are contiguous, the prompt repeated).
        completions: What the model wrote, without special tokens.
        columns: The other columns of the data, one entry for each completion.
        reward_weights: One for each function, finite; None for all 1.
        on_error: What a failure does, by the table of the module.
        timeout: Seconds that each function may take for all rows; None or 0: no limit.

    Raises:
        RewardError: If a function fails, with `on_error="raise"`.
        ValueError: If the lengths do not agree, a function needs a column that is not there, or it returns something
            other than one number or None for each completion. The message names the function.

    Example:
        >>> from jaxrl_llm.rewards import exact_match
        >>> def brief(completions, **columns):
        ...     return [-float(len(text)) for text in completions]
        >>> table = evaluate_rewards(
        ...     [exact_match, brief], ["3+4="] * 2, ["7", "10"], {"answer": ["7", "7"]}, reward_weights=[1.0, 0.1]
        ... )
        >>> table.names, table.total.round(2).tolist()
        (('exact_match', 'brief'), [0.8999999761581421, -0.20000000298023224])
    """
    columns = {} if columns is None else columns
    _check_lengths(prompts, completions, columns)
    _check_options(on_error, timeout)
    weights = _weights(reward_weights, len(reward_funcs))
    everything = {"prompts": prompts, "completions": completions, **columns}
    scored = [RewardCall(function, everything, on_error, timeout).scores() for function in reward_funcs]
    per_function = np.stack([scores for scores, _ in scored], axis=1)
    total = np.where(np.isnan(per_function).all(axis=1), np.nan, np.nansum(per_function * weights, axis=1))
    if np.any(np.abs(total) > LARGEST):
        raise ValueError(f"A weighted sum of rewards exceeds float32: reward_weights are {weights.tolist()}.")
    errors = np.array([failed for _, failed in scored], int)
    return RewardTable(total.astype(np.float32), per_function.astype(np.float32), _names(reward_funcs), errors)


def _check_lengths(prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> None:
    for name, values in (("prompts", prompts), *columns.items()):
        if len(values) != len(completions):
            raise ValueError(
                f"{name!r} has {len(values)} entries for {len(completions)} completions; expected one each."
            )
    if reserved := {"prompts", "completions"} & set(columns):
        raise ValueError(f"Columns may not be called {sorted(reserved)}: these are arguments of every reward function.")


def _check_options(on_error: str, timeout: float | None) -> None:
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be one of {get_args(OnError)}, got {on_error!r}.")
    if timeout is not None and not 0 <= timeout < threading.TIMEOUT_MAX:
        raise ValueError(f"timeout must be a number of seconds, or 0 for no limit, got {timeout}.")


def _weights(reward_weights: Sequence[float] | None, count: int) -> np.ndarray:
    weights = np.ones(count) if reward_weights is None else np.asarray(reward_weights, float)
    if not count or weights.shape != (count,) or not np.isfinite(weights).all():
        raise ValueError(
            f"reward_weights must hold one weight for each of the {count} reward functions (at least one), all finite; "
            f"got {reward_weights}."
        )
    return weights


def _names(functions: Sequence[Reward]) -> tuple[str, ...]:
    names = [reward_name(function) for function in functions]
    return tuple(f"{name}_{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names))
