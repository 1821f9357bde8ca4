"""The loss of Q-learning with a function: DQN and double DQN."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.reductions import row_weights, weighted_sum
from jaxrl_llm.types import Metrics, Numeric, Scalar


def q_learning_loss(
    q_values: Float[Array, "batch actions"],
    actions: Int[Array, " batch"],
    rewards: Float[Array, " batch"],
    discounts: Float[Array, " batch"],
    next_q_values: Float[Array, "batch actions"],
    *,
    next_q_online: Float[Array, "batch actions"] | None = None,
    huber_delta: Numeric | None = None,
    weights: Float[Array, " batch"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes half the squared error of $Q(s, a)$ against $r + \gamma \max_{a'} Q_{target}(s', a')$.

    Double DQN takes the target network's value of the action that the online network prefers.

    Args:
        q_values: Of the online network, in the states acted in.
        actions: What was done.
        rewards: What it paid; over n steps, their discounted sum.
        discounts: Of the value that follows: $\gamma^n$, and 0 where the episode TERMINATED. A time limit is no reason for 0.
        next_q_values: Of the target network, in the states reached (before any reset); a constant.
        next_q_online: Of the online network there, for double DQN; a constant.
        huber_delta: Error beyond which the loss grows linearly (Huber); None: squares all the way.
        weights: Weight of each row, made from the whole batch; the mean if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `loss/td_avg` (mean absolute error) and `val/q_avg` (mean of the predictions).

    References:
        Mnih et al., 2015. https://doi.org/10.1038/nature14236; van Hasselt et al., 2016. https://arxiv.org/abs/1509.06461

    Example:
        >>> q, target = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
        >>> loss, _ = q_learning_loss(q, jnp.array([1]), jnp.array([1.0]), jnp.array([0.5]), target)
        >>> float(loss)  # (2 - (1 + 0.5 * 4))² / 2
        0.5
    """
    weights = row_weights(rewards, axis_name=axis_name) if weights is None else weights
    counts = weights != 0
    chosen = jnp.argmax(next_q_values if next_q_online is None else next_q_online, axis=1)
    future = jnp.where(discounts > 0, _take(next_q_values, chosen), 0)  # what comes after the end may be anything
    target = jax.lax.stop_gradient(rewards + discounts * future)
    predicted = _take(jnp.where(counts[:, None], q_values, 0), actions)
    error = jnp.where(counts, predicted - target, 0)
    squares = error**2 / 2
    if huber_delta is not None:
        beyond = huber_delta * (jnp.abs(error) - huber_delta / 2)
        squares = jnp.where(jnp.abs(error) <= huber_delta, squares, beyond)
    metrics = {"loss/td_avg": weighted_sum(jnp.abs(error), weights), "val/q_avg": weighted_sum(predicted, weights)}
    return weighted_sum(squares, weights), jax.lax.stop_gradient(metrics)


def _take(values: Array, actions: Array) -> Array:
    return jnp.take_along_axis(values, actions[:, None], axis=1)[:, 0]
