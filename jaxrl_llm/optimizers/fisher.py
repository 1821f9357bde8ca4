r"""Fisher information of distributions, as a product with a change of their outputs: what TRPO measures a step by.

A network gives `outputs` (logits, or means and deviations), and to second order its distribution moves away from where
it is by $\mathrm{KL} = \tfrac12\, \dot z^\top M \dot z$ when the outputs change by $\dot z$ (`tangents`). Each function
here returns $M \dot z$ (`cotangents`, in the form of the outputs), summed over samples with `weights`. Weights of 1/n
make the Fisher matrix that of the mean KL.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.chunks import map_time_chunks
from jaxrl_llm.optimizers.linear_solve import Product
from jaxrl_llm.reductions import mark_varying, sum_over_axis
from jaxrl_llm.types import Numeric, Params, Scalar

DistributionFunction: TypeAlias = Callable[[Params], Any]
"""`distribution_fn(params) -> outputs`: what parametrises the distributions of all samples, such as their logits."""
FisherFunction: TypeAlias = Callable[[Any, Any], Any]
"""`fisher_fn(outputs, tangents) -> cotangents`: one of those below, with the weights of the samples inside."""


def categorical_fisher(
    logits: Float[Array, "*shape vocab"], tangents: Float[Array, "*shape vocab"], *, weights: Float[Array, "*shape"]
) -> Float[Array, "*shape vocab"]:
    r"""Computes $w\, p \odot (\dot z - \langle p, \dot z \rangle)$, with $p$ the softmax of the logits.

    Args:
        logits: Unnormalised log-probabilities. (Probabilities would be silently taken for such.)
        tangents: A change of the logits.
        weights: Of each sample.

    Example:
        >>> categorical_fisher(jnp.zeros(2), jnp.array([1.0, 0.0]), weights=jnp.array(1.0)).tolist()
        [0.25, -0.25]
    """
    probs = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    tangents = jnp.where(probs > 0, tangents, 0)
    centred = tangents - jnp.sum(probs * tangents, axis=-1, keepdims=True)
    return jnp.where(weights[..., None] == 0, 0, weights[..., None] * probs * centred)


def gaussian_fisher(
    outputs: tuple[Float[Array, "*shape actions"], Float[Array, "*shape actions"]],
    tangents: tuple[Float[Array, "*shape actions"], Float[Array, "*shape actions"]],
    *,
    weights: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape actions"], Float[Array, "*shape actions"]]:
    r"""Computes $w\, \dot\mu / \sigma^2$ and $2 w\, \dot{(\log\sigma)}$, for Gaussians with diagonal covariance.

    Args:
        outputs: Means, and logarithms of the standard deviations, broadcast to the same shape.
        tangents: A change of both.
        weights: Of each sample.
    """
    (_, log_std), (d_mean, d_log_std) = outputs, tangents
    weights = weights[..., None]
    of_mean, of_log_std = weights * d_mean * jnp.exp(-2 * log_std), 2 * weights * d_log_std
    return jnp.where(weights == 0, 0, of_mean), jnp.where(weights == 0, 0, of_log_std)


def chunked_categorical_fisher(
    outputs: tuple[Float[Array, "*batch time hidden"], Float[Array, "hidden vocab"]],
    tangents: tuple[Float[Array, "*batch time hidden"], Float[Array, "hidden vocab"]],
    *,
    weights: Float[Array, "*batch time"],
    temperature: Numeric = 1.0,
    chunk_size: int = 128,
) -> tuple[Float[Array, "*batch time hidden"], Float[Array, "hidden vocab"]]:
    r"""Computes the product with the Fisher of softmax(hidden @ kernel / temperature), in chunks of time.

    With $\dot z = (\dot h K + h \dot K) / T$ and $g = w\, p \odot (\dot z - \langle p, \dot z\rangle) / T$ it is
    $(g K^\top, h^\top g)$: the gradient of $\tfrac12 \sum w\, \mathrm{Var}_p(\dot z)$ with respect to
    $(\dot h, \dot K)$, and so it is computed. Logits exist for `chunk_size` positions of each row only.

    Args:
        outputs: Last hidden states, and the kernel of the head. The kernel counts as an output because training moves
            it too, above all where it is the token embedding.
        tangents: A change of both; zeros for a head that is not trained.
        weights: Of each position; 0 for what is no token of a completion.
        temperature: Positive divisor of the logits, that of the sampling.
        chunk_size: Positions along time whose logits exist at once.
    """
    hidden, kernel = outputs

    def variance(d_kernel: Array, hidden: Array, d_hidden: Array, weights: Array) -> Array:
        probs = jax.nn.softmax(_logits(hidden, kernel) / temperature, axis=-1)
        change = (_logits(d_hidden, kernel) + _logits(hidden, d_kernel)) / temperature
        centred = change - jnp.sum(probs * change, axis=-1, keepdims=True)
        return jnp.where(weights == 0, 0, weights * jnp.sum(probs * centred**2, axis=-1))

    def half_of_the_sum(tangents: tuple[Array, Array]) -> Scalar:
        d_hidden, d_kernel = tangents

        of_chunk = functools.partial(variance, d_kernel)
        arrays = hidden, d_hidden, weights
        return jnp.sum(map_time_chunks(of_chunk, *arrays, axis=hidden.ndim - 2, chunk_size=chunk_size)) / 2

    return jax.grad(half_of_the_sum)(tangents)


def fisher_vector_product(
    distribution_fn: DistributionFunction,
    fisher_fn: FisherFunction,
    params: Params,
    *,
    damping: Numeric = 0.0,
    axis_name: str | None = None,
) -> Product:
    r"""Makes $v \mapsto F v + \lambda v$, with the Gauss-Newton form $F = J^\top M J$ of the Fisher matrix.

    $J$ is the Jacobian of the outputs and $M$ the Fisher of the distribution in its outputs. At the parameters where the
    KL is zero, $F$ is its Hessian; this form needs no second derivatives, and is positive semidefinite whatever the rounding.
    The forward pass is run once and its activations are kept, as a gradient keeps them; what a gradient would compute again
    (in a decoder all but products with parameters, with `remat` whole blocks), each product does.

    Args:
        distribution_fn: `distribution_fn(params) -> outputs`.
        fisher_fn: `fisher_fn(outputs, tangents) -> cotangents`, with the weights of the samples inside.
        params: Where the distribution is linearised.
        damping: λ, at least 0.
        axis_name: Mapped axis to sum over; outputs are then those of this device's samples, and weights the global ones.

    Returns:
        The product, of trees like the parameters, in at least float32.
    """
    outputs, jvp = jax.linearize(distribution_fn, mark_varying(params, axis_name))
    transpose = jax.linear_transpose(jvp, mark_varying(params, axis_name))

    def product(vector: Params) -> Params:
        tangents = jvp(mark_varying(jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params), axis_name))
        cotangents = jax.tree.leaves(fisher_fn(outputs, tangents))
        like = jax.tree.unflatten(jax.tree.structure(outputs), cotangents)
        (result,) = transpose(jax.tree.map(lambda c, o: c.astype(o.dtype), like, outputs))
        result = sum_over_axis(at_least_float32(result), axis_name)
        return optax.tree.add_scale(result, damping, vector)

    return product


def at_least_float32(tree: Params) -> Params:
    """Converts shorter floats to float32: sums over a conjugate-gradient solve need its digits."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _logits(hidden: Array, kernel: Array) -> Array:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype)
