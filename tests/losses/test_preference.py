import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.losses import dpo_loss, dpo_weights, sequence_log_probs, wpo_weights

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


BY_HAND = [jnp.array(x) for x in ([-1.0, -6.0], [-3.0, -2.0], [-2.0, -5.0], [-2.5, -2.0])]
"""Log-ratios of chosen (1, -1) and rejected (-0.5, 0), so margins of 1.5 and -1."""


def test_dpo_loss_by_hand():
    loss, metrics = dpo_loss(*BY_HAND, beta=0.5)
    close(loss, -np.mean(np.log(sigmoid(np.array([0.75, -0.5])))))
    expected = {
        "rewards/chosen": 0.0,
        "rewards/rejected": -0.125,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.125,
        "logps/chosen": -3.5,
        "logps/rejected": -2.5,
    }
    close([metrics[name] for name in expected], list(expected.values()), atol=1e-7)


def test_the_gradient_of_dpo_is_that_of_the_paper():
    grads = jax.grad(lambda *fields: dpo_loss(*fields, beta=0.5)[0], argnums=(0, 1))(*BY_HAND)
    weight = 0.5 * sigmoid(-np.array([0.75, -0.5])) / 2
    close(grads[0], -weight)
    close(grads[1], weight)


def test_dpo_where_policy_and_reference_agree_is_ln_2():
    log_probs = jnp.array([-12.5, -3.0])
    for beta in (0.01, 0.1, 5.0):
        close(dpo_loss(log_probs, log_probs - 4, log_probs, log_probs - 4, beta=beta)[0], np.log(2))


@pytest.mark.parametrize(("label_smoothing", "expected"), [(0.0, 0.753059), (0.3, 0.925447)])
def test_dpo_loss_equals_tunix(label_smoothing, expected):
    # tunix/tests/sft/dpo/dpo_trainer_test.py: log-probs of 4 tokens; rows 0 to 3 are chosen, 4 to 7 rejected.
    np.random.seed(0)  # noqa: NPY002
    policy, reference = (jnp.asarray(np.random.normal(0, 5, size=(8, 4)).sum(-1)) for _ in range(2))  # noqa: NPY002
    arguments = policy[:4], policy[4:], reference[:4], reference[4:]
    close(dpo_loss(*arguments, beta=0.1, label_smoothing=label_smoothing)[0], expected, atol=1e-6)


rows = hnp.arrays(np.float32, (4, 3), elements=st.floats(-50, 0, width=32))


@jax.jit
def dpo(fields, beta, label_smoothing):
    return dpo_loss(*fields, beta=beta, label_smoothing=label_smoothing)[0]


@given(rows, hnp.arrays(np.float32, 3, elements=st.floats(-10, 10, width=32)))
def test_a_shift_that_policy_and_reference_share_changes_nothing(fields, shift):
    moved = fields + np.stack([shift, 2 * shift, shift, 2 * shift])
    close(dpo(moved, 0.1, 0.1), dpo(fields, 0.1, 0.1), rtol=1e-4, atol=1e-5)


@given(rows, st.floats(0, 1, width=32))
def test_swapping_the_responses_swaps_the_labels(fields, label_smoothing):
    swapped = fields[[1, 0, 3, 2]]
    close(dpo(swapped, 0.1, 1 - label_smoothing), dpo(fields, 0.1, label_smoothing), rtol=1e-5, atol=1e-6)


def test_hyperparameters_of_dpo_may_be_traced():
    betas, smoothings = jnp.array([0.1, 0.5]), jnp.array([0.0, 0.2])
    fields = jnp.stack(BY_HAND)
    expected = [dpo(fields, beta, smoothing) for beta, smoothing in zip(betas, smoothings, strict=True)]
    close(jax.vmap(dpo, (None, 0, 0))(fields, betas, smoothings), expected)


# Log-probabilities of responses

LOG_PROBS = jnp.array([[-1.0, -2.0, -3.0, -4.0], [-0.5, -1.5, -2.5, -3.5]])
RESPONSE = jnp.array([[0, 1, 1, 1], [1, 1, 0, 0]])


def test_the_log_prob_of_a_response_is_the_sum_over_its_tokens():
    close(sequence_log_probs(LOG_PROBS, RESPONSE), [-9, -2])


@pytest.mark.parametrize(("ld_alpha", "expected"), [(1.0, [-9, -2]), (0.0, [-5, -2]), (0.25, [-6, -2])])
def test_length_desensitised_log_probs_by_hand(ld_alpha, expected):
    shared = {"ld_alpha": ld_alpha, "shared_lengths": jnp.array([2, 2])}
    close(sequence_log_probs(LOG_PROBS, RESPONSE, **shared), expected)
    traced = jax.vmap(
        lambda alpha: sequence_log_probs(LOG_PROBS, RESPONSE, ld_alpha=alpha, shared_lengths=jnp.array([2, 2]))
    )
    close(traced(jnp.array([ld_alpha]))[0], expected)


def test_garbage_outside_a_response_is_not_read():
    spoiled = jnp.where(RESPONSE != 0, LOG_PROBS, jnp.nan)
    options = {"ld_alpha": 0.5, "shared_lengths": jnp.array([2, 2])}

    @jax.value_and_grad
    def total(log_probs):
        return sequence_log_probs(log_probs, RESPONSE, **options).sum()

    value, grad = total(spoiled)
    close(value, -7 - 2)
    close(grad, [[0, 1, 1, 0.5], [1, 1, 0, 0]])


def test_wpo_weights_by_hand():
    probs = jnp.array([[0.5, 0.5], [0.9, 0.1]])
    log_probs, log_squares = jnp.log(jnp.array([[0.5, 0.1]])), jnp.log((probs**2).sum(-1))[None]
    close(wpo_weights(log_probs, log_squares, jnp.ones((1, 2))), [np.sqrt(0.5 / 0.5 * 0.1 / 0.82)])
    close(wpo_weights(log_probs, log_squares.at[0, 1].set(jnp.nan), jnp.array([[1, 0]])), [1])
    close(wpo_weights(log_probs, log_squares, jnp.zeros((1, 2))), [1])  # of no tokens


def test_wpo_weights_are_constants():
    grads = jax.grad(lambda *x: wpo_weights(*x, RESPONSE).sum(), argnums=(0, 1))(LOG_PROBS, LOG_PROBS)
    assert not any(x.any() for x in grads)


def test_weights_of_dpo_are_means_over_the_pairs_and_tokens_that_count():
    weights = dpo_weights(jnp.array([3, 5, 1]), mask=jnp.array([1, 0, 1]))
    close(weights.rows, [0.5, 0, 0.5])
    close(weights.chosen_tokens, [0.25, 0, 0.25])
    assert not any(x.any() for x in dpo_weights(jnp.array([3, 5]), mask=jnp.zeros(2)))
