import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.chunks import map_time_chunks

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)


def both(x, y):
    """Different ranks in, a tree of different ranks and dtypes out."""
    return {"dot": jnp.sum(x * y[..., None], -1), "sign": x > 0, "outer": x[..., None] * y[..., None, None]}


@pytest.mark.parametrize(
    ("rank", "time", "chunk_size"), [(0, 7, 3), (1, 7, 3), (1, 6, 2), (1, 1, 1), (1, 4, 9), (2, 5, 1)]
)
def test_chunks_are_joined_as_if_there_were_none(rank, time, chunk_size):
    rng = np.random.default_rng(time)
    leading = (2,) * rank
    x = jnp.asarray(rng.normal(size=(*leading, time, 3)).astype(np.float32))
    y = jnp.asarray(rng.normal(size=(*leading, time)).astype(np.float32))
    chunks = functools.partial(map_time_chunks, both, axis=rank, chunk_size=chunk_size)
    whole, chunked = jax.jit(lambda x, y: (both(x, y), chunks(x, y)))(x, y)
    for name, expected in whole.items():
        assert chunked[name].dtype == expected.dtype
        close(chunked[name], expected, err_msg=name)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 64])
def test_the_gradient_reaches_chunks_and_what_the_function_closes_over(chunk_size):
    x, weight = jnp.arange(10.0).reshape(2, 5) / 10, jnp.array(0.7)

    def total(x, weight):
        return map_time_chunks(lambda x: jnp.sin(weight * x), x, axis=1, chunk_size=chunk_size).sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(x, weight)
    close(grads[0], weight * jnp.cos(weight * x))
    close(grads[1], jnp.sum(x * jnp.cos(weight * x)))


def test_the_function_sees_one_chunk_at_a_time():
    seen = []

    def record(x):
        seen.append(x.shape)
        return x

    assert map_time_chunks(record, jnp.ones((2, 7, 3)), axis=1, chunk_size=4).shape == (2, 7, 3)
    assert set(seen) == {(2, 4, 3)}


def test_no_time_is_no_work():
    assert map_time_chunks(jnp.sin, jnp.ones((2, 0, 3)), axis=1, chunk_size=4).shape == (2, 0, 3)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_has_at_least_one_position(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1 position, got {chunk_size}"):
        map_time_chunks(jnp.sin, jnp.ones((2, 3)), axis=1, chunk_size=chunk_size)
