"""The critic's loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.reductions import as_loss_weights, token_weights, weighted_sum
from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar


def value_loss(
    values: Float[Array, "*shape"],
    returns: Float[Array, "*shape"],
    mask: Mask | None = None,
    *,
    old_values: Float[Array, "*shape"] | None = None,
    cliprange_value: Numeric | None = None,
    weights: Float[Array, "*shape"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes half the squared error of the value predictions, optionally clipped around the old ones.

    $$ \tfrac12 \max\big((V - R)^2,\ (\mathrm{clip}(V, V_{old} - c, V_{old} + c) - R)^2\big) $$

    Args:
        values: $V(s)$, in units of reward.
        returns: What they should be; a constant.
        mask: Nonzero where a prediction counts; all if not given.
        old_values: Predictions at the time of acting, for the clip.
        cliprange_value: Half-width c of the clip, in units of reward; None: no clip.
        weights: Weight of each prediction, made from the whole batch; the mean over the mask if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `loss/value_avg` and `val/clipfrac_avg` (share of predictions whose gradient was clipped).

    Raises:
        ValueError: If `cliprange_value` comes without `old_values`.

    References:
        Schulman et al., 2017, eq. 9. https://arxiv.org/abs/1707.06347 (the clip: OpenAI baselines' ppo2)
    """
    mask = jnp.ones_like(values, bool) if mask is None else jnp.asarray(mask) != 0
    if weights is None:
        weights = token_weights(mask, "token_mean", axis_name=axis_name)
    values, returns = jnp.where(mask, values, 0), jax.lax.stop_gradient(jnp.where(mask, returns, 0))
    errors = (values - returns) ** 2
    clipped = jnp.zeros_like(mask)
    if cliprange_value is not None:
        if old_values is None:
            raise ValueError("cliprange_value needs old_values, the predictions made at the time of acting.")
        old_values = jax.lax.stop_gradient(jnp.where(mask, old_values, 0))
        near = jnp.clip(values, old_values - cliprange_value, old_values + cliprange_value)
        clipped = (near - returns) ** 2 > errors
        errors = jnp.maximum(errors, (near - returns) ** 2)
    weights = as_loss_weights(weights).value
    loss = 0.5 * weighted_sum(errors, weights)
    metrics = {"loss/value_avg": loss, "val/clipfrac_avg": weighted_sum(clipped, weights)}
    return loss, jax.lax.stop_gradient(metrics)
