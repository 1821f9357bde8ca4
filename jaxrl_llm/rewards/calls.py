"""Calls one reward function: with the arguments that it takes, within a time, and with a rule for what fails.

The rule stands in `jaxrl_llm.rewards.scoring`.
"""

import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import numpy as np

Reward: TypeAlias = Callable[..., Any]
"""`reward(prompts, completions, **columns) -> list[float | None]`, as in TRL: one number a completion, in units of
reward, None where the function does not apply. An array of numpy or jax will do. Prompts and completions are strings,
or lists of messages `{"role", "content"}`; all are called by keyword, so a function takes only what it needs and
`**columns`."""

OnError = Literal["raise", "ignore"]
LARGEST = float(np.finfo(np.float32).max)


class RewardError(ValueError):
    """A reward function raised, gave no finite number, or took too long."""


class _LateError(Exception):
    """The time is up; not to be confused with a `TimeoutError` of the function itself."""


class _Failure(NamedTuple):
    """What went wrong, with the row if it is known."""

    what: str
    row: int | None
    cause: BaseException | None


class RewardCall(NamedTuple):
    """A function, the columns that it is called with, and how.

    Attributes:
        function: The reward function.
        columns: `prompts`, `completions` and all other columns, one entry for each completion.
        on_error: "raise", or "ignore".
        timeout: Seconds for everything; None or 0: no limit.
    """

    function: Reward
    columns: Mapping[str, Sequence[Any]]
    on_error: OnError = "raise"
    timeout: float | None = None

    @property
    def name(self) -> str:
        """The name of the function."""
        return reward_name(self.function)

    @property
    def rows(self) -> int:
        """Number of completions."""
        return len(self.columns["completions"])

    def scores(self) -> tuple[np.ndarray, int]:
        """Calls the function; returns a reward for each row, NaN where there is none, and how many rows failed."""
        arguments = accepted_arguments(self.function, self.columns)
        deadline = time.monotonic() + self.timeout if self.timeout else None
        try:
            returned = self._run(arguments, deadline)
        except _LateError:
            what = f"took longer than the timeout of {self.timeout:g} s for {self.rows} completions"
            return self._nothing(_Failure(what, None, None))
        except (Exception, SystemExit) as error:
            return self._row_by_row(arguments, deadline, error)
        values = [self._number(value, row) for row, value in enumerate(_entries(returned, self.name, self.rows))]
        return _joined(values)

    def _row_by_row(
        self, arguments: dict[str, Sequence[Any]], deadline: float | None, first: BaseException
    ) -> tuple[np.ndarray, int]:
        """Calls a function that raised with each row alone, to find those on which it does."""
        values: list[float | _Failure | None] = []
        for row in range(self.rows):
            try:
                returned = self._run({name: entries[row : row + 1] for name, entries in arguments.items()}, deadline)
            except _LateError:
                what = f"raised {_said(first)}, and called row by row took longer than the {self.timeout:g} s"
                return self._nothing(_Failure(what, row, first))
            except (Exception, SystemExit) as error:
                values.append(self._failed(_Failure(f"raised {_said(error)}", row, error)))
            else:
                values.append(self._number(_entries(returned, self.name, 1)[0], row))
        if any(isinstance(value, _Failure) for value in values):
            return _joined(values)
        return self._nothing(_Failure(f"raised {_said(first)} on all rows together, though on none alone", None, first))

    def _nothing(self, failure: _Failure) -> tuple[np.ndarray, int]:
        return _joined([self._failed(failure)] * self.rows)

    def _run(self, arguments: Mapping[str, Sequence[Any]], deadline: float | None) -> Any:
        # Lists of its own, so that a function that changes them changes nothing for the next.
        call = functools.partial(self.function, **{name: list(entries) for name, entries in arguments.items()})
        return call() if deadline is None else _call_until(call, deadline, self.name)

    def _number(self, reward: Any, row: int) -> float | _Failure | None:
        if reward is None:
            return None
        number = _as_float(reward)
        if number is not None and abs(number) <= LARGEST:
            return number
        meant = f"for row {row}; expected a finite number, or None where the function does not apply"
        if number is None:
            raise ValueError(f"Reward {self.name!r} returned {str(reward)[:60]!r} {meant}.")
        return self._failed(_Failure(f"returned '{number}' {meant}", row, None))

    def _failed(self, failure: _Failure) -> _Failure:
        if self.on_error == "raise":
            self._stop(failure)
        return failure

    def _stop(self, failure: _Failure) -> NoReturn:
        where = "The first row" if failure.row is None else f"Row {failure.row}"
        row = failure.row or 0
        prompt, completion = (_shortened(self.columns[name][row]) for name in ("prompts", "completions"))
        raise RewardError(
            f"Reward {self.name!r} {failure.what}. {where}: prompt {prompt}, completion {completion}. Mend the function, or "
            'let such rows count as None: reward_errors="ignore".'
        ) from failure.cause


def accepted_arguments(function: Reward, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the arguments that a function names, or all if it takes `**columns`; what a partial binds stays bound.

    Raises:
        ValueError: If it needs one that is not there.
    """
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [name for name in required if name not in arguments]:
        raise ValueError(
            f"Reward {reward_name(function)!r} needs {missing}; there are {sorted(arguments)}. Add the column to the data."
        )
    bound = function.keywords if isinstance(function, functools.partial) else {}
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {p.name for p in parameters}
    return {name: value for name, value in arguments.items() if name not in bound and (takes_all or name in named)}


def reward_name(function: Reward) -> str:
    """The name of a function, of what a partial calls, or of the class of a callable object."""
    if isinstance(function, functools.partial):
        return reward_name(function.func)
    return getattr(function, "__name__", type(function).__name__)


def _call_until(call: Callable[[], Any], deadline: float, name: str) -> Any:
    """Calls in a thread, and leaves it behind when the time is up."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(max(deadline - time.monotonic(), 0))
    if not outcome:
        raise _LateError
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _entries(returned: Any, name: str, rows: int) -> Sequence[Any]:
    rewards = returned if isinstance(returned, list | tuple) else np.asarray(returned).tolist()
    if not isinstance(rewards, list | tuple):
        raise ValueError(f"Reward {name!r} returned a {type(returned).__name__}; expected a list of numbers or None.")
    if len(rewards) != rows:
        raise ValueError(f"Reward {name!r} returned {len(rewards)} rewards for {rows} completions.")
    return rewards


def _as_float(reward: Any) -> float | None:
    """None for what is no number."""
    try:
        return None if isinstance(reward, str | bytes) else float(reward)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def _joined(values: Sequence[float | _Failure | None]) -> tuple[np.ndarray, int]:
    scores = np.array([value if isinstance(value, float) else np.nan for value in values], float)
    return scores, sum(isinstance(value, _Failure) for value in values)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:60]} … {text[-50:]}"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")
