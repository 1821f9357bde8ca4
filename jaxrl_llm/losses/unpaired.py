"""KTO and BCO: learning from single responses that are labelled good or bad, with a reference policy."""

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Bool, Float

from jaxrl_llm.reductions import sum_over_axis, token_weights, weighted_sum
from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar

KTOLossType: TypeAlias = Literal["kto", "apo_zero_unpaired"]


class UnpairedWeights(NamedTuple):
    """Weights of `kto_loss` and `bco_loss`, made from the whole batch by `unpaired_weights`.

    Attributes:
        rows: Of each response in the loss.
        chosen: Of the desirable responses in their metrics.
        rejected: Of the undesirable ones.
    """

    rows: Float[Array, " batch"]
    chosen: Float[Array, " batch"]
    rejected: Float[Array, " batch"]


class RunningMean(NamedTuple):
    """Mean of all rewards seen so far: the shift δ of `bco_loss`, carried from step to step.

    Attributes:
        mean: In units of reward.
        count: Number of rewards.
    """

    mean: Float[Array, ""]
    count: Float[Array, ""]


def unpaired_weights(
    labels: Bool[Array, " batch"], *, mask: Mask | None = None, axis_name: str | None = None
) -> UnpairedWeights:
    """Makes the weights of `kto_loss` and `bco_loss`: means over all responses, the desirable and the undesirable.

    Args:
        labels: True where a response is desirable.
        mask: Nonzero where a response counts; all if not given.
        axis_name: Mapped axis to count over.
    """
    counts = jnp.ones_like(labels) if mask is None else jnp.asarray(mask) != 0
    masks = counts, counts & labels, counts & ~labels
    return UnpairedWeights(*(token_weights(one, "token_mean", axis_name=axis_name) for one in masks))


