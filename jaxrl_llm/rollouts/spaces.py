"""What an environment shows and takes, as arrays: features of an observation, the number of actions, their bounds."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Actions(NamedTuple):
    """What actions an environment takes.

    Attributes:
        size: How many there are to choose from, or the dimensions of a continuous one.
        continuous: Whether an action is a vector of numbers.
    """

    size: int
    continuous: bool


def actions_of(env: Any, env_params: Any) -> Actions:
    """Reads the action space of a gymnax environment.

    Raises:
        ValueError: If it is neither a Discrete nor a Box of one axis.
    """
    from gymnax.environments import spaces

    space = env.action_space(env_params)
    if isinstance(space, spaces.Discrete):
        return Actions(space.n, continuous=False)
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return Actions(space.shape[0], continuous=True)
    raise ValueError(
        f"env must take one of n actions (Discrete) or a vector of numbers (a Box of one axis), got {env.name} with {space}. "
        "Wrap the environment so that its actions are one of these."
    )


def clip_action(env: Any, env_params: Any, action: Array) -> Array:
    """Brings continuous actions, [..., size], into the range of the environment; leaves discrete ones as they are."""
    if not actions_of(env, env_params).continuous:
        return action
    space = env.action_space(env_params)
    low, high = (jnp.broadcast_to(jnp.asarray(bound, action.dtype), action.shape) for bound in (space.low, space.high))
    return jnp.clip(action, low, high)


def observation_encoder(env: Any, env_params: Any) -> tuple[Callable[[Any], Array], int]:
    """Makes `encode(observations) -> [..., size]`, numbers that a network reads, and tells the size.

    Arrays are flattened, categories are one-hot, trees are joined leaf by leaf.

    Args:
        env: A gymnax environment.
        env_params: Its parameters.

    Raises:
        ValueError: If the observation holds something else.

    Example:
        >>> from jaxrl_llm.rollouts import make_environment
        >>> encode, size = observation_encoder(*make_environment("FrozenLake-misc"))
        >>> size, encode(jnp.array([3, 15])).argmax(1).tolist()
        (16, [3, 15])
    """
    from gymnax.environments import spaces

    def of(space: Any) -> tuple[Callable[[Any], Array], int]:
        if isinstance(space, spaces.Discrete):
            return lambda observation: jax.nn.one_hot(observation, space.n), space.n
        if isinstance(space, spaces.Box):
            return lambda observation: _flat(observation, len(space.shape)), math.prod(space.shape)
        parts = getattr(space, "spaces", None)
        if parts is None:
            raise ValueError(
                f"env must observe arrays (Box), categories (Discrete) or a tree of them, got {env.name} with {space}. "
                "Wrap the environment so that it does."
            )
        keys = list(parts) if isinstance(parts, dict) else range(len(parts))
        encoders = {key: of(parts[key]) for key in keys}
        joined = sum(size for _, size in encoders.values())
        return lambda tree: jnp.concatenate(
            [encode(_part(tree, key)) for key, (encode, _) in encoders.items()], -1
        ), joined

    return of(env.observation_space(env_params))


def _part(tree: Any, key: Any) -> Any:
    """Takes a part of a mapping, a tuple, or a struct, whose parts are attributes."""
    return getattr(tree, key) if isinstance(key, str) and not isinstance(tree, Mapping) else tree[key]


def _flat(observation: Array, rank: int) -> Array:
    batch = observation.shape[: observation.ndim - rank]
    return observation.reshape(*batch, -1).astype(jnp.promote_types(observation.dtype, jnp.float32))
