"""Checkpoints: save a training state, find the newest, restore it bit for bit.

A checkpoint is a folder `<folder>/<step>`, written by Orbax under a temporary name and renamed when it is complete,
so that a process killed in the middle of a save leaves the older checkpoints usable and never a broken one that looks
whole.

    save(folder, step, state, extra={"config": logger.config})
    step, state, extra = restore(folder, like=state, config=dataclasses.asdict(config))

The state is any pytree (a `TrainState`, an optimizer state, dicts, lists). Leaves are stored by their path, so what
comes back has the containers of `like`. Typed PRNG keys are stored as their key data, and come back as keys of the
same implementation; Python numbers come back as Python numbers.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.training.logging import config_differences

_DISCARDED = "discarded"  # A checkpoint is moved here, in one rename, before its files are deleted one by one.


class Checkpoint(NamedTuple):
    """What `restore` returns."""

    step: int
    state: Any
    """The pytree, with the structure of `like`."""
    extra: dict[str, Any]
    """The JSON values given to `save`."""


def save(
    folder: str | os.PathLike,
    step: int,
    state: Any,
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> None:
    """Writes a checkpoint, returns when it is complete, and deletes all but the newest `keep`.

    Checkpoints of this step or a later one, left by a run that was restarted from further back, are deleted first: they
    belong to a history that no longer leads here.

    Args:
        folder: The folder of all checkpoints of one run; it is made if need be.
        step: Number of finished training steps, from 0.
        state: Any pytree of arrays, typed PRNG keys and Python numbers.
        extra: Small JSON values to keep beside the state: the data position, the Config under the name `config`.
        keep: How many checkpoints to leave, at least 1. With 2, a damaged newest one still leaves one to return to.

    Raises:
        ValueError: `step` or `keep` is out of range, or two leaves have one path.
        TypeError: A leaf is neither an array nor a number, or `extra` is not JSON.
    """
    import orbax.checkpoint as ocp

    if step < 0 or keep < 1:
        raise ValueError(f"step must be at least 0 and keep at least 1, got step={step} and keep={keep}.")
    leaves = _leaves_by_path(state)
    notes = {
        "leaves": {path: _describe(path, leaf) for path, leaf in leaves.items()},
        "key_impls": {path: jax.random.key_impl(leaf) for path, leaf in leaves.items() if _is_key(leaf)},
        "extra": _json(extra),
    }
    arrays = {path: _to_array(leaf) for path, leaf in leaves.items() if np.size(leaf)}
    items: dict[str, Any] = {"notes": ocp.args.JsonSave(notes)}
    if arrays:  # Orbax refuses an empty tree.
        items["state"] = ocp.args.StandardSave(arrays)
    folder = Path(folder).absolute()
    _clean(folder)
    options = {"max_to_keep": keep, "todelete_subdir": _DISCARDED, "cleanup_tmp_directories": True}
    with _manager(folder, **options) as manager:
        for abandoned in [old for old in manager.all_steps() if old >= step]:
            manager.delete(abandoned)
        manager.save(step, args=ocp.args.Composite(**items), force=True)
    _clean(folder)


def _clean(folder: Path) -> None:
    """Deletes what was discarded; the first of several processes does it."""
    if jax.process_index() == 0:
        shutil.rmtree(folder / _DISCARDED, ignore_errors=True)


def latest_step(folder: str | os.PathLike) -> int | None:
    """Returns the step of the newest complete checkpoint in `folder`, or None where there is none."""
    return max(_steps(Path(folder)), default=None)


def restore(
    folder: str | os.PathLike,
    like: Any,
    *,
    step: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Reads a checkpoint back, bit for bit.

    Args:
        folder: The folder given to `save`.
        like: A pytree with the structure, shapes and dtypes of the saved state: the freshly initialized state, or the
            `jax.ShapeDtypeStruct`s that `jax.eval_shape` gives. A leaf that is committed to devices or has a sharding
            is restored with that sharding, which may be another than at the save.
        step: Which checkpoint; None takes the newest.
        config: The options of this run. Where the state does not fit, the error compares them with `extra["config"]`.

    Returns:
        `Checkpoint(step, state, extra)`.

    Raises:
        FileNotFoundError: There is no checkpoint, or not that one.
        ValueError: The saved state has other leaves, shapes or dtypes than `like`.
    """
    import orbax.checkpoint as ocp

    step = _existing_step(Path(folder), step)
    leaves = _leaves_by_path(like)
    with _manager(Path(folder).absolute()) as manager:
        notes = manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore())).notes
        expected = {path: _describe(path, leaf) for path, leaf in leaves.items()}
        if notes["leaves"] != expected:
            raise ValueError(_mismatch(Path(folder) / str(step), notes, expected, config))
        targets = {path: _target(leaf) for path, leaf in leaves.items() if np.size(leaf)}
        arrays = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items() if not np.size(leaf)}
        if targets:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
            arrays |= manager.restore(step, args=args).state
    for path, impl in notes["key_impls"].items():
        arrays[path] = jax.random.wrap_key_data(jnp.asarray(arrays[path]), impl=impl)
    values = [_from_array(leaf, arrays[path]) for path, leaf in leaves.items()]
    return Checkpoint(step, jax.tree.unflatten(jax.tree.structure(like), values), notes["extra"])


