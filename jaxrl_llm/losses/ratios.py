"""Importance ratios, shared by the losses that learn from samples of an older policy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.types import Mask, Numeric

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within ±20 nats: exp(20) is 5e8, and an overflow would turn a clipped term's gradient to NaN."""


def log_importance_ratio(
    log_probs: Float[Array, "*shape"], old_log_probs: Float[Array, "*shape"] | None, mask: Mask
) -> Float[Array, "*shape"]:
    """Computes log π(a) − log π_old(a), 0 where masked; with no old policy the ratio is one, and has its gradient."""
    if old_log_probs is None:
        old_log_probs = log_probs
    difference = log_probs - jax.lax.stop_gradient(old_log_probs)
    return jnp.clip(jnp.where(mask != 0, difference, 0), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def per_token(advantages: Float[Array, "*any"], like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Gives every token of a row the advantage of its row, if advantages are per row; as constants.

    Raises:
        ValueError: If the shape is neither that of the tokens nor that of the rows.
    """
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages))
    if advantages.shape == like.shape:
        return advantages
    if advantages.shape == like.shape[:-1]:
        return jnp.broadcast_to(advantages[..., None], like.shape)
    raise ValueError(
        f"advantages must have shape {like.shape} (one for each token) or {like.shape[:-1]} (one for each row), got "
        f"{advantages.shape}."
    )


def outside_clip(
    ratio: Float[Array, "*shape"], advantages: Float[Array, "*shape"], low: Numeric, high: Numeric
) -> tuple[Bool[Array, "*shape"], Bool[Array, "*shape"]]:
    """Tells which terms the clip [low, high] deprives of their gradient, below and above."""
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def clipped_surrogate(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    low: Numeric,
    high: Numeric,
    max_ratio: Numeric | None = None,
) -> Float[Array, "*shape"]:
    r"""Computes $-\min(\min(r, \delta) A, \mathrm{clip}(r, low, high) A)$ for each term.

    The minimum is pessimistic: the gradient vanishes only where the ratio has already moved past the clip in the
    direction that the advantage asks for. δ (`max_ratio`) bounds what remains: a large ratio with A < 0.
    """
    unclipped = ratio if max_ratio is None else jnp.minimum(ratio, max_ratio)
    return -jnp.minimum(unclipped * advantages, jnp.clip(ratio, low, high) * advantages)