def kto_kl(
    policy: Float[Array, " batch"],
    ref: Float[Array, " batch"],
    *,
    mask: Mask | None = None,
    axis_name: str | None = None,
) -> Scalar:
    r"""Computes KTO's reference point $\max(0, \mathbb{E}[\log\pi(y'|x) - \log\pi_{ref}(y'|x)])$ from the whole batch.

    Args:
        policy: Log-probability under the policy, summed over tokens, of responses y' that belong to other prompts
            (`data.rotate_completions`).
        ref: The same under the reference.
        mask: Nonzero where a response counts; all if not given.
        axis_name: Mapped axis to average over.

    Returns:
        An estimate of the policy's divergence from the reference, nats, at least 0; a constant.
    """
    mask = jnp.ones_like(policy) if mask is None else mask
    weights = token_weights(mask, "token_mean", axis_name=axis_name)
    mean = sum_over_axis(weighted_sum(policy - ref, weights), axis_name)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def kto_loss(
    policy: Float[Array, " batch"],
    ref: Float[Array, " batch"],
    labels: Bool[Array, " batch"],
    *,
    beta: Numeric,
    kl: Numeric = 0.0,
    loss_type: KTOLossType = "kto",
    desirable_weight: Numeric = 1.0,
    undesirable_weight: Numeric = 1.0,
    weights: Float[Array, " batch"] | UnpairedWeights | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the Kahneman-Tversky loss of labelled responses.

    $$ \lambda_D\,(1 - \sigma(\beta(\rho - z_0)))\ \text{if desirable},\quad
       \lambda_U\,(1 - \sigma(\beta(z_0 - \rho)))\ \text{if not}, \qquad \rho = \log\pi - \log\pi_{ref} $$

    Args:
        policy: Log-probability of each response, summed over its tokens, nats, under the policy being trained.
        ref: The same under the reference; treated as constant.
        labels: True where a response is desirable.
        beta: Strength of the pull to the reference.
        kl: z₀, the `kto_kl` of the whole batch; a constant. `apo_zero_unpaired` has none.
        loss_type: `kto`, or `apo_zero_unpaired` (z₀ = 0).
        desirable_weight: λ_D.
        undesirable_weight: λ_U; choose the two so that both classes weigh about the same.
        weights: Made from the whole batch by `unpaired_weights`; the means if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `rewards/chosen`, `logps/chosen` (over desirable responses), `rewards/rejected`,
        `logps/rejected` (over undesirable ones), `rewards/margins`.

    Raises:
        ValueError: If `loss_type` is unknown.

    References:
        Ethayarajh et al., 2024, eq. 7. https://arxiv.org/abs/2402.01306; D'Oosterlinck et al., 2024 (APO).
        https://arxiv.org/abs/2408.06266
    """
    if loss_type not in get_args(KTOLossType):
        raise ValueError(f"loss_type must be one of {get_args(KTOLossType)}, got {loss_type!r}.")
    batch = _Batch.of(policy, ref, labels, beta, weights, axis_name)
    reference_point = jax.lax.stop_gradient(kl) if loss_type == "kto" else 0.0
    above = batch.rewards - beta * reference_point
    losses = jnp.where(labels, desirable_weight * sigmoid(-above), undesirable_weight * sigmoid(above))
    return weighted_sum(losses, batch.weights.rows), batch.metrics()


def bco_loss(
    policy: Float[Array, " batch"],
    ref: Float[Array, " batch"],
    labels: Bool[Array, " batch"],
    *,
    beta: Numeric,
    delta: Numeric,
    weights: Float[Array, " batch"] | UnpairedWeights | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the loss of a binary classifier whose logit is the implicit reward.

    $$ -\log\sigma(\beta\rho - \delta)\ \text{if desirable},\quad -\log\sigma(-(\beta\rho - \delta))\ \text{if not} $$

    Args:
        policy: Log-probability of each response, summed over its tokens, nats, under the policy being trained.
        ref: The same under the reference; treated as constant.
        labels: True where a response is desirable.
        beta: Strength of the pull to the reference.
        delta: δ, the mean of all rewards βρ up to and with this batch (`update_running_mean`); a constant.
        weights: Made from the whole batch by `unpaired_weights`, or any weight of each response (the paper's matching
            of the two underlying distributions); the means if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and the metrics of `kto_loss`.

    References:
        Jung et al., 2024. https://arxiv.org/abs/2404.04656
    """
    batch = _Batch.of(policy, ref, labels, beta, weights, axis_name)
    logits = batch.rewards - jax.lax.stop_gradient(delta)
    losses = -jnp.where(labels, log_sigmoid(logits), log_sigmoid(-logits))
    return weighted_sum(losses, batch.weights.rows), batch.metrics()


def update_running_mean(
    state: RunningMean,
    rewards: Float[Array, " batch"],
    *,
    mask: Mask | None = None,
    axis_name: str | None = None,
) -> RunningMean:
    """Adds the rewards of a whole batch, of all devices of a mapped axis, to a running mean.

    Example:
        >>> empty = RunningMean(jnp.zeros(()), jnp.zeros(()))
        >>> float(update_running_mean(empty, jnp.array([1.0, 3.0])).mean)
        2.0
    """
    mask = jnp.ones_like(rewards, bool) if mask is None else jnp.asarray(mask) != 0
    rewards = jax.lax.stop_gradient(jnp.where(mask, rewards, 0))
    total, added = sum_over_axis((rewards.sum(), mask.sum()), axis_name)
    count = state.count + added
    return RunningMean(state.mean + (total - added * state.mean) / jnp.maximum(count, 1), count)


class _Batch(NamedTuple):
    policy: Array
    rewards: Array
    weights: UnpairedWeights

    @classmethod
    def of(cls, policy, ref, labels, beta, weights, axis_name) -> "_Batch":
        if weights is None:
            weights = unpaired_weights(labels, axis_name=axis_name)
        if not isinstance(weights, UnpairedWeights):
            means = unpaired_weights(labels, mask=weights, axis_name=axis_name)
            weights = means._replace(rows=weights)
        counts = weights.rows != 0
        policy = jnp.where(counts, policy, 0)
        return cls(policy, beta * (policy - jax.lax.stop_gradient(jnp.where(counts, ref, 0))), weights)

    def metrics(self) -> Metrics:
        chosen = weighted_sum(self.rewards, self.weights.chosen)
        rejected = weighted_sum(self.rewards, self.weights.rejected)
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": weighted_sum(self.policy, self.weights.chosen),
            "logps/rejected": weighted_sum(self.policy, self.weights.rejected),
        }
        return jax.lax.stop_gradient(metrics)
