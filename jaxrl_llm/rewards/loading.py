"""Finds a reward function by the name that a command line gives."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any


def load_reward(name: str) -> Any:
    """Imports a reward function.

    Args:
        name: "package.module:function", or "path/to/file.py:function" for a file that need not be importable.

    Returns:
        The function (`scoring.Reward`). The module that holds it is executed: load only code that you trust.

    Raises:
        ValueError: If the name has another form, there is no such module, file or function, or it cannot be called.

    Example:
        >>> load_reward("jaxrl_llm.rewards:exact_match")([""], ["12"], answer=["12"])
        [1.0]
    """
    place, colon, function_name = name.rpartition(":")
    if not (place and colon and function_name):
        raise ValueError(f'A reward is named "package.module:function" or "path/file.py:function", got {name!r}.')
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module_from_name(place)
    function = getattr(module, function_name, None)
    if not callable(function):
        state = "is missing" if function is None else f"is a {type(function).__name__}, not a function"
        raise ValueError(f"The reward {name!r} cannot be used: {function_name!r} {state} in {place}.")
    return function


def _module_from_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(
            f"There is no module {name!r} for the reward. Install its package, or name a file: path/file.py:function."
        ) from error


def _module_from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"There is no file {path} for the reward.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
