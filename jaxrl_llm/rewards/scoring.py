"""Calls reward functions on completions and adds their rewards up."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32

Reward: TypeAlias = Callable[..., Any]
"""`reward(prompts, completions, **columns) -> list[float | None]`, as in TRL: one number a completion, in units of
reward, None where the function does not apply. An array of numpy or jax will do. Prompts and completions are strings,
or lists of messages `{"role", "content"}`; all are called by keyword, so a function takes only what it needs and
`**columns`."""


class RewardTable(NamedTuple):
    """Rewards of N completions by K functions."""

    total: Float32[np.ndarray, " rows"]
    """Weighted sum over the functions that apply. NaN where none applies: such a row shall get advantage 0."""
    per_function: Float32[np.ndarray, "rows functions"]
    """Before weighting; NaN where a function does not apply."""
    names: tuple[str, ...]
    """Of the functions, for metrics. A name that occurs again gets a number."""


def evaluate_rewards(
    reward_funcs: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    reward_weights: Sequence[float] | None = None,
) -> RewardTable:
    """Scores every completion by every function.

    Args:
        reward_funcs: At least one. A function without `**columns` in its signature is given the columns that it names.
        prompts: One for each completion (the completions of one prompt are contiguous, the prompt repeated).
        completions: What the model wrote, without special tokens.
        columns: The other columns of the data, one entry for each completion.
        reward_weights: One for each function; None for all 1.

    Raises:
        ValueError: If the lengths do not agree, a function needs a column that is not there, or it returns something
            other than one finite number or None for each completion. The message names the function.

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
    weights = np.ones(len(reward_funcs)) if reward_weights is None else np.asarray(reward_weights, float)
    if not reward_funcs or weights.shape != (len(reward_funcs),):
        raise ValueError(
            f"reward_weights must hold one weight for each of the {len(reward_funcs)} reward functions (at least one), "
            f"got {reward_weights}."
        )
    scores = [_score(function, prompts, completions, columns) for function in reward_funcs]
    per_function = np.stack(scores, axis=1)
    total = np.where(np.isnan(per_function).all(axis=1), np.nan, np.nansum(per_function * weights, axis=1))
    return RewardTable(total.astype(np.float32), per_function.astype(np.float32), _names(reward_funcs))


def _check_lengths(prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> None:
    for name, values in (("prompts", prompts), *columns.items()):
        if len(values) != len(completions):
            raise ValueError(
                f"{name!r} has {len(values)} entries for {len(completions)} completions; expected one each."
            )
    if reserved := {"prompts", "completions"} & set(columns):
        raise ValueError(f"Columns may not be called {sorted(reserved)}: these are arguments of every reward function.")


def _score(
    function: Reward, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> np.ndarray:
    arguments = _accepted(function, {"prompts": prompts, "completions": completions, **columns})
    returned, name = function(**arguments), _name(function)
    rewards = returned if isinstance(returned, list | tuple) else np.asarray(returned).tolist()
    if not isinstance(rewards, list | tuple):
        raise ValueError(f"Reward {name!r} returned a {type(returned).__name__}; expected a list of numbers or None.")
    if len(rewards) != len(completions):
        raise ValueError(f"Reward {name!r} returned {len(rewards)} rewards for {len(completions)} completions.")
    scores = [np.nan if reward is None else _number(reward, name, row) for row, reward in enumerate(rewards)]
    return np.array(scores, float)


def _accepted(function: Reward, arguments: dict[str, Any]) -> dict[str, Any]:
    """Selects the arguments that the function names, or all if it takes `**columns`."""
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [name for name in required if name not in arguments]:
        raise ValueError(
            f"Reward {_name(function)!r} needs {missing}; there are {sorted(arguments)}. Add the column to the data."
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def _number(reward: Any, name: str, row: int) -> float:
    try:
        number = math.nan if isinstance(reward, str | bytes) else float(reward)
    except TypeError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"Reward {name!r} returned {str(reward)[:60]!r} for row {row}; expected a finite number, or None where the "
            "function does not apply."
        )
    return number


def _names(functions: Sequence[Reward]) -> tuple[str, ...]:
    names = [_name(function) for function in functions]
    return tuple(f"{name}_{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names))


def _name(function: Reward) -> str:
    if isinstance(function, functools.partial):
        return _name(function.func)
    return getattr(function, "__name__", type(function).__name__)
