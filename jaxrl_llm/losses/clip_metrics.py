"""What the clips of a loss did: shares of the tokens whose gradient they removed."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.losses import surrogates
from jaxrl_llm.losses.ratios import outside_clip
from jaxrl_llm.reductions import weighted_sum
from jaxrl_llm.types import Metrics, Numeric


def surrogate_metrics(
    surrogate: surrogates.Surrogate, sample: surrogates.Sample, shape: surrogates.Shape, weights: Array
) -> Metrics:
    """Computes what TRL logs of each surrogate; nothing where there is no clip."""
    ratio, advantages = sample.ratio, sample.advantages
    if surrogate is surrogates.capped:
        return {"cispo_clip_ratio": weighted_sum((ratio > shape.epsilon_high) & (advantages > 0), weights)}
    if surrogate is surrogates.gamma_weighted:
        return {"vespo/phi_seq_mean": weighted_sum(surrogates.gamma_weights(sample, shape), weights)}
    if surrogate is surrogates.geometric:
        return clip_metrics(sample.log_ratio, advantages, (-shape.epsilon, shape.epsilon_high), sample.mask, weights)
    if surrogate is surrogates.clipped:
        return clip_metrics(ratio, advantages, (1 - shape.epsilon, 1 + shape.epsilon_high), sample.mask, weights)
    return {}


def clip_metrics(
    ratio: Float[Array, "batch time"],
    advantages: Float[Array, "batch time"],
    clip: tuple[Numeric, Numeric],
    mask: Bool[Array, "batch time"],
    weights: Float[Array, "batch time"],
) -> Metrics:
    """Computes the shares of tokens, and of the rows' tokens the extremes, whose gradient a clip removed."""
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
