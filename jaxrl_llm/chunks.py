"""Long arrays a piece at a time, so that what is computed from them need not all exist at once."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

T = TypeVar("T")


def map_time_chunks(
    function: Callable[..., T], *arrays: Array, axis: int, chunk_size: int, recompute: bool = True
) -> T:
    """Applies a function to chunks of positions, one after the other, and joins the results along time.

    Every chunk is computed again in the backward pass (unless `recompute` is False), so that what the function builds inside
    exists for `chunk_size` positions only, forward and backward.

    Args:
        function: `function(*chunks)`: arrays with `chunk_size` positions along `axis` in, a pytree of such arrays out.
            Positions must not depend on each other; the last chunk is filled up with zeros.
        arrays: With time along `axis`.
        axis: Counted from the front, so the axes behind it may differ.
        chunk_size: Positions at once; it need not divide the length.
        recompute: Whether to compute each chunk again in the backward pass; False for a function that sees to that itself.

    Raises:
        ValueError: If `chunk_size` is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 position, got {chunk_size}.")
    time = arrays[0].shape[axis]
    chunk_size = min(chunk_size, max(time, 1))
    num_chunks = -(-time // chunk_size)

    def split(x: Array) -> Array:
        """Pads time, and puts the chunks in front: [chunks, *batch, chunk, …]."""
        x = jnp.moveaxis(x, axis, 0)
        x = jnp.pad(x, [(0, num_chunks * chunk_size - time)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape(num_chunks, chunk_size, *x.shape[1:])
        return jnp.moveaxis(x, 1, axis + 1)

    def join(x: Array) -> Array:
        """Undoes `split`."""
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], num_chunks * chunk_size, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, time, axis=axis)

    of_chunk = jax.checkpoint(function) if recompute else function
    if num_chunks == 1:
        return of_chunk(*arrays)
    return jax.tree.map(join, jax.lax.map(lambda chunks: of_chunk(*chunks), tuple(map(split, arrays))))
