"""The chunked Fisher of a language model's head against the dense one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.optimizers import categorical_fisher, chunked_categorical_fisher, gaussian_fisher

ROWS, TIME, HIDDEN, VOCAB, TEMPERATURE = 2, 7, 3, 5, 0.7


def arrays(dtype=np.float32, shapes=((ROWS, TIME, HIDDEN), (HIDDEN, VOCAB)), seed=0):
    rng = np.random.default_rng(seed)
    outputs, tangents = (tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes) for _ in range(2))
    weights = rng.uniform(size=(ROWS, TIME))
    weights[1, 4:] = 0
    return outputs, tangents, jnp.asarray(weights, dtype)


def dense(outputs, tangents, weights, temperature=TEMPERATURE):
    def logits(hidden, kernel):
        return hidden @ kernel / temperature

    z, d_z = jax.jvp(logits, outputs, tangents)
    return jax.vjp(logits, *outputs)[1](categorical_fisher(z, d_z, weights=weights))


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_the_chunked_product_equals_the_dense_one(chunk_size):
    with jax.enable_x64(True):
        outputs, tangents, weights = arrays(np.float64)
        chunked = functools.partial(chunked_categorical_fisher, temperature=TEMPERATURE, chunk_size=chunk_size)
        found = jax.jit(chunked)(outputs, tangents, weights=weights)
        expected = dense(outputs, tangents, weights)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    assert np.abs(found[1]).max() > 0.01
    np.testing.assert_array_equal(found[0][1, 4:], 0)


def test_positions_without_weight_may_hold_anything():
    outputs, _, weights = arrays()
    z = outputs[0] @ outputs[1]
    found = categorical_fisher(z.at[1, 5].set(jnp.nan), z, weights=weights)
    np.testing.assert_array_equal(found, categorical_fisher(z, z, weights=weights))
    means, _ = gaussian_fisher((z, jnp.zeros_like(z)), (z.at[1, 5].set(jnp.nan), z), weights=weights)
    np.testing.assert_allclose(means, weights[..., None] * z, rtol=1e-6)


def test_actions_that_are_excluded_have_no_part_in_it():
    logits = jnp.array([[0.5, -0.2, -jnp.inf]])
    found = categorical_fisher(logits, jnp.array([[1.0, 2.0, jnp.nan]]), weights=jnp.ones(1))
    expected = categorical_fisher(logits[:, :2], jnp.array([[1.0, 2.0]]), weights=jnp.ones(1))
    np.testing.assert_allclose(found[:, :2], expected, rtol=1e-6)
    assert found[0, 2] == 0


def largest_array(program):
    """The number of elements of the largest array that a compiled program ever holds."""
    shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def test_logits_of_all_positions_never_exist():
    rows, time, hidden, vocab = 2, 64, 4, 1009
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.normal(size=(rows, time, hidden))), jnp.asarray(rng.normal(size=(hidden, vocab)))
    outputs = jax.tree.map(lambda x: x.astype(jnp.float32), outputs)
    weights = jnp.ones((rows, time))
    chunked = jax.jit(functools.partial(chunked_categorical_fisher, chunk_size=4))
    assert largest_array(chunked.lower(outputs, outputs, weights=weights).compile()) <= rows * 4 * vocab
    assert largest_array(jax.jit(dense).lower(outputs, outputs, weights).compile()) >= rows * time * vocab