def _manager(folder: Path, **options: Any):
    """Opens Orbax's manager of a folder, with saves that return when they are complete."""
    import orbax.checkpoint as ocp

    settings = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    return ocp.CheckpointManager(folder, options=settings)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    with _manager(folder.absolute()) as manager:
        return sorted(manager.all_steps())


def _existing_step(folder: Path, step: int | None) -> int:
    steps = _steps(folder)
    if not steps:
        raise FileNotFoundError(f"There is no checkpoint in {folder}: start this run without resuming.")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"There is no checkpoint of step {step} in {folder}: choose one of {steps}.")
    return steps[-1] if step is None else step


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(by_path) < len(leaves):
        raise ValueError("state has two leaves of the same path: rename the keys that contain '/' or mix 1 and '1'.")
    return by_path


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(path: str, leaf: Any) -> str:
    """Returns dtype and shape, as in `float32[4, 128]`, or the type of a Python number."""
    if isinstance(leaf, bool | int | float):
        return type(leaf).__name__
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic) and leaf.dtype != object:
        return f"{leaf.dtype}{list(leaf.shape)}"
    raise TypeError(
        f"A checkpoint holds arrays, typed keys and numbers, but {path!r} is a {type(leaf).__name__}: "
        "keep text and settings in `extra`."
    )


def _json(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(extra or {})))
    except TypeError as error:
        raise TypeError(f"extra must hold JSON values (numbers, text, lists, dicts) alone: {error}.") from error


def _to_array(leaf: Any) -> jax.Array | np.ndarray:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Returns where a leaf must be placed, or None where jax is free to move it."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _target(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """Returns what Orbax is asked for: a placed array, or a numpy array for keys and all that has no fixed place."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif (sharding := _sharding(leaf)) is not None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.asarray(leaf) if isinstance(leaf, bool | int | float) else np.empty(leaf.shape, leaf.dtype)


def _from_array(leaf: Any, value: Any) -> Any:
    if isinstance(leaf, bool | int | float):
        return type(leaf)(value)
    if isinstance(leaf, np.ndarray | np.generic):
        return value if isinstance(leaf, np.ndarray) else value[()]
    if not isinstance(value, jax.Array):
        value = jnp.array(value)
    # Without a sharding it stays uncommitted: a committed array cannot meet arrays that are spread over devices.
    return value if _sharding(leaf) is None else jax.device_put(value, _sharding(leaf))


def _mismatch(
    checkpoint: Path, notes: dict[str, Any], expected: dict[str, str], config: Mapping[str, Any] | None
) -> str:
    saved = notes["leaves"]
    paths = [path for path in {**saved, **expected} if saved.get(path) != expected.get(path)]
    lines = [f"The checkpoint {checkpoint} does not fit the state of this run:"]
    lines += [f"  {p}: saved {saved.get(p, 'nothing')}, expected {expected.get(p, 'nothing')}" for p in paths[:8]]
    lines += [f"  and {len(paths) - 8} more"] if len(paths) > 8 else []
    if config is not None and (changed := config_differences(notes["extra"].get("config", {}), config)):
        lines += ["Options that changed:", *(f"  {line}" for line in changed)]
    return "\n".join([*lines, "Use the options of the saved run, or start a new run in another folder."])
