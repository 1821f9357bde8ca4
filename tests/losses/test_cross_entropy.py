import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.log_probs import token_log_probs, token_statistics
from jaxrl_llm.losses import cross_entropy_loss
from tests.unchecked import unchecked

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)


def test_cross_entropy_by_hand():
    probs = np.array([[0.5, 0.25, 0.9], [0.1, 0.5, 0.5]])
    loss, metrics = cross_entropy_loss(jnp.log(probs), jnp.array([[1, 1, 0], [1, 0, 0]]))
    close(loss, -(np.log(0.5) + np.log(0.25) + np.log(0.1)) / 3)
    close(metrics["nll"], loss)
    assert metrics["num_tokens"] == 3


def test_a_uniform_model_costs_the_log_of_the_vocabulary():
    loss, _ = cross_entropy_loss(token_log_probs(jnp.ones((2, 3, 11)), jnp.zeros((2, 3), int)), jnp.ones((2, 3)))
    close(loss, np.log(11))


def statistics_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])) + 2
    return jax.jit(token_statistics)(logits, jnp.array([1, 1, 0])), jnp.array([1, 1, 0])


def test_metrics_of_statistics_by_hand():
    statistics, mask = statistics_by_hand()
    _, metrics = cross_entropy_loss(statistics.log_probs, mask, statistics=statistics)
    probs = np.array([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]])
    close(metrics["entropy"], -(probs * np.log(probs)).sum() / 2)
    assert metrics["mean_token_accuracy"] == 0.5


def test_z_loss_by_hand():
    statistics, mask = statistics_by_hand()
    plain, _ = cross_entropy_loss(statistics.log_probs, mask)
    loss, _ = cross_entropy_loss(statistics.log_probs, mask, z_loss=0.01, statistics=statistics)
    close(loss, plain + 0.01 * 2**2)


@jax.jit
def smoothed(logits, tokens, mask, label_smoothing):
    def ours(logits):
        statistics = token_statistics(logits, tokens)
        options = {"label_smoothing": label_smoothing, "statistics": statistics}
        return cross_entropy_loss(statistics.log_probs, mask, **options)[0]

    def optaxs(logits):
        targets = optax.smooth_labels(jax.nn.one_hot(tokens, logits.shape[-1]), label_smoothing)
        return optax.losses.softmax_cross_entropy(logits, targets).mean(where=mask)

    return jax.value_and_grad(ours)(logits), jax.value_and_grad(optaxs)(logits)


@given(
    hnp.arrays(np.float32, (2, 4, 5), elements=st.floats(-8, 8, width=32)),
    hnp.arrays(np.int32, (2, 4), elements=st.integers(0, 4)),
    hnp.arrays(bool, (2, 4)).filter(np.any),
    st.floats(0, 1, width=32),
)
def test_label_smoothing_mixes_the_targets_with_the_uniform_distribution(logits, tokens, mask, label_smoothing):
    ours, optaxs = smoothed(logits, tokens, mask, label_smoothing)
    close(ours[0], optaxs[0], rtol=2e-6, atol=1e-6)
    close(ours[1], optaxs[1], atol=1e-6)


def test_an_impossible_part_of_the_vocabulary_does_no_harm():
    logits = jnp.array([[1.0, 2.0, -jnp.inf], [0.5, 0.1, -jnp.inf]])

    @jax.jit
    @jax.value_and_grad
    def loss(logits, coefficient):
        statistics = token_statistics(logits, jnp.array([0, 1]))
        options = {"label_smoothing": coefficient, "z_loss": coefficient, "statistics": statistics}
        return cross_entropy_loss(statistics.log_probs, jnp.ones(2), **options)[0]

    for coefficient in (0.0, 0.1):
        value, grad = loss(logits, coefficient)
        shorter, shorter_grad = loss(logits[:, :2], coefficient)
        close(value, shorter)
        close(grad[:, :2], shorter_grad, atol=1e-7)
        np.testing.assert_array_equal(grad[:, 2], 0)


def test_dynamic_fine_tuning_weighs_each_token_by_its_probability_a_constant():
    log_probs, mask = jnp.log(jnp.array([0.5, 0.25, 0.9])), jnp.array([1, 1, 0])
    options = {"loss_type": "dft"}
    (loss, metrics), grad = jax.value_and_grad(cross_entropy_loss, has_aux=True)(log_probs, mask, **options)
    close(loss, -(0.5 * np.log(0.5) + 0.25 * np.log(0.25)) / 2)
    close(metrics["nll"], -(np.log(0.5) + np.log(0.25)) / 2)
    close(grad, [-0.25, -0.125, 0])


def test_an_unknown_loss_type_is_refused():
    with unchecked(), pytest.raises(ValueError, match=r"loss_type must be one of .*'dft'.*, got 'unheard'"):
        cross_entropy_loss(jnp.zeros(2), jnp.ones(2), loss_type="unheard")


@pytest.mark.parametrize("option", [{"label_smoothing": 0.1}, {"z_loss": 1e-4}])
def test_options_that_need_statistics_say_so(option):
    with pytest.raises(ValueError, match=rf"{next(iter(option))}=.* needs statistics"):
        cross_entropy_loss(jnp.zeros(2), jnp.ones(2), **option)
