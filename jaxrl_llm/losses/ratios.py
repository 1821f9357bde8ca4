"""Importance ratios, shared by the losses that learn from samples of an older policy."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.types import Mask, Numeric

ImportanceSamplingLevel: TypeAlias = Literal["token", "sequence", "sequence_token"]

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


def row_mean(values: Float[Array, "*batch time"], mask: Mask) -> Float[Array, "*batch 1"]:
    """Computes the mean of each row over its unmasked tokens, kept as a column; 0 for an empty row."""
    total = jnp.where(mask != 0, values, 0).sum(-1, keepdims=True)
    return total / jnp.maximum((mask != 0).sum(-1, keepdims=True), 1)


def at_level(
    log_ratio: Float[Array, "batch time"], mask: Mask, level: ImportanceSamplingLevel
) -> Float[Array, "batch time"]:
    r"""Gives every token the log-ratio of its level, 0 where masked.

    With $s$ the mean of the log-ratios $\ell_t$ of a row and sg the stop of gradients: `token` $\ell_t$ · `sequence`
    (GSPO) $s$ · `sequence_token` (GSPO-token) $\mathrm{sg}(s) + \ell_t - \mathrm{sg}(\ell_t)$: the value of a sequence
    with a gradient of its own for each token, for advantages that differ within a row.

    Raises:
        ValueError: If `level` is none of these.

    References:
        Zheng et al., 2025, eq. 7 and 14. https://arxiv.org/abs/2507.18071
    """
    if level == "token":
        return log_ratio
    if level == "sequence":
        return jnp.where(mask != 0, row_mean(log_ratio, mask), 0)
    if level == "sequence_token":
        held = jax.lax.stop_gradient(log_ratio)
        return jnp.where(mask != 0, row_mean(held, mask) + log_ratio - held, 0)
    raise ValueError(f"importance_sampling_level must be one of {get_args(ImportanceSamplingLevel)}, got {level!r}.")


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
