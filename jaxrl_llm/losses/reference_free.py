"""ORPO, CPO, SimPO and AlphaPO: learning from pairs of responses without a reference policy."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.nn import log1mexp, log_sigmoid
from jaxtyping import Array, Float

from jaxrl_llm.losses import links
from jaxrl_llm.losses.links import LinkOptions, PairwiseLink
from jaxrl_llm.reductions import row_weights, weighted_sum
from jaxrl_llm.types import Metrics, Numeric, Scalar

CPOLossType: TypeAlias = Literal["sigmoid", "hinge", "ipo", "simpo"]

CPO_LINKS: dict[str, PairwiseLink] = {
    "sigmoid": links.logistic,
    "hinge": links.hinge,
    "ipo": links.squared,
    "simpo": links.logistic,
}
"""The links of `dpo_loss`, of the margin of log-probabilities alone."""

LARGEST_LOG_PROB = -1e-6
"""A mean log-probability is held below this: at 0 the odds are infinite. Its gradient vanishes there."""


def orpo_loss(
    chosen: Float[Array, " batch"],
    rejected: Float[Array, " batch"],
    nll: Numeric,
    *,
    beta: Numeric,
    weights: Float[Array, " batch"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the odds-ratio loss: likelihood of the chosen response, and its odds against the rejected one's.

    $$ \mathrm{NLL} - \beta \log\sigma\Big(\log\frac{o_c}{o_r}\Big), \qquad o = \frac{p}{1-p},\quad
       \log p = \tfrac1L \textstyle\sum_t \log\pi(y_t) $$

    Args:
        chosen: Log-probability of the chosen response, AVERAGED over its tokens, nats.
        rejected: The same of the rejected response.
        nll: Negative log-likelihood of prompt and chosen response (`cross_entropy_loss`), by weights from the whole
            batch (of this device inside a mapped axis).
        beta: Weight of the odds ratio (λ in the paper).
        weights: Weight of each pair, made from the whole batch; the mean if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `nll_loss`, `log_odds_ratio` (mean log σ), `log_odds_chosen` (mean log-odds ratio),
        `rewards/chosen`, `rewards/rejected` (β times the averaged log-probability), `rewards/accuracies`,
        `rewards/margins`, `logps/chosen`, `logps/rejected` (averaged).

    References:
        Hong et al., 2024, eq. 4 and 7. https://arxiv.org/abs/2403.07691
    """
    if weights is None:
        weights = row_weights(chosen, axis_name=axis_name)
    chosen, rejected = (jnp.where(weights == 0, -1, x) for x in (chosen, rejected))
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    log_odds_ratio = weighted_sum(log_sigmoid(log_odds), weights)
    metrics = {
        "nll_loss": jnp.asarray(nll),
        "log_odds_ratio": log_odds_ratio,
        "log_odds_chosen": weighted_sum(log_odds, weights),
    }
    metrics |= _pair_metrics(chosen, rejected, beta * chosen, beta * rejected, weights)
    return nll - beta * log_odds_ratio, jax.lax.stop_gradient(metrics)


def cpo_loss(
    chosen: Float[Array, " batch"],
    rejected: Float[Array, " batch"],
    *,
    beta: Numeric,
    loss_type: CPOLossType = "sigmoid",
    label_smoothing: Numeric = 0.0,
    simpo_gamma: Numeric = 0.5,
    alpha: Numeric = 0.0,
    nll: Numeric = 0.0,
    cpo_alpha: Numeric = 0.0,
    weights: Float[Array, " batch"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the contrastive preference loss: a link of `dpo_loss` without a reference, and a likelihood term.

    $$ \ell(\Delta) + \alpha_{CPO}\,\mathrm{NLL}, \qquad \Delta = r_c - r_r\ (-\gamma/\beta\ \text{for simpo}), \quad
       r = \log\pi\ \text{or}\ (1 - \pi^{-\alpha})/\alpha\ \text{(AlphaPO)} $$

    Args:
        chosen: Log-probability of the chosen response, nats: SUMMED over its tokens for `sigmoid` and `hinge`, AVERAGED
            for `ipo` and `simpo`.
        rejected: The same of the rejected response.
        beta: Scale of the margin.
        loss_type: `sigmoid` (CPO), `hinge`, `ipo` or `simpo`.
        label_smoothing: ε, the probability that a label is wrong, in [0, 0.5); of `sigmoid` and `simpo`.
        simpo_gamma: γ, the margin that SimPO asks for, in units of reward.
        alpha: AlphaPO's α, which reshapes the reward; 0 leaves the log-probability.
        nll: Negative log-likelihood of the chosen response (`cross_entropy_loss`), by weights from the whole batch.
        cpo_alpha: Its weight. 1 is CPO's, 0 SimPO's.
        weights: Weight of each pair, made from the whole batch; the mean if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss, and metrics `nll_loss`, `rewards/chosen`, `rewards/rejected` (β times the reward),
        `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected`.

    Raises:
        ValueError: If `loss_type` is unknown.

    References:
        Xu et al., 2024, eq. 3 (CPO). https://arxiv.org/abs/2401.08417; Meng et al., 2024, eq. 6 (SimPO).
        https://arxiv.org/abs/2405.14734; Gupta et al., 2025 (AlphaPO). https://arxiv.org/abs/2501.03884
    """
    if loss_type not in get_args(CPOLossType):
        raise ValueError(f"loss_type must be one of {get_args(CPOLossType)}, got {loss_type!r}.")
    if weights is None:
        weights = row_weights(chosen, axis_name=axis_name)
    chosen, rejected = (jnp.where(weights == 0, 0, x) for x in (chosen, rejected))
    chosen_reward, rejected_reward = _alpha_reward(chosen, alpha), _alpha_reward(rejected, alpha)
    margin = chosen_reward - rejected_reward - (simpo_gamma / beta if loss_type == "simpo" else 0)
    losses = CPO_LINKS[loss_type](margin, LinkOptions(beta, label_smoothing))
    metrics = {"nll_loss": jnp.asarray(nll)}
    metrics |= _pair_metrics(chosen, rejected, beta * chosen_reward, beta * rejected_reward, weights)
    return weighted_sum(losses, weights) + cpo_alpha * nll, jax.lax.stop_gradient(metrics)


def _log_odds(log_probs: Array) -> Array:
    log_probs = jnp.minimum(log_probs, LARGEST_LOG_PROB)
    return log_probs - log1mexp(-log_probs)


def _alpha_reward(log_probs: Array, alpha: Numeric) -> Array:
    """Computes (1 - p^-α) / α, which is log p at α = 0."""
    alpha = jnp.asarray(alpha, log_probs.dtype)
    divisor = jnp.where(alpha == 0, 1, alpha)
    power = jnp.minimum(-divisor * log_probs, links.MAX_EXPONENT)
    return jnp.where(alpha == 0, log_probs, -jnp.expm1(power) / divisor)


def _pair_metrics(
    chosen: Array, rejected: Array, chosen_reward: Array, rejected_reward: Array, weights: Array
) -> Metrics:
    return {
        "rewards/chosen": weighted_sum(chosen_reward, weights),
        "rewards/rejected": weighted_sum(rejected_reward, weights),
        "rewards/accuracies": weighted_sum(chosen_reward > rejected_reward, weights),
        "rewards/margins": weighted_sum(chosen_reward - rejected_reward, weights),
        "logps/chosen": weighted_sum(chosen, weights),
        "logps/rejected": weighted_sum(rejected, weights),
    }
