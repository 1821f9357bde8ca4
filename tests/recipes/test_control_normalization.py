import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.recipes.control.normalization import (
    RewardScale,
    init_moments,
    normalize,
    scale_rewards,
    update_moments,
)

close = np.testing.assert_allclose


def test_moments_of_parts_are_those_of_the_whole():
    values = 3 + 2 * np.random.default_rng(0).normal(size=(30, 4, 2)).astype(np.float32)
    moments = init_moments(2)
    for part in np.split(values, 3):
        moments = jax.jit(update_moments)(moments, part)
    close(moments.mean, values.mean((0, 1)), rtol=1e-5)
    close(moments.variance, values.var((0, 1)), rtol=1e-4)
    assert moments.count == 120
    shown = normalize(moments, jnp.asarray(values))
    close(shown.mean((0, 1)), 0, atol=1e-5)
    close(shown.std((0, 1)), 1, rtol=1e-3)
    assert np.abs(normalize(moments, 1e9 * jnp.asarray(values))).max() == 10


def test_what_is_masked_does_not_count_and_nothing_changes_nothing():
    values, mask = jnp.array([[1.0], [5.0], [3.0]]), jnp.array([1, 0, 1])
    moments = update_moments(init_moments(1), values, mask)
    close([moments.count, moments.mean[0], moments.variance[0]], [2, 2, 1])
    again = update_moments(moments, values, jnp.zeros(3))
    jax.tree.map(close, again, moments)
    close(normalize(init_moments(1), 100 * values), 100 * values)  # nothing is clipped either
    close(update_moments(init_moments(1), values, jnp.zeros(3)).variance, 1)
    assert normalize(None, values) is values


def test_rewards_are_divided_by_the_deviation_of_discounted_returns_of_the_rollouts_before():
    rewards, done = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([[False], [True], [False], [False]])
    scale = RewardScale(jnp.zeros(1), init_moments(1))
    first, scale = scale_rewards(scale, rewards, done, gamma=0.5)
    close(first, rewards, rtol=1e-5)  # nothing was known before
    returns = [1, 2.5, 3, 5.5]  # starts anew after the end
    close(scale.moments.variance, np.var(returns), rtol=1e-5)
    close(scale.returns, 5.5)
    second, scale = scale_rewards(scale, rewards, done, gamma=0.5)
    close(second, rewards / np.std(returns), rtol=1e-5)
    close(scale.moments.count, 8)
