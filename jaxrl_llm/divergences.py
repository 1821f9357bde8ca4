"""Distances between distributions: exact where the logits are at hand, estimated where only samples are."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.chunks import map_time_chunks
from jaxrl_llm.types import Numeric

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
    return _kl(_log_softmax(logits_p), _log_softmax(logits_q))


def gaussian_kl(
    mean_p: Float[Array, "*shape actions"],
    log_std_p: Float[Array, "*shape actions"],
    mean_q: Float[Array, "*shape actions"],
    log_std_q: Float[Array, "*shape actions"],
) -> Float[Array, "*shape"]:
    r"""Computes the exact $\mathrm{KL}(p\,\|\,q)$ of two Gaussians with diagonal covariance, in nats.

    $$ \sum_i \log\frac{\sigma_{q,i}}{\sigma_{p,i}} + \frac{\sigma_{p,i}^2 + (\mu_{p,i} - \mu_{q,i})^2}{2\sigma_{q,i}^2}
    - \frac12 $$

    Args:
        mean_p: Mean of the distribution that the divergence averages under.
        log_std_p: Logarithm of its standard deviations.
        mean_q: Mean of the other.
        log_std_q: Logarithm of its standard deviations.

    Example:
        >>> zero, one = jnp.zeros(1), jnp.ones(1)
        >>> float(gaussian_kl(one, zero, zero, zero))
        0.5
    """
    difference = log_std_p - log_std_q
    # expm1(2d) - 2d and not a ratio of variances: exactly 0 for equal ones, and few digits lost for close ones.
    spread = jnp.expm1(2 * difference) - 2 * difference
    return jnp.sum(spread + ((mean_p - mean_q) * jnp.exp(-log_std_q)) ** 2, axis=-1) / 2


def _log_softmax(logits: Array, temperature: Numeric = 1.0) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature, axis=-1)


def _kl(log_p: Array, log_q: Array) -> Array:
    """Computes the divergence of normalised log-probabilities."""
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


def generalized_jsd(
    student_logits: Float[Array, "*shape vocab"],
    teacher_logits: Float[Array, "*shape vocab"],
    *,
    beta: Numeric = 0.5,
    temperature: Numeric = 1.0,
) -> Float[Array, "*shape"]:
    r"""Computes the generalised Jensen-Shannon divergence of teacher $T$ and student $S$ at each position, in nats.

    $$ \beta\,\mathrm{KL}(T\|M) + (1-\beta)\,\mathrm{KL}(S\|M), \qquad M = \beta T + (1-\beta) S $$

    and at the ends, where this would be 0, $\mathrm{KL}(T\|S)$ for β = 0 and $\mathrm{KL}(S\|T)$ for β = 1: its limits
    divided by β or 1 − β.

    Args:
        student_logits: Unnormalised log-probabilities of the student.
        teacher_logits: Those of the teacher.
        beta: In [0, 1].
        temperature: Positive divisor of both.

    References:
        Agarwal et al., 2024, eq. 1. https://arxiv.org/abs/2306.13649
    """
    student, teacher = (_log_softmax(x, temperature) for x in (student_logits, teacher_logits))
    beta = jnp.asarray(beta, student.dtype)
    share = jnp.clip(beta, 0, 1)
    # What both exclude stays out of the mixture: the sum of two zeros has no logarithm, and NaN for a gradient.
    possible = (student > -jnp.inf) | (teacher > -jnp.inf)
    mixture = jnp.logaddexp(
        jnp.where(possible, student, 0) + jnp.log1p(-share), jnp.where(possible, teacher, 0) + jnp.log(share)
    )
    # At the ends the mixture is one of the two, and the divergence of the other from it is what remains.
    of_teacher = jnp.where(beta >= 1, 0, jnp.where(beta <= 0, 1, beta))
    of_student = jnp.where(beta <= 0, 0, jnp.where(beta >= 1, 1, 1 - beta))
    return of_teacher * _kl(teacher, mixture) + of_student * _kl(student, mixture)


def chunked_generalized_jsd(
    student_hidden: Float[Array, "*batch time student_hidden"],
    student_kernel: Float[Array, "student_hidden vocab"],
    teacher_hidden: Float[Array, "*batch time teacher_hidden"],
    teacher_kernel: Float[Array, "teacher_hidden vocab"],
    *,
    beta: Numeric = 0.5,
    temperature: Numeric = 1.0,
    chunk_size: int = 128,
) -> Float[Array, "*batch time"]:
    """Computes `generalized_jsd(student_hidden @ student_kernel, teacher_hidden @ teacher_kernel)` in chunks of time.

    Logits exist for `chunk_size` positions of each row only, in the forward and in the backward pass.

    Args:
        student_hidden: Last hidden states of the student.
        student_kernel: Its head.
        teacher_hidden: Last hidden states of the teacher, for the same positions.
        teacher_kernel: Its head; the vocabulary is the student's.
        beta: As in `generalized_jsd`.
        temperature: As in `generalized_jsd`.
        chunk_size: Positions along time whose logits exist at once.
    """

    def logits(hidden: Array, kernel: Array) -> Array:
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype)

    def jsd(student_hidden: Array, teacher_hidden: Array) -> Array:
        return generalized_jsd(
            logits(student_hidden, student_kernel),
            logits(teacher_hidden, teacher_kernel),
            beta=beta,
            temperature=temperature,
        )

    axis = student_hidden.ndim - 2
    return map_time_chunks(jsd, student_hidden, teacher_hidden, axis=axis, chunk_size=chunk_size)
