"""Running means and variances: of observations, and of returns, by whose deviation rewards are divided.

Statistics are those of all rollouts BEFORE the present one, and are brought up to date after the update: within an update
they do not move, so the probability ratio is exactly one where learning starts. (Gymnasium's wrappers move them at every step.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.types import Mask, Numeric

CLIP = 10.0
"""Largest normalised observation and reward, as in OpenAI's baselines. While nothing has been seen, nothing is clipped."""


class Moments(NamedTuple):
    """Mean and variance of all that was seen.

    Attributes:
        count: How much that was; 0 at the start, when mean is 0 and variance 1.
        mean: Of each feature.
        variance: Of each feature (population).
    """

    count: Float[Array, ""]
    mean: Float[Array, " features"]
    variance: Float[Array, " features"]


class RewardScale(NamedTuple):
    """What rewards are divided by.

    Attributes:
        returns: Discounted sum of each environment's past rewards in this episode.
        moments: Of these sums, one feature.
    """

    returns: Float[Array, " envs"]
    moments: Moments


class Normalizers(NamedTuple):
    """What is normalised; None for what is not."""

    observations: Moments | None = None
    rewards: RewardScale | None = None


def init_moments(size: int) -> Moments:
    """Makes the moments of nothing, which change nothing."""
    return Moments(jnp.zeros(()), jnp.zeros(size), jnp.ones(size))


def update_moments(moments: Moments, values: Float[Array, "... features"], mask: Mask | None = None) -> Moments:
    """Adds values to what was seen (Chan et al., 1979).

    Args:
        moments: Of what was seen before.
        values: What is new.
        mask: Nonzero where it counts; all if not given.
    """
    counts = jnp.ones(values.shape[:-1]) if mask is None else (jnp.asarray(mask) != 0).astype(jnp.float32)
    axes = tuple(range(values.ndim - 1))
    new = jnp.maximum(counts.sum(), 1)
    mean = jnp.sum(values * counts[..., None], axes) / new
    spread = jnp.sum((values - jnp.expand_dims(mean, axes)) ** 2 * counts[..., None], axes)
    total = moments.count + counts.sum()
    difference = mean - moments.mean
    share = counts.sum() / jnp.maximum(total, 1)
    squares = moments.variance * moments.count + spread + difference**2 * moments.count * share
    variance = jnp.where(total > 0, squares / jnp.maximum(total, 1), moments.variance)
    return Moments(total, moments.mean + difference * share, variance)


def normalize(moments: Moments | None, values: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
    """Computes (x − mean) / standard deviation, within ±10; leaves values as they are without moments."""
    if moments is None:
        return values
    axes = tuple(range(values.ndim - 1))
    mean, variance = (jnp.expand_dims(x, axes) for x in (moments.mean, moments.variance))
    scaled = jnp.clip((values - mean) * jax.lax.rsqrt(variance + 1e-8), -CLIP, CLIP)
    return jnp.where(moments.count > 0, scaled, values)


def scale_rewards(
    scale: RewardScale, rewards: Float[Array, "time envs"], done: Bool[Array, "time envs"], *, gamma: Numeric
) -> tuple[Float[Array, "time envs"], RewardScale]:
    r"""Divides rewards by the standard deviation of discounted returns, within ±10; their mean is left.

    The sum $R_t = \gamma R_{t-1} + r_t$ starts anew after the end of an episode.

    Args:
        scale: Of the rollouts before.
        rewards: Of this one.
        done: Steps at which an episode ended.
        gamma: Discount.

    Returns:
        The scaled rewards, and the scale for the next rollout.
    """

    def step(returns: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, ended = now
        returns = gamma * returns + reward
        return jnp.where(ended, 0, returns), returns

    carried, returns = jax.lax.scan(step, scale.returns, (rewards, done))
    moments = update_moments(scale.moments, returns[..., None])
    scaled = jnp.clip(rewards * jax.lax.rsqrt(scale.moments.variance[0] + 1e-8), -CLIP, CLIP)
    return jnp.where(scale.moments.count > 0, scaled, rewards), RewardScale(carried, moments)
