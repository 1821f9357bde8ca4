import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.losses import value_loss

# One value inside the clip of ±0.5, two that have moved past it: away from the return, and towards it.
VALUES, OLD = jnp.array([1.2, 2.0, 2.0, 7.0]), jnp.array([1.0, 1.0, 1.0, 0.0])
RETURNS, MASK = jnp.array([2.0, 0.0, 3.0, 0.0]), jnp.array([1, 1, 1, 0])


def test_value_loss_by_hand():
    loss, metrics = value_loss(VALUES, RETURNS, MASK)
    np.testing.assert_allclose(loss, 0.5 * (0.64 + 4 + 1) / 3, rtol=1e-6)
    assert metrics["val/clipfrac_avg"] == 0


def test_the_clipped_value_loss_is_pessimistic():
    def loss(values):
        return value_loss(values, RETURNS, MASK, old_values=OLD, cliprange_value=0.5)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(VALUES)
    # Towards the return, 2 counts as 1.5, and has no gradient; away from it, 2 is worse than 1.5 and counts.
    np.testing.assert_allclose(value, 0.5 * (0.64 + 4 + 2.25) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["val/clipfrac_avg"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(grad, np.array([1.2 - 2, 2 - 0, 0, 0]) / 3, rtol=1e-6)


values = hnp.arrays(np.float32, 4, elements=st.floats(-5, 5, width=32))


@jax.jit
def both(values, returns, old_values, clip):
    clipped = value_loss(values, returns, old_values=old_values, cliprange_value=clip)[0]
    return clipped, value_loss(values, returns)[0]


@given(values, values, values, st.floats(0, 3, width=32))
def test_the_clipped_value_loss_is_never_below_the_unclipped(values, returns, old_values, clip):
    clipped, unclipped = both(values, returns, old_values, clip)
    assert clipped >= unclipped - 1e-6


@given(values, values)
def test_a_wide_clip_changes_nothing(values, returns):
    np.testing.assert_allclose(*both(values, returns, values, 100.0), rtol=1e-6)


def test_a_value_clip_without_old_values_is_refused():
    with pytest.raises(ValueError, match="cliprange_value needs old_values"):
        value_loss(VALUES, RETURNS, MASK, cliprange_value=0.5)
