"""A replay buffer in arrays, and the n-step transitions that go into it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped

from jaxrl_llm.rollouts.environment import Transition
from jaxrl_llm.types import Key, Numeric


class Experience(NamedTuple):
    """What off-policy learning keeps of a step, `[rows]` or one of it.

    Attributes:
        observation: What was seen.
        action: What was done.
        reward: Discounted sum of the rewards of the steps that followed.
        discount: Of the value that comes after them: 0 where the episode terminated.
        next_observation: The state they led to, before any reset.
    """

    observation: PyTree[Shaped[Array, "..."]]
    action: Shaped[Array, "..."]
    reward: Float[Array, "..."]
    discount: Float[Array, "..."]
    next_observation: PyTree[Shaped[Array, "..."]]


class ReplayBuffer(NamedTuple):
    """The last `capacity` rows.

    Attributes:
        rows: Arrays `[capacity, …]`.
        position: Where the next row goes.
        size: Rows that are filled.
    """

    rows: Any
    position: Int[Array, ""]
    size: Int[Array, ""]


def n_step_experience(transitions: Transition, *, gamma: Numeric, n: int = 1) -> Experience:
    r"""Makes $(s_t, a_t, \sum_{k<m} \gamma^k r_{t+k}, \gamma^m, s_{t+m})$ of each step, as rows.

    There are $m \le n$ steps: an episode that ends cuts them short, and so does the end of the rollout. Where it TERMINATED
    the discount is 0; where a time limit cut it, it is $\gamma^m$ and $s_{t+m}$ the state that it had reached.

    Args:
        transitions: A rollout, `[time, envs]`.
        gamma: Discount, in [0, 1].
        n: Most steps that are summed.
    """
    time = transitions.reward.shape[0]
    done = transitions.terminated | transitions.truncated
    steps = jnp.arange(time)
    running = jnp.ones(transitions.reward.shape, bool)
    reward, last, count = (
        jnp.zeros(transitions.reward.shape),
        jnp.zeros(running.shape, jnp.int32),
        jnp.zeros(running.shape),
    )
    for k in range(n):
        index = jnp.minimum(steps + k, time - 1)
        running &= (steps + k < time)[:, None]
        reward += jnp.where(running, gamma**k * transitions.reward[index], 0)
        last = jnp.where(running, index[:, None], last)
        count += running
        running &= ~done[index]

    def at_last(x: Array) -> Array:
        return jnp.take_along_axis(x, jnp.expand_dims(last, tuple(range(2, x.ndim))), axis=0)

    discount = jnp.where(at_last(transitions.terminated), 0.0, jnp.asarray(gamma) ** count)
    next_observation = jax.tree.map(at_last, transitions.final_observation)
    experience = Experience(transitions.observation, transitions.action, reward, discount, next_observation)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), experience)


def init_buffer(rows: Any, capacity: int) -> ReplayBuffer:
    """Makes an empty buffer for rows like these, `[rows, …]`; only their shapes are read."""
    empty = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), rows)
    return ReplayBuffer(empty, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add(buffer: ReplayBuffer, rows: Any) -> ReplayBuffer:
    """Puts rows in, in the place of the oldest once it is full.

    Raises:
        ValueError: If there are more rows than the buffer holds.
    """
    count, capacity = jax.tree.leaves(rows)[0].shape[0], jax.tree.leaves(buffer.rows)[0].shape[0]
    if count > capacity:
        raise ValueError(f"rows must be at most as many as the buffer holds, {capacity}, got {count}.")
    places = (buffer.position + jnp.arange(count)) % capacity
    stored = jax.tree.map(lambda held, new: held.at[places].set(new), buffer.rows, rows)
    return ReplayBuffer(stored, (buffer.position + count) % capacity, jnp.minimum(buffer.size + count, capacity))


def sample(buffer: ReplayBuffer, key: Key, count: int) -> Any:
    """Draws rows at random, each as likely as any other; the same may come twice. The key is consumed."""
    places = jax.random.randint(key, (count,), 0, jnp.maximum(buffer.size, 1))
    return jax.tree.map(lambda held: held[places], buffer.rows)
