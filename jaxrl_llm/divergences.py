"""Distances between distributions: exact where the logits are at hand, estimated where only samples are."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KLEstimator: TypeAlias = Literal["k1", "k2", "k3"]


def categorical_kl(
    logits_p: Float[Array, "*shape vocab"], logits_q: Float[Array, "*shape vocab"]
) -> Float[Array, "*shape"]:
    r"""Computes the exact $\mathrm{KL}(p\,\|\,q) = \sum_v p_v (\log p_v - \log q_v)$ of two categoricals, in nats.

    Entries that `p` excludes (a logit of -inf) count as 0.

    Args:
        logits_p: Unnormalised log-probabilities of the distribution that the mean is taken under.
        logits_q: The same of the other.

    Example:
        >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
        >>> round(float(categorical_kl(p, q)), 6)
        0.143841
    """
    dtype = jnp.promote_types(logits_p.dtype, jnp.float32)
    log_p = jax.nn.log_softmax(logits_p.astype(dtype), axis=-1)
    log_q = jax.nn.log_softmax(logits_q.astype(dtype), axis=-1)
    possible = log_p > -jnp.inf
    difference = jnp.where(possible, log_p, 0) - jnp.where(possible, log_q, 0)
    return jnp.sum(jnp.where(possible, jnp.exp(log_p), 0) * difference, axis=-1)


def kl_estimate(
    log_probs: Float[Array, "*shape"], ref_log_probs: Float[Array, "*shape"], estimator: KLEstimator = "k3"
) -> Float[Array, "*shape"]:
    r"""Estimates $\mathrm{KL}(\pi\,\|\,\pi_{ref})$ for each sample drawn from $\pi$.

    With $d = \log\pi - \log\pi_{ref}$: `k1` $= d$ (unbiased, may be negative), `k2` $= d^2/2$ (biased, low variance),
    `k3` $= e^{-d} + d - 1$ (unbiased, never negative). As a term of a loss, `k1` has a gradient of mean zero under
    $\pi$, so it does nothing; use `k2` or `k3` there, and `k1` or `k3` in a reward.

    Args:
        log_probs: Log-probabilities of the sampled tokens under the policy, nats.
        ref_log_probs: The same under the reference.
        estimator: `k1`, `k2` or `k3`.

    Raises:
        ValueError: If `estimator` is none of these.

    References:
        Schulman, 2020, "Approximating KL divergence". http://joschu.net/blog/kl-approx.html
    """
    difference = log_probs - ref_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"estimator must be one of {get_args(KLEstimator)}, got {estimator!r}.")
