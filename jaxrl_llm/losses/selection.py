"""Which tokens and rows a policy learns from, and with what weight: pure functions whose results enter the losses.

Statistics over the batch are taken once, over the whole of it, so that a split batch gives the same loss.
"""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.losses.ratios import MAX_LOG_RATIO, row_mean
from jaxrl_llm.types import Mask, Numeric

CorrectionMode: TypeAlias = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def top_entropy_mask(
    entropy: Float[Array, "batch time"], mask: Mask, quantile: Numeric, *, axis_name: str | None = None
) -> Bool[Array, "batch time"]:
    """Selects the tokens at which the policy was least certain: those with the highest entropy of the batch.

    Args:
        entropy: Entropy of the policy at each token, nats; a constant.
        mask: Nonzero at completion tokens.
        quantile: Share of the tokens to keep, in [0, 1] (`top_entropy_quantile`): 0.2 keeps those at or above the 0.8
            quantile, interpolated between neighbours. 1 keeps all, 0 those with the highest entropy alone.
        axis_name: Mapped axis over whose devices the quantile is taken.

    Returns:
        The mask of the tokens to keep, nowhere outside `mask`.

    References:
        Wang et al., 2025, eq. 6. https://arxiv.org/abs/2506.01939
    """
    mask = jnp.asarray(mask) != 0
    entropy = jax.lax.stop_gradient(entropy)
    ranked = jnp.where(mask, entropy, jnp.inf)
    if axis_name is not None:
        ranked = jax.lax.all_gather(ranked, axis_name)
    ranked = jnp.sort(ranked.reshape(-1))
    last = jnp.maximum((ranked < jnp.inf).sum() - 1, 0)
    position = (1 - quantile) * last
    below = jnp.floor(position).astype(int)
    low, high = ranked[below], ranked[jnp.minimum(below + 1, last)]
    # Not low × (1 − share) + high × share: that rounds equal entropies to a threshold above all of them.
    step = jnp.where(high > low, (position - below) * (high - low), 0)
    return mask & (jnp.where(mask, entropy, 0) >= low + step)


def off_policy_mask(
    log_probs: Float[Array, "batch time"],
    sampling_log_probs: Float[Array, "batch time"],
    advantages: Float[Array, "batch time"],
    mask: Mask,
    threshold: Numeric,
) -> Bool[Array, "batch time"]:
    """Selects what is good or not far: tokens with A ≥ 0, and rows that have not become much less likely.

    Args:
        log_probs: Log-probabilities of the tokens under the policy being trained; constants.
        sampling_log_probs: The same under the policy that sampled. NaN (not known) counts as no difference.
        advantages: Of each token.
        mask: Nonzero at completion tokens.
        threshold: Largest mean of log π_sampling − log π over a row, in nats a token, with which it is kept.

    References:
        DeepSeek-AI, 2025, section 3.1 (DeepSeek-V3.2). https://arxiv.org/abs/2512.02556
    """
    gap = jax.lax.stop_gradient(sampling_log_probs - log_probs)
    return (advantages >= 0) | (row_mean(jnp.where(jnp.isnan(gap), 0, gap), mask) <= threshold)


def importance_correction(
    old_log_probs: Float[Array, "batch time"],
    sampling_log_probs: Float[Array, "batch time"],
    mask: Mask,
    *,
    mode: CorrectionMode = "sequence_mask",
    clip_min: Numeric | None = None,
    clip_max: Numeric | None = 3.0,
) -> Float[Array, "batch #time"]:
    r"""Computes truncated importance weights for a behaviour policy that differs from the one that is scored.

    With $q$ the ratio π_old / π_sampling of a token, or of a whole sequence (a product): `truncate` holds it within the
    bounds, `mask` puts 0 where it lies outside.

    Args:
        old_log_probs: Log-probabilities of the tokens, nats, as the trainer scored them before the update.
        sampling_log_probs: As the sampler recorded them (another engine, precision, or filtered distribution). NaN
            (not known) counts as no difference.
        mask: Nonzero at completion tokens.
        mode: Level and treatment.
        clip_min: Lower bound of the ratio; None for none.
        clip_max: Upper bound of the ratio; None for none.

    Returns:
        Weights for `grpo_loss(correction=…)`: of each token, or one column for sequences; constants. 1 where masked.

    Raises:
        ValueError: If `mode` is unknown, or no bound is given to truncate at.

    References:
        Yao et al., 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncation).
        https://fengyao.notion.site/off-policy-rl; Ionides, 2008 (truncated importance sampling).
    """
    if mode not in get_args(CorrectionMode):
        raise ValueError(f"mode must be one of {get_args(CorrectionMode)}, got {mode!r}.")
    level, treatment = mode.split("_")
    if treatment == "truncate" and clip_min is None and clip_max is None:
        raise ValueError(f"mode={mode!r} needs clip_min or clip_max, the bounds to truncate at; got neither.")
    gap = jnp.where(jnp.asarray(mask) != 0, jax.lax.stop_gradient(old_log_probs - sampling_log_probs), 0)
    gap = jnp.where(jnp.isnan(gap), 0, gap)
    if level == "sequence":
        gap = gap.sum(-1, keepdims=True)
    ratio = jnp.exp(jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    low, high = (-jnp.inf if clip_min is None else clip_min), (jnp.inf if clip_max is None else clip_max)
    if treatment == "truncate":
        return jnp.clip(ratio, low, high)
    return jnp.where((ratio < low) | (ratio > high), 0, ratio)


def mask_truncated_completions(
    completion_ids: Int[Array, "batch time"], mask: Mask, eos_ids: int | Int[Array, "*eos"]
) -> Bool[Array, "batch time"]:
    """Masks the rows that were cut: a completion is truncated unless its last token is one that ends it.

    Use it on the mask before the weights are made, so that such rows count in no denominator of tokens.

    Args:
        completion_ids: Tokens of the completions.
        mask: Nonzero at completion tokens, up to and including the first EOS.
        eos_ids: The id that ends a completion, or several.

    Example:
        >>> ids = jnp.array([[5, 9, 0], [5, 6, 7], [5, 6, 8]])
        >>> mask_truncated_completions(ids, jnp.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]]), jnp.array([8, 9])).tolist()
        [[True, True, False], [False, False, False], [True, True, True]]
    """
    mask = jnp.asarray(mask) != 0
    last = mask & (jnp.cumsum(mask, axis=-1) == mask.sum(-1, keepdims=True))
    ended = (last & jnp.isin(completion_ids, jnp.asarray(eos_ids))).any(-1, keepdims=True)
    return mask & ended
