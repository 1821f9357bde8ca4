"""Policy-gradient losses, REINFORCE / A2C and PPO, for tokens `[batch, time]` and steps `[time, envs]` alike."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.losses.ratios import clipped_surrogate, log_importance_ratio, outside_clip, per_token
from jaxrl_llm.losses.value import value_loss
from jaxrl_llm.reductions import LossWeights, Reduction, as_loss_weights, loss_weights, weighted_sum
from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar


def policy_gradient_loss(
    log_probs: Float[Array, "*shape"],
    advantages: Float[Array, "*advantage_shape"],
    mask: Mask | None = None,
    *,
    entropy: Float[Array, "*shape"] | None = None,
    entropy_coef: Numeric = 0.0,
    reduction: Reduction = "token_mean",
    max_length: Numeric | None = None,
    weights: Float[Array, "*shape"] | LossWeights | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes $-\mathbb{E}[A \log\pi(a|s)]$, whose gradient is the policy gradient (REINFORCE, A2C).

    Args:
        log_probs: Log-probability, in nats, of each taken action (sampled token) under the policy being trained.
        advantages: For each action, or for each row `[batch]` of tokens; treated as constant.
        mask: Nonzero where an action counts; all if not given.
        entropy: Entropy of the policy at each step, nats.
        entropy_coef: Times the mean entropy, is subtracted from the loss.
        reduction: How actions are averaged, see `token_weights`. `token_mean` for steps (A2C); for completions
            `sequence_sum` is REINFORCE: the mean over rows of A × the log-probability of the whole row.
        max_length: Needed by the reduction `constant`.
        weights: Weight of each action, made from the whole batch by `loss_weights`; by `reduction` if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `loss/policy_avg`, `policy/entropy_avg` (if entropy is given).

    References:
        Williams, 1992; Sutton et al., 2000; Mnih et al., 2016. https://arxiv.org/abs/1602.01783
    """
    mask = jnp.ones_like(log_probs, bool) if mask is None else jnp.asarray(mask) != 0
    if weights is None:
        weights = loss_weights(mask, reduction, max_length=max_length, axis_name=axis_name)
    weights = as_loss_weights(weights)
    advantages = per_token(advantages, log_probs)
    policy = -weighted_sum(jnp.where(mask, log_probs, 0) * jnp.where(mask, advantages, 0), weights.policy)
    bonus, metrics = entropy_bonus(entropy, mask, weights)
    return policy - entropy_coef * bonus, jax.lax.stop_gradient({"loss/policy_avg": policy} | metrics)


def entropy_bonus(
    entropy: Float[Array, "*shape"] | None, mask: Mask, weights: LossWeights, *, name: str = "policy/entropy_avg"
) -> tuple[Numeric, Metrics]:
    """Computes the weighted mean entropy that is rewarded, and the metric; 0 and none where no entropy is given."""
    if entropy is None:
        return 0.0, {}
    entropy = jnp.where(mask, entropy, 0)
    mean = weighted_sum(entropy, weights.tokens)
    return mean if weights.entropy is None else weighted_sum(entropy, weights.entropy), {name: mean}


def ppo_loss(
    log_probs: Float[Array, "*shape"],
    old_log_probs: Float[Array, "*shape"] | None,
    advantages: Float[Array, "*advantage_shape"],
    mask: Mask | None = None,
    *,
    values: Float[Array, "*value_shape"] | None = None,
    old_values: Float[Array, "*value_shape"] | None = None,
    returns: Float[Array, "*value_shape"] | None = None,
    value_mask: Mask | None = None,
    entropy: Float[Array, "*shape"] | None = None,
    cliprange: Numeric = 0.2,
    cliprange_value: Numeric | None = None,
    vf_coef: Numeric = 0.5,
    entropy_coef: Numeric = 0.0,
    weights: Float[Array, "*shape"] | LossWeights | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes PPO's loss: clipped policy term, value term and entropy bonus.

    $$ -\mathbb{E}[\min(r A, \mathrm{clip}(r, 1-\epsilon, 1+\epsilon) A)] + c_v \tfrac12 \mathbb{E}[(V - R)^2]
       - c_e \mathbb{E}[H], \qquad r = \pi(a|s) / \pi_{old}(a|s) $$

    Args:
        log_probs: Log-probability, in nats, of each taken action under the policy being trained.
        old_log_probs: The same under the policy that acted; None means that it is this policy (ratio one).
        advantages: For each action, or for each row `[batch]` of tokens; treated as constant.
        mask: Nonzero where an action counts (padding and prompts do not); all if not given.
        values: Predictions of the critic; without them there is no value term.
        old_values: Predictions at the time of acting, needed by `cliprange_value`.
        returns: Targets of the critic.
        value_mask: Nonzero where a prediction counts; `mask` if not given.
        entropy: Entropy of the policy at each step, nats.
        cliprange: ε, half-width of the interval around a ratio of one.
        cliprange_value: Half-width of the clip of the values, in units of reward; None: no clip.
        vf_coef: $c_v$; note the one half beside it.
        entropy_coef: $c_e$.
        weights: One array for all terms, or `LossWeights`, made from the whole batch; means over the masks if not
            given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `loss/policy_avg`, `loss/value_avg`, `policy/entropy_avg`, `policy/approxkl_avg` (nats,
        mean of (r − 1) − log r), `policy/clipfrac_avg` (share of actions whose gradient the clip removed), `val/ratio`,
        `val/clipfrac_avg`. Means are over the unmasked; TRL's count padding too.

    Raises:
        ValueError: If `values` come without `returns`, or shapes do not fit.

    References:
        Schulman et al., 2017, eq. 7 and 9. https://arxiv.org/abs/1707.06347
    """
    mask = jnp.ones_like(log_probs, bool) if mask is None else jnp.asarray(mask) != 0
    if values is not None and returns is None:
        raise ValueError("ppo_loss got values without returns, the targets of the critic.")
    if weights is None:
        weights = loss_weights(mask, "token_mean", value_mask=value_mask, axis_name=axis_name)
    weights = as_loss_weights(weights)
    advantages = jnp.where(mask, per_token(advantages, log_probs), 0)
    log_ratio = log_importance_ratio(log_probs, old_log_probs, mask)
    ratio = jnp.exp(log_ratio)
    low, high = outside_clip(ratio, advantages, 1 - cliprange, 1 + cliprange)
    policy = weighted_sum(clipped_surrogate(ratio, advantages, 1 - cliprange, 1 + cliprange), weights.policy)
    bonus, metrics = entropy_bonus(entropy, mask, weights)
    loss = policy - entropy_coef * bonus
    metrics |= {
        "loss/policy_avg": policy,
        "policy/approxkl_avg": weighted_sum(jnp.expm1(log_ratio) - log_ratio, weights.tokens),
        "policy/clipfrac_avg": weighted_sum(low | high, weights.tokens),
        "val/ratio": weighted_sum(ratio, weights.tokens),
    }
    if values is not None and returns is not None:
        value, value_metrics = value_loss(
            values,
            returns,
            mask if value_mask is None else value_mask,
            old_values=old_values,
            cliprange_value=cliprange_value,
            weights=weights.value,
        )
        loss, metrics = loss + vf_coef * value, metrics | value_metrics
    return loss, jax.lax.stop_gradient(metrics)
