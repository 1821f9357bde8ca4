"""GRPO and its kin: policy gradients with advantages relative to a group of completions, and no critic."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.divergences import kl_estimate
from jaxrl_llm.losses.policy_gradient import entropy_bonus
from jaxrl_llm.losses.ratios import clipped_surrogate, log_importance_ratio, outside_clip, per_token
from jaxrl_llm.reductions import LossWeights, Reduction, as_loss_weights, loss_weights, weighted_sum
from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar

GRPOLossType: TypeAlias = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
ImportanceSamplingLevel: TypeAlias = Literal["token", "sequence"]

GRPO_REDUCTIONS: dict[str, Reduction] = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "dr_grpo": "constant",
}
"""The loss types differ in how tokens are averaged, and in nothing else."""


def grpo_weights(
    mask: Mask,
    loss_type: GRPOLossType = "dapo",
    *,
    max_completion_length: Numeric | None = None,
    axis_name: str | None = None,
) -> LossWeights:
    """Makes the weights of `grpo_loss` from the whole batch; give them to it when the batch is split.

    Args:
        mask: Nonzero at completion tokens, up to and including the first EOS.
        loss_type: `grpo` (mean over tokens, then rows), `bnpo` and `dapo` (mean over all tokens), `dr_grpo` (sum
            divided by rows × `max_completion_length`).
        max_completion_length: Longest completion that generation allows; needed by `dr_grpo`.
        axis_name: Mapped axis to count over.

    Raises:
        ValueError: If `loss_type` is unknown, or `dr_grpo` comes without `max_completion_length`.
    """
    if loss_type not in GRPO_REDUCTIONS:
        raise ValueError(f"loss_type must be one of {get_args(GRPOLossType)}, got {loss_type!r}.")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("loss_type='dr_grpo' needs max_completion_length, the longest completion that is sampled.")
    return loss_weights(mask, GRPO_REDUCTIONS[loss_type], max_length=max_completion_length, axis_name=axis_name)


def grpo_loss(
    log_probs: Float[Array, "batch time"],
    old_log_probs: Float[Array, "batch time"] | None,
    advantages: Float[Array, "*advantage_shape"],
    mask: Mask,
    *,
    ref_log_probs: Float[Array, "batch time"] | None = None,
    entropy: Float[Array, "batch time"] | None = None,
    loss_type: GRPOLossType = "dapo",
    importance_sampling_level: ImportanceSamplingLevel = "token",
    epsilon: Numeric = 0.2,
    epsilon_high: Numeric | None = None,
    delta: Numeric | None = None,
    beta: Numeric = 0.0,
    max_completion_length: Numeric | None = None,
    entropy_coef: Numeric = 0.0,
    weights: Float[Array, "batch time"] | LossWeights | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the GRPO loss of completions, with advantages relative to their group.

    $$ \sum_{b,t} w_{bt} \big[ -\min(\min(r, \delta) A, \mathrm{clip}(r, 1-\epsilon, 1+\epsilon_{high}) A)
       + \beta\,(e^{-d} + d - 1) \big], \quad d = \log\pi - \log\pi_{ref} $$

    with $r$ the ratio π/π_old of the token or (GSPO) its geometric mean over the sequence, and $w$ by `loss_type`.

    Args:
        log_probs: Log-probability, in nats, of each completion token under the policy being trained.
        old_log_probs: The same under the policy that sampled; None means that it is this policy (ratio one).
        advantages: For each completion `[batch]` or token; treated as constant.
        mask: Nonzero at completion tokens, up to and including the first EOS.
        ref_log_probs: Log-probabilities under the reference policy; needed where β is not 0.
        entropy: Entropy of the policy at each token, nats.
        loss_type: How tokens are averaged, see `grpo_weights`.
        importance_sampling_level: `token`, or `sequence` (GSPO).
        epsilon: Lower clip: ratios below 1 − ε.
        epsilon_high: Upper clip, 1 + ε_high; ε if not given (DAPO's clip-higher: 0.28).
        delta: Upper bound of the unclipped ratio, above 1 + ε_high; bounds the loss where A < 0 (INTELLECT-2).
        beta: Strength of the KL penalty to the reference.
        max_completion_length: Longest completion that generation allows, in tokens; needed by `dr_grpo`.
        entropy_coef: Times the mean entropy over all tokens, is subtracted from the loss.
        weights: Made from the whole batch by `grpo_weights`; needed when the batch is split into micro-batches.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (share of tokens
        whose gradient the clip removed), `clip_ratio/low_min`, `clip_ratio/high_max` (over rows), `policy_loss`, `kl`
        (if a reference is given), `entropy` (if given).

    Raises:
        ValueError: If a name is unknown, β comes without `ref_log_probs`, or shapes do not fit.

    References:
        Shao et al., 2024, eq. 3 and 4 (GRPO). https://arxiv.org/abs/2402.03300; Yu et al., 2025 (DAPO).
        https://arxiv.org/abs/2503.14476; Liu et al., 2025 (Dr. GRPO). https://arxiv.org/abs/2503.20783;
        Zheng et al., 2025 (GSPO). https://arxiv.org/abs/2507.18071
    """
    if importance_sampling_level not in get_args(ImportanceSamplingLevel):
        raise ValueError(
            f"importance_sampling_level must be one of {get_args(ImportanceSamplingLevel)}, got "
            f"{importance_sampling_level!r}."
        )
    if ref_log_probs is None and not (isinstance(beta, int | float) and beta == 0):
        raise ValueError(f"beta={beta} needs ref_log_probs, the log-probabilities under the reference policy.")
    mask = jnp.asarray(mask) != 0
    if weights is None:
        weights = grpo_weights(mask, loss_type, max_completion_length=max_completion_length, axis_name=axis_name)
    weights = as_loss_weights(weights)
    advantages = jnp.where(mask, per_token(advantages, log_probs), 0)
    log_ratio = log_importance_ratio(log_probs, old_log_probs, mask)
    if importance_sampling_level == "sequence":
        mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
        log_ratio = jnp.where(mask, mean, 0)
    ratio = jnp.exp(log_ratio)
    clip = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    losses = clipped_surrogate(ratio, advantages, *clip, max_ratio=delta)
    policy = weighted_sum(losses, weights.policy)
    bonus, metrics = entropy_bonus(entropy, mask, weights, name="entropy")
    loss = policy - entropy_coef * bonus
    metrics |= {"policy_loss": policy} | _clip_metrics(ratio, advantages, clip, mask, weights.tokens)
    if ref_log_probs is not None:
        log_ratio = log_importance_ratio(log_probs, ref_log_probs, mask)
        kl = kl_estimate(log_ratio, jnp.zeros_like(log_ratio), "k3")
        loss = loss + beta * weighted_sum(kl, weights.policy)
        metrics["kl"] = weighted_sum(kl, weights.tokens)
    return loss, jax.lax.stop_gradient(metrics)


def _clip_metrics(
    ratio: Array, advantages: Array, clip: tuple[Numeric, Numeric], mask: Array, weights: Array
) -> Metrics:
    low, high = outside_clip(ratio, advantages, *clip)
    length = jnp.maximum(mask.sum(-1), 1)
    low_mean, high_mean = weighted_sum(low, weights), weighted_sum(high, weights)
    return {
        "clip_ratio/low_mean": low_mean,
        "clip_ratio/high_mean": high_mean,
        "clip_ratio/region_mean": low_mean + high_mean,
        "clip_ratio/low_min": ((low & mask).sum(-1) / length).min(),
        "clip_ratio/high_max": ((high & mask).sum(-1) / length).max(),
    }
