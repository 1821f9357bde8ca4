"""Finds an environment by its name or its place, and changes its parameters."""

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax


@functools.cache
def make_environment(name: str, parameters: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Looks up a gymnax environment; the same arguments give the same object.

    An environment is a static argument of compiled functions and is compared by identity: a second instance would
    compile everything again.

    Args:
        name: One of `gymnax.registered_envs`, which `gymnax.register` extends; or "package.module:Name" or
            "path/to/file.py:Name" of a class or function without arguments that makes a gymnax environment. Such a file is
            executed: name only code that you trust.
        parameters: Changes of its default parameters, "name=value" each.

    Returns:
        The environment, and its parameters.

    Raises:
        ValueError: If there is no such environment or parameter; the message suggests the nearest names.

    Example:
        >>> env, env_params = make_environment("CartPole-v1", ("max_steps_in_episode=200",))
        >>> env_params.max_steps_in_episode
        200
    """
    import gymnax  # brings plotting libraries along, which sampling text should not wait for

    if ":" not in name and name not in gymnax.registered_envs:
        raise ValueError(
            f"env must be a gymnax environment or module:Name, got {name!r}. {_nearest(name, gymnax.registered_envs)}All "
            f"names: {', '.join(gymnax.registered_envs)}."
        )
    with jax.ensure_compile_time_eval():  # It may be made while a function is traced, and looks at arrays of its own.
        env = _make_imported(name) if ":" in name else _make_registered(name)
        env_params = env.default_params
    return env, _changed(env_params, parameters, name)


def _make_registered(name: str) -> Any:
    """Makes one of gymnax's environments.

    Raises:
        ValueError: If it cannot be made here; one of them downloads its data.
    """
    import gymnax

    try:
        return gymnax.make(name)[0]
    except OSError as error:
        raise ValueError(f"env must be an environment that can be made here, got {name!r}, and: {error}.") from error


def _make_imported(place: str) -> Any:
    """Imports and calls what "module:Name" or "file.py:Name" says.

    Raises:
        ValueError: If it is not there, or makes no environment.
    """
    made = _import(place)
    try:
        env = made()
    except TypeError as error:
        meant = "a class or function without arguments that makes a gymnax environment"
        raise ValueError(f"env must be {meant}, got {place!r}, and: {error}.") from error
    if not hasattr(env, "default_params"):
        raise ValueError(f"env must make a gymnax environment, got {place!r}, which makes {type(env).__name__}.")
    return env


def _import(place: str) -> Callable[[], Any]:
    """Imports what "module:Name" or "file.py:Name" says.

    Raises:
        ValueError: If it is not there.
    """
    module_name, _, name = place.rpartition(":")
    try:
        module = _import_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    # No name at all is a ValueError, a relative one a TypeError.
    except (ImportError, FileNotFoundError, TypeError, ValueError) as error:
        raise ValueError(f"env must be a gymnax environment or module:Name, got {place!r}, and: {error}.") from error
    if not hasattr(module, name):
        raise ValueError(f"env must be a gymnax environment or module:Name, got {place!r}: {name} is not there.")
    return getattr(module, name)


def _import_file(path: str) -> ModuleType:
    """Executes a file as a module of its own."""
    name = f"jaxrl_llm_environment_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def _changed(env_params: Any, parameters: tuple[str, ...], env: str) -> Any:
    """Changes some of an environment's parameters."""
    known = {field.name: getattr(env_params, field.name) for field in dataclasses.fields(env_params)}
    changes = {}
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name in changes:
            raise ValueError(f"env_params must name each parameter once, got {name} twice.")
        if name not in known:
            raise ValueError(
                f"env_params must be parameters of {env}, got {parameter!r}. {_nearest(name, known)}All names: "
                f"{', '.join(known)}."
            )
        try:
            literal = ast.literal_eval(value)
            changes[name] = type(known[name])(literal)
            if changes[name] != literal:
                raise ValueError("another kind of number")
        except (ValueError, SyntaxError, TypeError) as error:
            kind = type(known[name]).__name__
            raise ValueError(
                f"env_params must be name=value with a value like {known[name]!r} ({kind}), got {parameter!r}."
            ) from error
    return env_params.replace(**changes)


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(nearest)}? " if nearest else ""
