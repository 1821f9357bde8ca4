"""Importance ratios and the clipped surrogate, for every loss that uses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.losses import grpo_loss, policy_gradient_loss, ppo_loss
from jaxrl_llm.losses.ratios import clipped_surrogate, log_importance_ratio, outside_clip, per_token

SHAPE = (4, 6)
FULL = jnp.ones(SHAPE, bool)


def test_the_log_ratio_is_zero_where_masked_and_without_an_old_policy():
    log_probs = jnp.array([-1.0, -2.0, jnp.nan])
    mask = jnp.array([1, 1, 0])
    expected = [0.5, -1.0, 0.0]
    np.testing.assert_allclose(log_importance_ratio(log_probs, jnp.array([-1.5, -1.0, 0.0]), mask), expected)
    np.testing.assert_array_equal(log_importance_ratio(log_probs, None, mask), [0, 0, 0])


def test_advantages_of_rows_are_those_of_their_tokens():
    like = jnp.zeros((2, 3))
    np.testing.assert_array_equal(per_token(jnp.array([1.0, 2.0]), like), [[1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(per_token(jnp.arange(6.0).reshape(2, 3), like), [[0, 1, 2], [3, 4, 5]])


def test_advantages_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"advantages must have shape \(2, 3\).* or \(2,\).* got \(3,\)"):
        per_token(jnp.zeros(3), jnp.zeros((2, 3)))


# The truth table of the clip at ε = 0.2: a gradient vanishes only where the ratio has already moved past the clip in
# the direction that the advantage asks for.
RATIOS = np.array([[0.5, 1.0, 1.5, 2.0]])
ADVANTAGES = np.array([[1.0], [-1.0]])
TERMS = -np.array([[0.5, 1.0, 1.2, 1.2], [-0.8, -1.0, -1.5, -2.0]])
MOVES = np.array([[True, True, False, False], [False, True, True, True]])


def table():
    ratios, advantages = np.broadcast_arrays(RATIOS, ADVANTAGES)
    return jnp.log(ratios), jnp.asarray(advantages, jnp.float32)


def losses_by_name():
    log_ratios, advantages = table()
    old, mask = jnp.full_like(log_ratios, -1), jnp.ones(log_ratios.shape, bool)
    one = jnp.ones(log_ratios.shape)
    return old + log_ratios, {
        "ppo": lambda log_probs: ppo_loss(log_probs, old, advantages, mask, weights=one),
        "grpo": lambda log_probs: grpo_loss(log_probs, old, advantages, mask, weights=one),
    }


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_clip_takes_the_gradient_by_the_truth_table(name):
    log_probs, losses = losses_by_name()
    (loss, metrics), grad = jax.jit(jax.value_and_grad(losses[name], has_aux=True))(log_probs)
    np.testing.assert_allclose(loss, TERMS.sum(), rtol=1e-6)
    np.testing.assert_allclose(grad, np.where(MOVES, -ADVANTAGES * RATIOS, 0), rtol=1e-6)
    clipped = metrics["policy/clipfrac_avg"] if name == "ppo" else metrics["clip_ratio/region_mean"]
    np.testing.assert_allclose(clipped, (~MOVES).sum())


def test_delta_bounds_what_the_clip_leaves_open():
    log_ratios, advantages = table()

    def loss(log_ratios):
        return clipped_surrogate(jnp.exp(log_ratios), advantages, 0.8, 1.2, max_ratio=1.6).sum()

    terms = clipped_surrogate(jnp.exp(log_ratios), advantages, 0.8, 1.2, max_ratio=1.6)
    np.testing.assert_allclose(terms, -np.array([[0.5, 1.0, 1.2, 1.2], [-0.8, -1.0, -1.5, -1.6]]), rtol=1e-6)
    moves = MOVES & (RATIOS < 1.6)
    np.testing.assert_allclose(jax.grad(loss)(log_ratios), np.where(moves, -ADVANTAGES * RATIOS, 0), rtol=1e-6)


log_ratios = hnp.arrays(np.float32, SHAPE, elements=st.floats(-3, 3, width=32))
advantages = hnp.arrays(np.float32, SHAPE, elements=st.floats(-5, 5, width=32))
surrogate = jax.jit(lambda ratio, advantages: clipped_surrogate(ratio, advantages, 0.8, 1.28))


@given(log_ratios, advantages)
def test_the_clipped_loss_is_never_below_the_unclipped(log_ratios, advantages):
    ratio = np.exp(log_ratios)
    assert (np.asarray(surrogate(ratio, advantages)) >= -ratio * advantages - 1e-6).all()


@jax.jit
def surrogate_gradient(log_ratios, advantages):
    def loss(log_ratios):
        return clipped_surrogate(jnp.exp(log_ratios), advantages, 0.8, 1.28).sum()

    low, high = outside_clip(jnp.exp(log_ratios), advantages, 0.8, 1.28)
    return jax.grad(loss)(log_ratios), low | high


@given(log_ratios, advantages)
def test_outside_clip_tells_where_the_gradient_is_gone(log_ratios, advantages):
    gradient, outside = jax.device_get(surrogate_gradient(log_ratios, advantages))
    large = np.abs(advantages) > 1e-30  # Below, gradients underflow.
    np.testing.assert_array_equal((gradient == 0)[large], outside[large])


ON_POLICY = {
    "ppo": ppo_loss,
    "grpo": functools.partial(grpo_loss, loss_type="dapo"),
}


@jax.jit
def on_policy_gradients(log_probs, advantages, mask):
    gradient = jax.grad(lambda loss, x, old: loss(x, old, advantages, mask)[0], argnums=1)
    gradients = {f"{name}, old": gradient(loss, log_probs, log_probs) for name, loss in ON_POLICY.items()}
    gradients |= {f"{name}, none": gradient(loss, log_probs, None) for name, loss in ON_POLICY.items()}
    return gradients, gradient(lambda x, _, a, m: policy_gradient_loss(x, a, m), log_probs, None)


@given(hnp.arrays(np.float32, SHAPE, elements=st.floats(-9, -0.125, width=32)), advantages, hnp.arrays(bool, SHAPE))
def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient(log_probs, advantages, mask):
    gradients, reinforce = jax.device_get(on_policy_gradients(log_probs, advantages, mask))
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, reinforce, rtol=1e-6, atol=1e-8, err_msg=name)


@jax.jit
def shifted(log_probs, old_log_probs, advantages, shift):
    return [
        loss(log_probs + shift, old_log_probs + shift, advantages, FULL)[0]
        for loss in (*ON_POLICY.values(), functools.partial(grpo_loss, importance_sampling_level="sequence"))
    ]


@given(log_ratios, advantages, st.floats(-8, 8, width=32))
def test_only_differences_of_log_probs_count(log_ratios, advantages, shift):
    old = np.full(SHAPE, -1, np.float32)
    plain, moved = (shifted(old + log_ratios, old, advantages, np.float32(x)) for x in (0, shift))
    np.testing.assert_allclose(moved, plain, rtol=1e-4, atol=1e-4)
