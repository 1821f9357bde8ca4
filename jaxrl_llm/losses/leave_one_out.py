"""RLOO: the completion as one action, with the other completions of its prompt as the baseline."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.losses.clip_metrics import clip_metrics
from jaxrl_llm.losses.policy_gradient import entropy_bonus
from jaxrl_llm.losses.ratios import MAX_LOG_RATIO, clipped_surrogate, log_importance_ratio, per_token
from jaxrl_llm.reductions import LossWeights, as_loss_weights, loss_weights, weighted_sum
from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar


def rloo_weights(mask: Mask, *, axis_name: str | None = None) -> LossWeights:
    """Makes the weights of `rloo_loss` from the whole batch: each row's part of the mean, spread over its tokens."""
    return loss_weights(mask, "sequence_mean", axis_name=axis_name)


def rloo_loss(
    log_probs: Float[Array, "batch time"],
    old_log_probs: Float[Array, "batch time"] | None,
    advantages: Float[Array, " batch"],
    mask: Mask,
    *,
    epsilon: Numeric = 0.2,
    epsilon_high: Numeric | None = None,
    entropy: Float[Array, "batch time"] | None = None,
    entropy_coef: Numeric = 0.0,
    weights: Float[Array, "batch time"] | LossWeights | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the RLOO loss, clipped on the ratio of whole completions.

    $$ \frac1B\sum_b -\min\big(W_b A_b, \mathrm{clip}(W_b, 1-\epsilon, 1+\epsilon_{high}) A_b\big), \qquad
       W_b = \exp\Big(\sum_t \log\pi - \log\pi_{old}\Big) $$

    The log-ratio is summed over the tokens (GSPO takes its mean), so at ratio one this is REINFORCE on completions.

    Args:
        log_probs: Log-probability, in nats, of each completion token under the policy being trained.
        old_log_probs: The same under the policy that sampled; None means that it is this policy (ratio one).
        advantages: Of `leave_one_out_advantages`; treated as constant.
        mask: Nonzero at completion tokens. A row without any counts as a row, with a loss of 0.
        epsilon: Lower clip: ratios below 1 − ε.
        epsilon_high: Upper clip, 1 + ε_high; ε if not given.
        entropy: Entropy of the policy at each token, nats.
        entropy_coef: Times the mean entropy over all tokens, is subtracted from the loss.
        weights: Made from the whole batch by `rloo_weights`; needed when the batch is split into micro-batches.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `policy_loss`, `entropy` (if given), `clip_ratio/*` as in `grpo_loss`, here of rows.

    References:
        Ahmadian et al., 2024, eq. 5. https://arxiv.org/abs/2402.14740
    """
    mask = jnp.asarray(mask) != 0
    weights = rloo_weights(mask, axis_name=axis_name) if weights is None else as_loss_weights(weights)
    advantages = jnp.where(mask, per_token(advantages, log_probs), 0)
    total = log_importance_ratio(log_probs, old_log_probs, mask).sum(-1, keepdims=True)
    ratio = jnp.where(mask, jnp.exp(jnp.clip(total, -MAX_LOG_RATIO, MAX_LOG_RATIO)), 1)
    clip = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    policy = weighted_sum(clipped_surrogate(ratio, advantages, *clip), weights.policy)
    bonus, metrics = entropy_bonus(entropy, mask, weights, name="entropy")
    metrics |= {"policy_loss": policy} | clip_metrics(ratio, advantages, clip, mask, weights.policy)
    return policy - entropy_coef * bonus, jax.lax.stop_gradient(metrics)
