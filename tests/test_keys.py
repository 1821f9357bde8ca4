"""Fast keys: the numbers of jax's own generator, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.keys import fast

DRAWS = {
    "bits": lambda key: jax.random.bits(key, (3, 5)),
    "bytes": lambda key: jax.random.bits(key, (7,), "uint8"),
    "a number": lambda key: jax.random.uniform(key),
    "normal": lambda key: jax.random.normal(key, (1000,)),
    "categories": lambda key: jax.random.categorical(key, jnp.zeros((4, 9))),
    "permutation": lambda key: jax.random.permutation(key, 100),
    "split": lambda key: jax.random.key_data(jax.random.split(key, (2, 3))),
    "folded": lambda key: jax.random.key_data(jax.random.fold_in(key, 2**31 + 7)),
    "no numbers": lambda key: jax.random.uniform(key, (0, 3)),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_a_fast_key_draws_the_same_numbers(draw, seed):
    np.testing.assert_array_equal(draw(fast(jax.random.key(seed))), draw(jax.random.key(seed)))


def test_a_fast_key_draws_the_same_numbers_of_64_bits():
    with jax.enable_x64(True):
        numbers = [jax.random.normal(key, (50,), "float64") for key in (fast(jax.random.key(3)), jax.random.key(3))]
    np.testing.assert_array_equal(*numbers)


def test_many_fast_keys_draw_the_same_numbers_compiled():
    draw = jax.jit(jax.vmap(lambda key: jax.random.normal(key, (8,))))
    keys = jax.random.split(jax.random.key(5), 4)
    np.testing.assert_array_equal(draw(fast(keys)), draw(jax.random.clone(keys)))


def test_a_key_of_another_generator_stays_as_it_is():
    key = jax.random.key(1, impl="rbg")
    assert fast(key) is key
    assert jax.random.key_impl(fast(fast(jax.random.key(1)))) == jax.random.key_impl(fast(jax.random.key(1)))


def test_compiled_for_a_cpu_it_has_no_loop():
    def text(make):
        return jax.jit(lambda seed: jax.random.uniform(make(jax.random.key(seed)))).lower(3).compile().as_text()

    assert " while(" in text(lambda key: key)
    assert " while(" not in text(fast)
