"""GRPO and its kin: policy gradients with advantages relative to a group of completions, and no critic.

A loss is ratio × surrogate × reduction, and a KL: the level of the ratio is in `ratios`, what is made of it in
`surrogates`, which tokens count in `selection`, and a loss type names one surrogate and one reduction.
"""

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.divergences import KLEstimator, kl_estimate
from jaxrl_llm.losses import surrogates
from jaxrl_llm.losses.clip_metrics import surrogate_metrics
from jaxrl_llm.losses.policy_gradient import entropy_bonus
from jaxrl_llm.losses.ratios import ImportanceSamplingLevel, at_level, log_importance_ratio, per_token
from jaxrl_llm.losses.selection import off_policy_mask, top_entropy_mask
from jaxrl_llm.reductions import LossWeights, Reduction, as_loss_weights, loss_weights, token_weights, weighted_sum
from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar

GRPOLossType: TypeAlias = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo", "gmpo"]


class Preset(NamedTuple):
    """What a loss type stands for: what is made of ratio and advantage, and how tokens are averaged."""

    surrogate: surrogates.Surrogate
    reduction: Reduction


GRPO_PRESETS: dict[str, Preset] = {
    "grpo": Preset(surrogates.clipped, "sequence_mean"),
    "bnpo": Preset(surrogates.clipped, "token_mean"),
    "dr_grpo": Preset(surrogates.clipped, "constant"),
    "dapo": Preset(surrogates.clipped, "token_mean"),
    "cispo": Preset(surrogates.capped, "token_mean"),
    "sapo": Preset(surrogates.gated, "sequence_mean"),
    "vespo": Preset(surrogates.gamma_weighted, "token_mean"),
    "luspo": Preset(surrogates.clipped, "sequence_sum"),
    "gmpo": Preset(surrogates.geometric, "sequence_mean"),
}
"""All loss types. LUSPO is GSPO whose rows count by their length."""


def grpo_weights(
    mask: Mask,
    loss_type: GRPOLossType = "dapo",
    *,
    max_completion_length: Numeric | None = None,
    entropy_mask: Mask | None = None,
    axis_name: str | None = None,
) -> LossWeights:
    """Makes the weights of `grpo_loss` from the whole batch; give them to it when the batch is split.

    Args:
        mask: Nonzero at completion tokens, up to and including the first EOS.
        loss_type: `grpo`, `sapo`, `gmpo` (mean over tokens, then rows), `bnpo`, `dapo`, `cispo`, `vespo` (mean over all
            tokens), `luspo` (sum over tokens, mean over rows), `dr_grpo` (sum divided by rows ×
            `max_completion_length`).
        max_completion_length: Longest completion that generation allows; needed by `dr_grpo`.
        entropy_mask: Of `top_entropy_mask`, if one is used: the entropy bonus is the mean over its tokens.
        axis_name: Mapped axis to count over.

    Raises:
        ValueError: If `loss_type` is unknown, or `dr_grpo` comes without `max_completion_length`.
    """
    if loss_type not in GRPO_PRESETS:
        raise ValueError(f"loss_type must be one of {get_args(GRPOLossType)}, got {loss_type!r}.")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("loss_type='dr_grpo' needs max_completion_length, the longest completion that is sampled.")
    reduction = GRPO_PRESETS[loss_type].reduction
    weights = loss_weights(mask, reduction, max_length=max_completion_length, axis_name=axis_name)
    if entropy_mask is None:
        return weights
    kept = (jnp.asarray(mask) != 0) & (jnp.asarray(entropy_mask) != 0)
    return weights._replace(entropy=token_weights(kept, "token_mean", axis_name=axis_name))


