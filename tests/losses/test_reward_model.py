import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.losses import reward_model_loss, reward_regression_loss

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
CHOSEN, REJECTED = jnp.array([2.0, -1.0]), jnp.array([1.0, 0.5])


def test_reward_model_loss_by_hand():
    loss, metrics = reward_model_loss(CHOSEN, REJECTED)
    close(loss, (np.log1p(np.exp(-1)) + np.log1p(np.exp(1.5))) / 2)
    expected = {"accuracy": 0.5, "margin": -0.25, "mean_reward": 0.625, "min_reward": -1.0, "max_reward": 2.0}
    assert {name: float(x) for name, x in metrics.items()} == expected


def test_margin_and_centre_by_hand():
    options = {"margin": jnp.array([0.5, 1.0]), "center_rewards_coefficient": 0.1}
    loss, _ = reward_model_loss(CHOSEN, REJECTED, **options)
    close(loss, (np.log1p(np.exp(-0.5)) + np.log1p(np.exp(2.5))) / 2 + 0.1 * (9 + 0.25) / 2)


def test_equal_rewards_cost_ln_2():
    close(reward_model_loss(CHOSEN, CHOSEN)[0], np.log(2))


def test_pairs_of_weight_zero_count_nowhere():
    weights = jnp.array([1.0, 0.0])
    loss, metrics = reward_model_loss(CHOSEN, REJECTED, weights=weights)
    close(loss, np.log1p(np.exp(-1)))
    assert (metrics["min_reward"], metrics["max_reward"]) == (1, 2)


rewards = hnp.arrays(np.float32, 3, elements=st.floats(-9, 9, width=32))


@jax.jit
def values(chosen, rejected, shift):
    return (
        reward_model_loss(chosen, rejected)[0],
        reward_model_loss(chosen + shift, rejected + shift)[0],
        reward_model_loss(rejected, chosen)[0],
        (chosen - rejected).mean(),
    )


@given(rewards, rewards, st.floats(-9, 9, width=32))
def test_a_shift_of_all_rewards_changes_nothing_and_a_swap_adds_the_margin(chosen, rejected, shift):
    plain, moved, swapped, margin = values(chosen, rejected, shift)
    close(moved, plain, rtol=1e-4, atol=1e-5)
    # log σ(x) - log σ(-x) = x
    close(swapped - plain, margin, rtol=1e-4, atol=1e-5)


def test_reward_regression_loss_by_hand():
    loss, metrics = reward_regression_loss(CHOSEN, REJECTED)
    close(loss, (1 + 1.5**2) / 2)
    expected = {"mse": 1.625, "mae": 1.25, "mean_reward": 0.5, "min_reward": -1.0, "max_reward": 2.0}
    assert {name: float(x) for name, x in metrics.items()} == expected


def test_texts_of_weight_zero_count_nowhere():
    weights, spoiled = jnp.array([1.0, 0.0]), jnp.array([1.0, jnp.nan])
    loss, metrics = reward_regression_loss(CHOSEN, spoiled, weights=weights)
    assert loss == metrics["mse"] == metrics["mae"] == 1
    assert (metrics["mean_reward"], metrics["min_reward"], metrics["max_reward"]) == (2, 2, 2)
    grad = jax.grad(lambda rewards: reward_regression_loss(rewards, REJECTED, weights=weights)[0])(CHOSEN)
    assert grad.tolist() == [2, 0]
