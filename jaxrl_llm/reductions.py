"""How values become a mean: weights made once, from the whole batch, and a sum.

A loss here is the sum of weight × value. A sum is the same however it is split, so micro-batches and devices add up
exactly, whatever the lengths of the rows. All functions take `axis_name`, the mapped axis of `jax.pmap` or
`jax.shard_map`: counts are then summed over its devices, so the weights of each device are its part of the global ones.
"""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar

Reduction: TypeAlias = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


class LossWeights(NamedTuple):
    """Weights of the terms of a loss, each made from the whole batch. One array for all terms serves too.

    Attributes:
        policy: Of the policy (or likelihood) term and of a KL penalty, `[*shape]`.
        tokens: Of metrics and of the entropy bonus, usually the token mean, `[*shape]`.
        value: Of the value loss, `[*value_shape]`.
        entropy: Of the entropy bonus where that is over other tokens than the metrics; else None.
    """

    policy: Float[Array, "*shape"]
    tokens: Float[Array, "*shape"]
    value: Float[Array, "*value_shape"]
    entropy: Float[Array, "*shape"] | None = None


def sum_over_axis(tree: Any, axis_name: str | None) -> Any:
    """Sums every leaf over the devices of `axis_name`; without a name, returns the tree as it is."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def mark_varying(tree: Any, axis_name: str | None) -> Any:
    """Marks replicated leaves as varying over the axis, so that the gradient is this device's share.

    (Under `shard_map` with check_vma, the gradient of a replicated leaf would be summed over devices by itself, and
    our own sum would count it once for each device. Under `vmap` there is nothing to mark.)
    """
    if axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
        return tree

    def mark(x: Array) -> Array:
        return x if axis_name in jax.typeof(x).manual_axis_type.varying else jax.lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(mark, tree)


def token_weights(
    mask: Mask,
    reduction: Reduction,
    *,
    max_length: Numeric | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*shape"]:
    r"""Computes the weight of each token, so that a loss is the sum of weight × value.

    With $m$ the mask, $L_b = \sum_t m_{bt}$ and $B$ the number of rows of the whole batch (empty ones included):
    `token_mean` $m / \sum m$ · `sequence_mean` $m / (L_b B)$ · `sequence_sum` $m / B$ · `constant` $m / (B\,L_{max})$.

    Args:
        mask: Nonzero where a token counts; rows along the last axis are sequences.
        reduction: One of the four names above. `token_mean`: SFT, bnpo, dapo; `sequence_mean`: grpo;
            `constant`: dr_grpo.
        max_length: Length in tokens that `constant` divides by; the longest completion that generation allows.
        axis_name: Mapped axis over whose devices rows and tokens are counted.

    Returns:
        Weights of the shape of the mask; zero where the mask is. An empty batch has weights of zero.

    Raises:
        ValueError: If `reduction` is unknown, or `constant` comes without `max_length`.

    Example:
        >>> token_weights(jnp.array([[1, 1, 0], [1, 1, 1]]), "token_mean").tolist()[0]
        [0.20000000298023224, 0.20000000298023224, 0.0]
    """
    mask = jnp.asarray(mask)
    ones = (mask != 0).astype(jnp.promote_types(jnp.float32, mask.dtype))
    rows = sum_over_axis(jnp.asarray(ones.size // max(ones.shape[-1], 1), ones.dtype), axis_name)
    if reduction == "token_mean":
        return ones / jnp.maximum(sum_over_axis(ones.sum(), axis_name), 1)
    if reduction == "sequence_mean":
        return ones / (jnp.maximum(ones.sum(-1, keepdims=True), 1) * rows)
    if reduction == "sequence_sum":
        return ones / rows
    if reduction == "constant":
        if max_length is None:
            raise ValueError(
                "token_weights(reduction='constant') needs max_length, the number of tokens to divide each row by "
                "(for dr_grpo: max_completion_length)."
            )
        return ones / (rows * max_length)
    raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}.")


def loss_weights(
    mask: Mask,
    reduction: Reduction,
    *,
    value_mask: Mask | None = None,
    max_length: Numeric | None = None,
    axis_name: str | None = None,
) -> LossWeights:
    """Makes the weights of a whole batch: `reduction` for the policy term, the token mean for the others.

    Args:
        mask: Nonzero where a token counts.
        reduction: How the policy term is averaged, see `token_weights`.
        value_mask: Nonzero where a value prediction counts; `mask` if not given.
        max_length: See `token_weights`.
        axis_name: Mapped axis to count over.
    """
    tokens = token_weights(mask, "token_mean", axis_name=axis_name)
    return LossWeights(
        policy=token_weights(mask, reduction, max_length=max_length, axis_name=axis_name),
        tokens=tokens,
        value=tokens if value_mask is None else token_weights(value_mask, "token_mean", axis_name=axis_name),
    )


def as_loss_weights(weights: Shaped[Array, "*shape"] | LossWeights) -> LossWeights:
    """Reads one array as the weights of every term."""
    return weights if isinstance(weights, LossWeights) else LossWeights(weights, weights, weights)


def row_weights(rows: Shaped[Array, " batch"], *, axis_name: str | None = None) -> Float[Array, " batch"]:
    """Computes the weights of a plain mean over rows, 1 / (rows of all devices)."""
    return token_weights(jnp.ones_like(rows, bool), "token_mean", axis_name=axis_name)


def weighted_sum(values: Shaped[Array, "*shape"], weights: Float[Array, "*shape"]) -> Scalar:
    """Computes the sum of weight × value, reading no value whose weight is zero (NaN there does no harm)."""
    return jnp.sum(jnp.where(weights == 0, 0, values) * weights)


def masked_mean(values: Float[Array, "*shape"], mask: Mask, *, axis_name: str | None = None) -> Scalar:
    """Computes the mean of the unmasked values (of all devices of `axis_name`); 0 if there are none."""
    counts = (jnp.asarray(mask) != 0).astype(values.dtype)  # So that the weights are as exact as the values.
    return sum_over_axis(weighted_sum(values, token_weights(counts, "token_mean", axis_name=axis_name)), axis_name)


def _masked_variance(values: Array, mask: Mask, mean: Array, axis_name: str | None) -> Array:
    mask = jnp.asarray(mask) != 0
    squares = jnp.sum(jnp.where(mask, jnp.where(mask, values, 0) - mean, 0) ** 2)
    squares, count = sum_over_axis((squares, mask.sum()), axis_name)
    return squares / jnp.maximum(count - 1, 1)


def masked_std(values: Float[Array, "*shape"], mask: Mask, *, axis_name: str | None = None) -> Scalar:
    """Computes the sample standard deviation (ddof 1, as TRL) of the unmasked values; 0 for fewer than two.

    The gradient at a deviation of zero is zero, not NaN.
    """
    variance = _masked_variance(values, mask, masked_mean(values, mask, axis_name=axis_name), axis_name)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def masked_standardize(
    values: Float[Array, "*shape"],
    mask: Mask,
    *,
    shift_mean: bool = True,
    epsilon: Numeric = 1e-8,
    axis_name: str | None = None,
) -> Float[Array, "*shape"]:
    r"""Computes $(x - \bar x) / \sqrt{s^2 + \epsilon}$ over the unmasked values ("whitening"), zero elsewhere.

    Values that are all equal give exactly 0: Adam would make a whole step of a rounding error.

    Args:
        values: What to standardise.
        mask: Nonzero where a value counts, for the statistics and in the result.
        shift_mean: If False, the mean is added back after scaling, as TRL does for rewards.
        epsilon: Added to the sample variance (ddof 1).
        axis_name: Mapped axis over whose devices the statistics are taken.
    """
    mask = jnp.asarray(mask) != 0
    lowest = jax.lax.stop_gradient(jnp.min(jnp.where(mask, values, jnp.inf)))
    lowest = lowest if axis_name is None else jax.lax.pmin(lowest, axis_name)
    values = jnp.where(mask, values - lowest, 0)  # Equal values are 0 from their mean then, which may be rounded.
    mean = masked_mean(values, mask, axis_name=axis_name)
    scaled = (values - mean) * jax.lax.rsqrt(_masked_variance(values, mask, mean, axis_name) + epsilon)
    return jnp.where(mask, scaled if shift_mean else scaled + mean + lowest, 0)


def _combines_by(name: str) -> str:
    words = name.rsplit("/", 1)[-1].split("_")
    return "min" if "min" in words else "max" if "max" in words else "sum"


def combine_metrics(metrics: dict[str, Num[Array, " parts"]]) -> Metrics:
    """Joins the metrics of the parts of a batch, stacked along the first axis, into those of the batch.

    The last part of the name says how: by minimum or maximum if one of its words is `min` or `max`
    (`completions/min_length`, `clip_ratio/high_max`), else by the sum of shares.
    """
    join = {"min": jnp.min, "max": jnp.max, "sum": jnp.sum}
    return {name: join[_combines_by(name)](value, axis=0) for name, value in metrics.items()}


def average_metrics(metrics: dict[str, Num[Array, " steps"]]) -> Metrics:
    """Joins the metrics of several steps into their means, or the least and largest where their names say so."""
    join = {"min": jnp.min, "max": jnp.max, "sum": jnp.mean}
    return {name: join[_combines_by(name)](value, axis=0) for name, value in metrics.items()}


def combine_metrics_over_axis(metrics: Metrics, axis_name: str | None) -> Metrics:
    """Joins the metrics of all devices of a mapped axis, as `combine_metrics` does for parts of a batch."""
    if axis_name is None:
        return metrics
    join = {"min": jax.lax.pmin, "max": jax.lax.pmax, "sum": jax.lax.psum}
    return {name: join[_combines_by(name)](value, axis_name) for name, value in metrics.items()}
