"""Links: from what a policy says of a pair of responses to a loss. Each is one equation of one paper.

The pairwise ones see the margin Δ by which the policy prefers the chosen response; the pointwise ones see the log-ratio
ρ = log π − log π_ref of each response. σ is the logistic function, ε the label smoothing.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid
from jaxtyping import Array, Float

from jaxrl_llm.types import Numeric

MAX_EXPONENT = 80.0
"""Exponents stop here: exp(80) is 5.5e34, near the largest float32, and infinity would turn gradients to NaN."""

Rows: TypeAlias = Float[Array, " batch"]


class LinkOptions(NamedTuple):
    """Numbers that links depend on; each link reads its own.

    Attributes:
        beta: β, strength of the pull to the reference.
        label_smoothing: ε, the probability that a label is wrong.
        discopop_tau: τ, temperature of DiscoPOP's blend.
    """

    beta: Numeric
    label_smoothing: Numeric = 0.0
    discopop_tau: Numeric = 0.05


# Pairwise: of the margin Δ.


def logistic(margin: Rows, options: LinkOptions) -> Rows:
    r"""DPO, eq. 7; with ε conservative DPO: maximum likelihood of the labels.

    $$ -(1-\epsilon)\log\sigma(\beta\Delta) - \epsilon\log\sigma(-\beta\Delta) $$
    """
    x, smoothing = options.beta * margin, options.label_smoothing
    return -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)


def hinge(margin: Rows, options: LinkOptions) -> Rows:
    r"""SLiC (https://arxiv.org/abs/2305.10425): a margin of 1 is enough.

    $$ \max(0, 1 - \beta\Delta) $$
    """
    return relu(1 - options.beta * margin)


def squared(margin: Rows, options: LinkOptions) -> Rows:
    r"""IPO (https://arxiv.org/abs/2310.12036, eq. 17): a margin of 1/(2β), neither more nor less.

    $$ (\Delta - 1/(2\beta))^2 $$
    """
    # The scores of f-DPO grow exponentially; the square of 1e18 is still a float32.
    return (jnp.clip(margin, -1e18, 1e18) - 0.5 / options.beta) ** 2


def exo(margin: Rows, options: LinkOptions) -> Rows:
    r"""EXO (https://arxiv.org/abs/2402.00856, eq. 16): the reverse KL from the smoothed label.

    $$ \mathrm{KL}\big((\sigma(\beta\Delta), \sigma(-\beta\Delta))\,\|\,(1-\epsilon, \epsilon)\big) $$
    """
    x, smoothing = options.beta * margin, options.label_smoothing
    kept = sigmoid(x) * (log_sigmoid(x) - jnp.log1p(-smoothing))
    return kept + sigmoid(-x) * (log_sigmoid(-x) - jnp.log(smoothing))


def robust(margin: Rows, options: LinkOptions) -> Rows:
    r"""Robust DPO (https://arxiv.org/abs/2403.00409): unbiased where a share ε of the labels is flipped.

    $$ [-(1-\epsilon)\log\sigma(\beta\Delta) + \epsilon\log\sigma(-\beta\Delta)] / (1-2\epsilon) $$
    """
    x, smoothing = options.beta * margin, options.label_smoothing
    return (-(1 - smoothing) * log_sigmoid(x) + smoothing * log_sigmoid(-x)) / (1 - 2 * smoothing)


def discopop(margin: Rows, options: LinkOptions) -> Rows:
    r"""DiscoPOP (https://arxiv.org/abs/2406.08414, eq. 5): logistic and exponential loss, blended.

    $$ -(1-w)\log\sigma(x) + w\,e^{-x}, \qquad x = \beta\Delta,\ w = \sigma(x/\tau) $$
    """
    x = options.beta * margin
    modulation = x / options.discopop_tau
    # As one exponent: where x is far below zero, w is zero and exp(-x) infinity.
    exponential = jnp.exp(jnp.minimum(log_sigmoid(modulation) - x, MAX_EXPONENT))
    return -sigmoid(-modulation) * log_sigmoid(x) + exponential


# Pointwise: of the log-ratios of both responses.


def nca(chosen: Rows, rejected: Rows, options: LinkOptions) -> Rows:
    r"""NCA (https://arxiv.org/abs/2402.05369): noise contrastive, each response for itself.

    $$ -\log\sigma(\beta\rho_c) - \tfrac12\log\sigma(-\beta\rho_c) - \tfrac12\log\sigma(-\beta\rho_r) $$
    """
    chosen, rejected = options.beta * chosen, options.beta * rejected
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco(chosen: Rows, rejected: Rows, options: LinkOptions) -> Rows:
    r"""BCO (https://arxiv.org/abs/2404.04656) of pairs, without the shift δ of `bco_loss`.

    $$ -\log\sigma(\beta\rho_c) - \log\sigma(-\beta\rho_r) $$
    """
    return -log_sigmoid(options.beta * chosen) - log_sigmoid(-options.beta * rejected)


def sppo(chosen: Rows, rejected: Rows, options: LinkOptions) -> Rows:
    r"""SPPO (https://arxiv.org/abs/2405.00675) with win rates of 1 and 0.

    $$ (\rho_c - 1/(2\beta))^2 + (\rho_r + 1/(2\beta))^2 $$
    """
    return (chosen - 0.5 / options.beta) ** 2 + (rejected + 0.5 / options.beta) ** 2


def apo_zero(chosen: Rows, rejected: Rows, options: LinkOptions) -> Rows:
    r"""APO-zero (https://arxiv.org/abs/2408.06266, eq. 7): chosen responses up, rejected ones down.

    $$ 1 - \sigma(\beta\rho_c) + \sigma(\beta\rho_r) $$
    """
    return sigmoid(-options.beta * chosen) + sigmoid(options.beta * rejected)


def apo_down(chosen: Rows, rejected: Rows, options: LinkOptions) -> Rows:
    r"""APO-down (https://arxiv.org/abs/2408.06266, eq. 8): both down, the rejected ones more.

    $$ \sigma(\beta\rho_c) + 1 - \sigma(\beta(\rho_c - \rho_r)) $$
    """
    return sigmoid(options.beta * chosen) + sigmoid(-options.beta * (chosen - rejected))


PairwiseLink: TypeAlias = Callable[[Rows, LinkOptions], Rows]
PointwiseLink: TypeAlias = Callable[[Rows, Rows, LinkOptions], Rows]


# Scores: what the policy is said to prefer, by the f-divergence that holds it to the reference.


def score(log_ratio: Rows, f_divergence_type: str, alpha: Numeric) -> Rows:
    r"""Computes $f'(\pi/\pi_{ref})$ from ρ = log π/π_ref: the implicit reward, up to β and a constant, of f-DPO.

    `reverse_kl` $\rho$ · `forward_kl` $1 - e^{-\rho}$ · `js_divergence` $\log 2 + \log\sigma(\rho)$ ·
    `alpha_divergence` $(e^{(\alpha-1)\rho} - 1)/(\alpha-1)$, which is ρ at α = 1.

    References:
        Wang et al., 2023, table 1. https://arxiv.org/abs/2309.16240
    """
    if f_divergence_type == "forward_kl":
        return 1 - jnp.exp(jnp.minimum(-log_ratio, MAX_EXPONENT))
    if f_divergence_type == "js_divergence":
        return jnp.log(2.0) + log_sigmoid(log_ratio)
    if f_divergence_type == "alpha_divergence":
        power = jnp.asarray(alpha, log_ratio.dtype) - 1
        limit = jnp.abs(power) < 1e-6
        power = jnp.where(limit, 1, power)
        return jnp.where(limit, log_ratio, jnp.expm1(jnp.minimum(power * log_ratio, MAX_EXPONENT)) / power)
    return log_ratio


def sort_over_axis(values: Rows, axis_name: str | None) -> Rows:
    """Sorts the values of all devices of a mapped axis, and returns as many as came: this device's part in the order."""
    if axis_name is None:
        return jnp.sort(values)
    everything = jnp.sort(jax.lax.all_gather(values, axis_name, tiled=True))
    return jax.lax.dynamic_slice_in_dim(everything, jax.lax.axis_index(axis_name) * len(values), len(values))
