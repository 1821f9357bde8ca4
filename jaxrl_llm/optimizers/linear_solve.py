"""Linear equations whose matrix is known by its products with vectors only; vectors are trees."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.types import Numeric, Params, Scalar

Product: TypeAlias = Callable[[Params], Params]
"""`product(vector) -> matrix @ vector`."""


def conjugate_gradient(product: Product, target: Params, *, iterations: int) -> tuple[Params, Params]:
    r"""Solves $A x = b$ for a positive (semi)definite $A$ by a fixed number of conjugate-gradient iterations from x = 0.

    Once the residual is down to rounding errors nothing more happens. (Going on would divide noise by noise, and walk along
    directions that the matrix does not see.)

    Args:
        product: $v \mapsto A v$, on trees.
        target: $b$.
        iterations: As many as the dimensions solve exactly, rounding apart; few go far if eigenvalues cluster.

    Returns:
        $x$, and the residual $b - A x$ (by recursion, so equal to it up to rounding, and without one more product).

    References:
        Hestenes and Stiefel, 1952.
    """

    def iterate(_: Any, carry: tuple[Params, Params, Params, Scalar]) -> tuple[Params, Params, Params, Scalar]:
        x, residual, search, square = carry
        curved = product(search)
        size = jnp.where(square > floor, ratio(square, dot(search, curved)), 0)
        x = optax.tree.add_scale(x, size, search)
        residual = optax.tree.add_scale(residual, -size, curved)
        new_square = dot(residual, residual)
        return x, residual, optax.tree.add_scale(residual, ratio(new_square, square), search), new_square

    square = dot(target, target)
    floor = square * (10 * jnp.finfo(square.dtype).eps) ** 2
    start = optax.tree.zeros_like(target), target, target, square
    return jax.lax.fori_loop(0, iterations, iterate, start)[:2]


def dot(a: Params, b: Params) -> Scalar:
    """Computes the inner product of two trees."""
    return jnp.asarray(optax.tree.vdot(a, b))


def ratio(numerator: Numeric, denominator: Scalar) -> Scalar:
    """Divides by what is positive; 0 otherwise."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)