def grpo_loss(
    log_probs: Float[Array, "batch time"],
    old_log_probs: Float[Array, "batch time"] | None,
    advantages: Float[Array, "*advantage_shape"],
    mask: Mask,
    *,
    ref_log_probs: Float[Array, "batch time"] | None = None,
    ref_kl: Float[Array, "batch time"] | None = None,
    entropy: Float[Array, "batch time"] | None = None,
    sampling_log_probs: Float[Array, "batch time"] | None = None,
    correction: Float[Array, "batch #time"] | None = None,
    entropy_mask: Mask | None = None,
    loss_type: GRPOLossType = "dapo",
    importance_sampling_level: ImportanceSamplingLevel = "token",
    epsilon: Numeric = 0.2,
    epsilon_high: Numeric | None = None,
    delta: Numeric | None = None,
    sapo_temperature_pos: Numeric = 1.0,
    sapo_temperature_neg: Numeric = 1.05,
    vespo_k_pos: Numeric = 2.0,
    vespo_lambda_pos: Numeric = 3.0,
    vespo_k_neg: Numeric = 3.0,
    vespo_lambda_neg: Numeric = 2.0,
    beta: Numeric = 0.0,
    kl_estimator: KLEstimator = "k3",
    use_bias_correction_kl: bool = False,
    max_completion_length: Numeric | None = None,
    top_entropy_quantile: Numeric = 1.0,
    off_policy_mask_threshold: Numeric | None = None,
    entropy_coef: Numeric = 0.0,
    weights: Float[Array, "batch time"] | LossWeights | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the GRPO loss of completions, with advantages relative to their group.

    $$ \sum_{b,t} w_{bt} \big[ c_{bt}\,\ell(r, A) + \beta\,\mathrm{KL}_{bt} \big], \qquad
       \ell = -\min(\min(r, \delta) A, \mathrm{clip}(r, 1-\epsilon, 1+\epsilon_{high}) A) $$

    with $r$ the ratio π/π_old of the token or (GSPO) its geometric mean over the sequence, $w$ and $\ell$ by
    `loss_type` (see `surrogates`), and $c$ a correction for another sampler, 0 where a token is not to be learned from.
    The KL is of all tokens, and is not corrected.

    Args:
        log_probs: Log-probability, in nats, of each completion token under the policy being trained.
        old_log_probs: The same under the policy that sampled; None means that it is this policy (ratio one).
        advantages: For each completion `[batch]` or token; treated as constant.
        mask: Nonzero at completion tokens, up to and including the first EOS.
        ref_log_probs: Log-probabilities under the reference policy; needed where β is not 0, unless `ref_kl` is given.
        ref_kl: Exact KL to the reference at each token, nats, with its gradient, in place of the estimate.
        entropy: Entropy of the policy at each token, nats.
        sampling_log_probs: As the sampler recorded them, for the off-policy mask; `old_log_probs` if not given.
        correction: Of `importance_correction`, for each token or one column; constants.
        entropy_mask: Of `top_entropy_mask`, made from the whole batch: the tokens that the policy learns from.
        loss_type: Surrogate and average over tokens, see `GRPO_PRESETS`. `luspo` needs the sequence ratio.
        importance_sampling_level: `token`, `sequence` (GSPO), or `sequence_token`: the value of a sequence with a
            gradient for each token. Of no effect in `vespo` and `gmpo`, which have ratios of their own.
        epsilon: Lower clip: ratios below 1 − ε (`gmpo`: log-ratios below −ε).
        epsilon_high: Upper clip, 1 + ε_high; ε if not given (DAPO's clip-higher: 0.28; `gmpo`: of the log-ratio). In
            `cispo` it is the largest ratio itself and must be given (5.0).
        delta: Upper bound of the unclipped ratio, above 1 + ε_high; bounds the loss where A < 0 (INTELLECT-2).
        sapo_temperature_pos: τ of `sapo` where A > 0.
        sapo_temperature_neg: τ of `sapo` elsewhere; larger fades faster.
        vespo_k_pos: k of `vespo` where A ≥ 0, the power of the ratio of the sequence.
        vespo_lambda_pos: λ of `vespo` where A ≥ 0, how fast large ratios fade.
        vespo_k_neg: k where A < 0.
        vespo_lambda_neg: λ where A < 0.
        beta: Strength of the KL penalty to the reference.
        kl_estimator: `k2` or `k3`; `k1` has a gradient of mean zero on policy: as a penalty it does nothing.
        use_bias_correction_kl: Multiplies the KL by the ratio, whose gradient makes k1 and k3 unbiased.
        max_completion_length: Longest completion that generation allows, in tokens; needed by `dr_grpo`.
        top_entropy_quantile: Share of the tokens, those of highest entropy, that the policy learns from. Of an unsplit
            batch; else give `entropy_mask`.
        off_policy_mask_threshold: Nats a token: rows with A < 0 that have become less likely by more are not learned
            from; see `off_policy_mask`. None keeps all.
        entropy_coef: Times the mean entropy over the tokens that are learned from, is subtracted from the loss.
        weights: Made from the whole batch by `grpo_weights`; needed when the batch is split into micro-batches.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `policy_loss`, `kl` (if a reference is given), `entropy` (if given), and where there is a
        clip `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (share of tokens whose gradient it
        removed), `clip_ratio/low_min`, `clip_ratio/high_max` (over rows); `cispo_clip_ratio` or `vespo/phi_seq_mean`.

    Raises:
        ValueError: If a name is unknown, an argument lacks the one that it needs, or shapes do not fit.

    References:
        Shao et al., 2024, eq. 3 and 4 (GRPO). https://arxiv.org/abs/2402.03300; Yu et al., 2025 (DAPO).
        https://arxiv.org/abs/2503.14476; Liu et al., 2025 (Dr. GRPO). https://arxiv.org/abs/2503.20783;
        Zheng et al., 2025 (GSPO). https://arxiv.org/abs/2507.18071; those of the other types are in `surrogates`.
    """
    _check_arguments(loss_type, importance_sampling_level, epsilon_high, beta, (ref_log_probs, ref_kl))
    mask = jnp.asarray(mask) != 0
    kept = _kept(mask, entropy, entropy_mask, top_entropy_quantile, weights, axis_name)
    weights = _weights(weights, mask, kept, entropy, entropy_coef, loss_type, max_completion_length, axis_name)
    advantages = jnp.where(mask, per_token(advantages, log_probs), 0)
    log_ratio = log_importance_ratio(log_probs, old_log_probs, mask)
    ratio = jnp.exp(at_level(log_ratio, mask, importance_sampling_level))
    correction = _constants(correction, mask)
    sample = surrogates.Sample(jnp.where(mask, log_probs, 0), log_ratio, ratio, advantages, mask, kept, correction)
    shape = surrogates.Shape(
        epsilon,
        epsilon if epsilon_high is None else epsilon_high,
        delta,
        sapo_temperature_pos,
        sapo_temperature_neg,
        vespo_k_pos,
        vespo_lambda_pos,
        vespo_k_neg,
        vespo_lambda_neg,
    )
    surrogate = GRPO_PRESETS[loss_type].surrogate
    learned = mask if surrogate is surrogates.geometric else kept  # Its mean is over `kept` already.
    if off_policy_mask_threshold is not None:
        recorded = sampling_log_probs if sampling_log_probs is not None else old_log_probs
        recorded = log_probs if recorded is None else recorded
        learned &= off_policy_mask(log_probs, recorded, advantages, mask, off_policy_mask_threshold)
    losses = jnp.where(learned, surrogate(sample, shape), 0)
    if correction is not None and surrogate is not surrogates.gamma_weighted:  # There it is within the weights.
        losses = losses * correction
    policy = weighted_sum(losses, weights.policy)
    bonus, metrics = entropy_bonus(entropy, mask, weights, name="entropy")
    loss = policy - entropy_coef * bonus
    metrics |= {"policy_loss": policy} | surrogate_metrics(surrogate, sample, shape, weights.tokens)
    if ref_kl is not None or ref_log_probs is not None:
        kl = _reference_kl(log_probs, ref_log_probs, ref_kl, mask, kl_estimator)
        kl = kl * ratio if use_bias_correction_kl else kl
        loss = loss + beta * weighted_sum(kl, weights.policy)
        metrics["kl"] = weighted_sum(kl, weights.tokens)
    return loss, jax.lax.stop_gradient(metrics)


def _is(value: Numeric, number: int) -> bool:
    """Tells whether a hyperparameter is known to be a number; a traced one is not."""
    return isinstance(value, int | float) and value == number


def _check_arguments(
    loss_type: str,
    level: str,
    epsilon_high: Numeric | None,
    beta: Numeric,
    references: tuple[Array | None, Array | None],
) -> None:
    if loss_type not in GRPO_PRESETS:
        raise ValueError(f"loss_type must be one of {get_args(GRPOLossType)}, got {loss_type!r}.")
    if loss_type == "luspo" and level != "sequence":
        raise ValueError(
            f"loss_type='luspo' needs importance_sampling_level='sequence', got {level!r}: its terms are of whole "
            "sequences, each times its length."
        )
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError("loss_type='cispo' needs epsilon_high, the largest ratio itself, not 1 + it (say 5.0).")
    given = sum(x is not None for x in references)
    if given == 0 and not _is(beta, 0):
        raise ValueError(
            f"beta={beta} needs ref_log_probs, the log-probabilities under the reference policy, or ref_kl."
        )
    if given == 2:
        raise ValueError("Got both ref_log_probs and ref_kl; the KL is either estimated or exact, give one.")


def _kept(
    mask: Array,
    entropy: Array | None,
    entropy_mask: Mask | None,
    quantile: Numeric,
    weights: Array | LossWeights | None,
    axis_name: str | None,
) -> Array:
    """Selects the tokens that the policy learns from."""
    if entropy_mask is not None:
        return mask & (jnp.asarray(entropy_mask) != 0)
    if _is(quantile, 1):
        return mask
    if weights is not None:
        raise ValueError(
            f"top_entropy_quantile={quantile} came with weights, so the batch may be split, and the quantile is one of the "
            "whole batch. Give entropy_mask=top_entropy_mask(entropy, mask, quantile), made from all of it."
        )
    if entropy is None:
        raise ValueError(f"top_entropy_quantile={quantile} needs entropy, that of the policy at each token.")
    return top_entropy_mask(entropy, mask, quantile, axis_name=axis_name)


def _weights(
    weights: Array | LossWeights | None,
    mask: Array,
    kept: Array,
    entropy: Array | None,
    entropy_coef: Numeric,
    loss_type: GRPOLossType,
    max_length: Numeric | None,
    axis_name: str | None,
) -> LossWeights:
    some = None if kept is mask else kept
    if weights is None:
        lengths = {"max_completion_length": max_length}
        return grpo_weights(mask, loss_type, entropy_mask=some, axis_name=axis_name, **lengths)
    weights = as_loss_weights(weights)
    if some is not None and weights.entropy is None and entropy is not None and not _is(entropy_coef, 0):
        raise ValueError(
            "The entropy bonus is the mean over the tokens of entropy_mask, and weights.entropy is missing. Make the weights "
            "by grpo_weights(mask, loss_type, entropy_mask=entropy_mask)."
        )
    return weights


def _constants(correction: Array | None, mask: Array) -> Array | None:
    """Reads the correction as constants, 1 where no token is."""
    if correction is None:
        return None
    given = mask if correction.shape == mask.shape else mask.any(-1, keepdims=True)
    return jax.lax.stop_gradient(jnp.where(given, correction, 1))


def _reference_kl(
    log_probs: Array, ref_log_probs: Array | None, ref_kl: Array | None, mask: Array, estimator: KLEstimator
) -> Array:
    if ref_kl is not None:
        return jnp.where(mask, ref_kl, 0)
    log_ratio = log_importance_ratio(log_probs, ref_log_probs, mask)
    return kl_estimate(log_ratio, jnp.zeros_like(log_ratio), estimator)
