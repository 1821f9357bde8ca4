"""Finds a reward function by the name that a command line gives, and sets its options."""

import ast
import difflib
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

LIBRARY = "jaxrl_llm.rewards"
FORMS = 'a reward is named "short_name", "package.module:function" or "path/file.py:function", with options "name(x=1)"'
CALL = re.compile(r"(?P<name>(?:.*?:)?[A-Za-z_]\w*)\((?P<options>.*)\)", re.DOTALL)


def makes_reward(factory: F) -> F:
    """Marks a function that takes options, all by keyword, and returns a reward function.

    `load_reward` calls what is marked even where the name gives no options. A function without the mark is called where
    there are parentheses alone.

    Example:
        >>> @makes_reward
        ... def longer_than(*, length=3):
        ...     return lambda completions, **columns: [float(len(text) > length) for text in completions]
    """
    factory.makes_reward = True  # pyright: ignore[reportFunctionMemberAccess]
    return factory


def load_reward(name: str) -> Any:
    """Imports a reward function and sets its options.

    Args:
        name: "short_name" for a reward of `jaxrl_llm.rewards`, "package.module:function", or "path/to/file.py:function"
            for a file that need not be importable. Options follow in parentheses, as Python literals by keyword; the
            function is then one that takes them and returns a reward. Quote the parentheses from the shell.

    Returns:
        The function (`scoring.Reward`). The module that holds it is executed: load only code that you trust.

    Raises:
        ValueError: If the name has another form, there is no such module, file or function, it cannot be called, or the
            options do not fit.

    Example:
        >>> load_reward("exact_match")([""], ["12"], answer=["12"])
        [1.0]
        >>> load_reward("soft_overlong(max_completion_length=100, cache=20)")(completion_ids=[[1] * 90])
        [-0.5]
    """
    call = CALL.fullmatch(name.strip())
    plain, options = (call["name"], parse_options(call["options"], name)) if call else (name.strip(), None)
    function = _find(plain, name)
    if options is None and not getattr(function, "makes_reward", False):
        return function
    return _made(function, options or {}, name)


def parse_options(text: str, name: str) -> dict[str, Any]:
    """Reads "x=1, y='a'" without running it.

    Args:
        text: What stands between the parentheses.
        name: The whole name, for messages.

    Raises:
        ValueError: If it is anything but keywords with literals.

    Example:
        >>> parse_options("cache=20, tags=('a', 'b')", "…")
        {'cache': 20, 'tags': ('a', 'b')}
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError("options are given by keyword")
        return {_keyword(k): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"The options of {name!r} cannot be read ({error}). Write keywords with numbers, quoted strings, lists or "
            "tuples, such as name(length=256, tags=('think', 'answer'))."
        ) from error


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("** is not an option")
    return keyword.arg


def _find(plain: str, name: str) -> Any:
    place, colon, function_name = plain.rpartition(":")
    if not colon and function_name.isidentifier():
        return _short(function_name)
    if not (place and function_name):
        raise ValueError(f"{FORMS[0].upper()}{FORMS[1:]}; got {name!r}.")
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module_from_name(place)
    function = getattr(module, function_name, None)
    if not callable(function):
        state = "is missing" if function is None else f"is a {type(function).__name__}, not a function"
        raise ValueError(f"The reward {name!r} cannot be used: {function_name!r} {state} in {place}.")
    return function


def _short(name: str) -> Any:
    library = importlib.import_module(LIBRARY)
    if name in library.SHORT_NAMES:
        return getattr(library, name)
    nearest = difflib.get_close_matches(name, library.SHORT_NAMES, n=1, cutoff=0.5)
    meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"There is no reward {name!r}.{meant} Ours are {', '.join(library.SHORT_NAMES)}; else {FORMS}.")


def _made(factory: Callable[..., Any], options: dict[str, Any], name: str) -> Any:
    try:
        reward = factory(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The reward {name!r} cannot be made: {error}. In parentheses stand the options of a function that returns a "
            "reward function."
        ) from error
    if not callable(reward):
        raise ValueError(
            f"{name!r} gave a {type(reward).__name__}; expected a function that returns a reward function."
        )
    return reward


def _module_from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"There is no file {path} for the reward.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module_from_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(
            f"There is no module {name!r} for the reward. Install its package, or name a file: path/file.py:function."
        ) from error
