"""The terms that GRPO and its kin put in the place of ratio × advantage: each is its equation, and nothing else.

A surrogate takes a `Sample` and a `Shape` and returns a loss for each token, before masks, KL and averaging.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.losses.ratios import MAX_LOG_RATIO, clipped_surrogate, row_mean
from jaxrl_llm.types import Numeric

MIN_LOG_WEIGHT = math.log(1e-8)
"""VESPO holds the weight of a sequence above 1e-8."""


class Sample(NamedTuple):
    """What a surrogate is a function of, with zeros where masked.

    Attributes:
        log_probs: Of each token under the policy being trained, nats.
        log_ratio: Of each token, log π − log π_old, whatever the level of the ratio.
        ratio: At the level that was asked for.
        advantages: Constants.
        mask: Which tokens count.
        kept: Those of them that the policy term learns from (the others have a low entropy).
        correction: Weights for a behaviour policy that differs, or None.
    """

    log_probs: Float[Array, "batch time"]
    log_ratio: Float[Array, "batch time"]
    ratio: Float[Array, "batch time"]
    advantages: Float[Array, "batch time"]
    mask: Bool[Array, "batch time"]
    kept: Bool[Array, "batch time"]
    correction: Float[Array, "batch #time"] | None = None


class Shape(NamedTuple):
    """Settings of the surrogates; the names are those of `grpo_loss`."""

    epsilon: Numeric = 0.2
    epsilon_high: Numeric = 0.2
    delta: Numeric | None = None
    sapo_temperature_pos: Numeric = 1.0
    sapo_temperature_neg: Numeric = 1.05
    vespo_k_pos: Numeric = 2.0
    vespo_lambda_pos: Numeric = 3.0
    vespo_k_neg: Numeric = 3.0
    vespo_lambda_neg: Numeric = 2.0


Surrogate: TypeAlias = Callable[[Sample, Shape], Float[Array, "batch time"]]


def clipped(sample: Sample, shape: Shape) -> Float[Array, "batch time"]:
    r"""Computes $-\min(\min(r, \delta) A, \mathrm{clip}(r, 1-\epsilon, 1+\epsilon_{high}) A)$, see `clipped_surrogate`."""
    clip = 1 - shape.epsilon, 1 + shape.epsilon_high
    return clipped_surrogate(sample.ratio, sample.advantages, *clip, max_ratio=shape.delta)


def capped(sample: Sample, shape: Shape) -> Float[Array, "batch time"]:
    r"""Computes CISPO's $-\mathrm{sg}(\min(r, \epsilon_{high}))\,A \log\pi$: no token loses its gradient.

    References:
        MiniMax, 2025, eq. 4. https://arxiv.org/abs/2506.13585
    """
    weight = jax.lax.stop_gradient(jnp.minimum(sample.ratio, shape.epsilon_high))
    return -weight * sample.advantages * sample.log_probs


def gated(sample: Sample, shape: Shape) -> Float[Array, "batch time"]:
    r"""Computes SAPO's $-\frac{4}{\tau}\sigma(\tau(r-1))\,A$: a soft gate, of slope 1 at ratio one, in place of the clip.

    References:
        Gao et al., 2025, eq. 6 to 8. https://arxiv.org/abs/2511.20347
    """
    positive = sample.advantages > 0
    temperature = jnp.where(positive, shape.sapo_temperature_pos, shape.sapo_temperature_neg)
    return -jax.nn.sigmoid(temperature * (sample.ratio - 1)) * 4 / temperature * sample.advantages


def gamma_weights(sample: Sample, shape: Shape) -> Float[Array, "batch time"]:
    r"""Computes VESPO's constants $\phi(W) = \exp(\lambda + k \log W - \lambda W)$.

    $W$ is the ratio of the whole sequence, a product over its tokens (and over their corrections), and $\phi(1) = 1$.
    """
    log_weight = sample.log_ratio.sum(-1, keepdims=True)
    if sample.correction is not None:
        given = jnp.where(sample.mask if sample.correction.shape[-1] > 1 else True, sample.correction, 1)
        log_weight += jnp.clip(jnp.log(given), MIN_LOG_WEIGHT, MAX_LOG_RATIO).sum(-1, keepdims=True)
    log_weight = jnp.clip(log_weight, MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    good = sample.advantages >= 0
    power = jnp.where(good, shape.vespo_k_pos, shape.vespo_k_neg)
    rate = jnp.maximum(jnp.where(good, shape.vespo_lambda_pos, shape.vespo_lambda_neg), 1e-4)
    return jax.lax.stop_gradient(jnp.exp(rate + power * log_weight - rate * jnp.exp(log_weight)))


def gamma_weighted(sample: Sample, shape: Shape) -> Float[Array, "batch time"]:
    r"""Computes VESPO's $-\mathrm{sg}(\phi(W))\,A \log\pi$, with `gamma_weights`.

    References:
        Shen et al., 2026. https://arxiv.org/abs/2602.10693
    """
    return -gamma_weights(sample, shape) * sample.advantages * sample.log_probs


def geometric(sample: Sample, shape: Shape) -> Float[Array, "batch time"]:
    r"""Computes GMPO's $-A \exp(\frac1L\sum_t \ell'_t)$: the mean of log-ratios that are clipped token by token.

    The clip is of the log-ratio, to [−ε, ε_high], on the side that the advantage asks for.

    References:
        Zhao et al., 2025, eq. 4. https://arxiv.org/abs/2507.20673
    """
    near = jnp.clip(sample.log_ratio, -shape.epsilon, shape.epsilon_high)
    pessimistic = jnp.where(
        sample.advantages > 0, jnp.minimum(sample.log_ratio, near), jnp.maximum(sample.log_ratio, near)
    )
    return -jnp.exp(row_mean(pessimistic, sample.kept)) * sample.advantages
