"""Reward modelling: a scalar for each response, learned from pairs or from ratings."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.reductions import row_weights, weighted_sum
from jaxrl_llm.types import Metrics, Numeric, Scalar


def reward_model_loss(
    chosen: Float[Array, " batch"],
    rejected: Float[Array, " batch"],
    *,
    margin: Float[Array, " batch"] | None = None,
    center_rewards_coefficient: Numeric = 0.0,
    weights: Float[Array, " batch"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the Bradley-Terry loss $-\log\sigma(r_c - r_r - m) + c\,(r_c + r_r)^2$ of pairs of rewards.

    Args:
        chosen: Reward that the model gives to each chosen response.
        rejected: Reward of each rejected response.
        margin: By how much the chosen should win, in units of reward (Llama 2); 0 if not given.
        center_rewards_coefficient: c, which pulls rewards to mean zero (Eisenstein et al., 2023); typical 0.01.
        weights: Weight of each pair, made from the whole batch; the mean if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `accuracy`, `margin`, `mean_reward`, `min_reward`, `max_reward` over both responses of
        the pairs that count.

    References:
        Ouyang et al., 2022, eq. 1. https://arxiv.org/abs/2203.02155; Touvron et al., 2023, eq. 2.
        https://arxiv.org/abs/2307.09288; Eisenstein et al., 2023. https://arxiv.org/abs/2312.09244
    """
    if weights is None:
        weights = row_weights(chosen, axis_name=axis_name)
    counts = weights != 0
    difference, total = jnp.where(counts, chosen - rejected, 0), jnp.where(counts, chosen + rejected, 0)
    losses = -jax.nn.log_sigmoid(difference if margin is None else difference - jnp.where(counts, margin, 0))
    losses = losses + center_rewards_coefficient * total**2
    smallest, largest = jnp.minimum(chosen, rejected), jnp.maximum(chosen, rejected)
    metrics = {
        "accuracy": weighted_sum(difference > 0, weights),
        "margin": weighted_sum(difference, weights),
        "mean_reward": weighted_sum(total / 2, weights),
        "min_reward": jnp.min(smallest, where=counts, initial=jnp.inf),
        "max_reward": jnp.max(largest, where=counts, initial=-jnp.inf),
    }
    return weighted_sum(losses, weights), jax.lax.stop_gradient(metrics)


def reward_regression_loss(
    rewards: Float[Array, " batch"],
    scores: Float[Array, " batch"],
    *,
    weights: Float[Array, " batch"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    """Computes the squared error (r - s)² of rewards that shall equal ratings.

    Args:
        rewards: Reward that the model gives to each text.
        scores: Rating of each text, a constant, in units of reward.
        weights: Weight of each text, made from the whole batch; the mean if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `mse`, `mae` (mean absolute error), `mean_reward`, `min_reward` and `max_reward` over the
        texts that count.
    """
    if weights is None:
        weights = row_weights(rewards, axis_name=axis_name)
    counts = weights != 0
    error = jnp.where(counts, rewards - jax.lax.stop_gradient(scores), 0)
    loss = weighted_sum(error**2, weights)
    metrics = {
        "mse": loss,
        "mae": weighted_sum(jnp.abs(error), weights),
        "mean_reward": weighted_sum(rewards, weights),
        "min_reward": jnp.min(rewards, where=counts, initial=jnp.inf),
        "max_reward": jnp.max(rewards, where=counts, initial=-jnp.inf),
    }
    return loss, jax.lax.stop_gradient(metrics)
