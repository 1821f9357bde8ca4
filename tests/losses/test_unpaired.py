import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.losses import RunningMean, bco_loss, kto_kl, kto_loss, unpaired_weights, update_running_mean
from tests.unchecked import unchecked

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
POLICY, REF = jnp.array([-1.0, -6.0, -3.0]), jnp.array([-2.0, -5.0, -3.5])
LABELS = jnp.array([True, False, True])
RATIOS = np.array([1.0, -1.0, 0.5])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


# KTO


def test_kto_loss_by_hand():
    options = {"beta": 0.5, "kl": 0.6, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    loss, metrics = kto_loss(POLICY, REF, LABELS, **options)
    each = [2 * (1 - sigmoid(0.2)), 3 * (1 - sigmoid(0.8)), 2 * (1 - sigmoid(-0.05))]
    close(loss, np.mean(each))
    expected = {
        "rewards/chosen": 0.375,
        "rewards/rejected": -0.5,
        "rewards/margins": 0.875,
        "logps/chosen": -2.0,
        "logps/rejected": -6.0,
    }
    assert set(metrics) == set(expected)
    close([metrics[name] for name in expected], list(expected.values()))


def test_apo_zero_unpaired_is_kto_without_a_reference_point():
    loss, _ = kto_loss(POLICY, REF, LABELS, beta=0.5, kl=0.6, loss_type="apo_zero_unpaired")
    close(loss, np.mean([1 - sigmoid(0.5), sigmoid(-0.5), 1 - sigmoid(0.25)]))
    close(loss, kto_loss(POLICY, REF, LABELS, beta=0.5)[0])


def test_where_policy_and_reference_agree_kto_is_one_half():
    for labels in (LABELS, ~LABELS, jnp.ones(3, bool)):
        close(kto_loss(POLICY, POLICY, labels, beta=0.5)[0], 0.5)


def test_turning_labels_and_policies_around_changes_nothing():
    close(kto_loss(REF, POLICY, ~LABELS, beta=0.5)[0], kto_loss(POLICY, REF, LABELS, beta=0.5)[0])
    turned, _ = bco_loss(REF, POLICY, ~LABELS, beta=0.5, delta=-0.3)
    close(turned, bco_loss(POLICY, REF, LABELS, beta=0.5, delta=0.3)[0])


def test_the_reference_point_is_the_mean_divergence_but_never_negative():
    close(kto_kl(POLICY, REF), 0.5 / 3)
    assert kto_kl(REF, POLICY) == 0
    close(kto_kl(POLICY, REF, mask=jnp.array([1, 0, 1])), 0.75)
    assert kto_kl(POLICY, REF, mask=jnp.zeros(3)) == 0
    spoiled = POLICY.at[1].set(jnp.nan)
    close(kto_kl(spoiled, REF, mask=jnp.array([1, 0, 1])), 0.75)


def test_the_reference_point_is_a_constant():
    assert not jax.grad(lambda policy: kto_kl(policy, REF))(POLICY).any()
    assert jax.grad(lambda kl: kto_loss(POLICY, REF, LABELS, beta=0.5, kl=kl)[0])(0.6) == 0


def test_the_reference_point_of_devices_is_that_of_the_whole_batch():
    policy, ref = jnp.array([[-1.0, -6.0], [-3.0, -2.0]]), jnp.array([[-2.0, -5.0], [-3.5, -1.0]])
    mask = jnp.array([[1, 0], [1, 1]])
    shared = jax.vmap(lambda *x: kto_kl(*x[:2], mask=x[2], axis_name="data"), axis_name="data")(policy, ref, mask)
    close(shared, [0.5 / 3] * 2)
    close(shared[0], kto_kl(policy.ravel(), ref.ravel(), mask=mask.ravel()))


@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_kto_and_bco_are_finite_where_policy_and_reference_are_200_nats_apart(gap):
    for labels in (LABELS, ~LABELS):
        for function, options in ((kto_loss, {"kl": 200.0}), (bco_loss, {"delta": -gap})):
            loss = functools.partial(function, ref=REF, labels=labels, beta=0.5, **options)
            chex.assert_tree_all_finite(jax.value_and_grad(loss, has_aux=True)(REF + gap))


def test_hyperparameters_of_kto_and_bco_may_be_traced():
    grid = jnp.array([0.1, 0.5]), jnp.array([0.0, 0.6])

    def kto(beta, kl):
        return kto_loss(POLICY, REF, LABELS, beta=beta, kl=kl, desirable_weight=kl, undesirable_weight=beta)[0]

    def bco(beta, delta):
        return bco_loss(POLICY, REF, LABELS, beta=beta, delta=delta)[0]

    for function in (kto, bco):
        close(jax.vmap(function)(*grid), [function(float(x), float(y)) for x, y in zip(*grid, strict=True)])


def test_labels_of_one_kind_leave_the_metrics_of_the_other_at_zero():
    _, metrics = kto_loss(POLICY, REF, jnp.ones(3, bool), beta=0.5)
    assert (metrics["rewards/rejected"], metrics["logps/rejected"]) == (0, 0)
    close(metrics["rewards/margins"], metrics["rewards/chosen"])


def test_weights_of_unpaired_responses_are_means_over_what_counts():
    weights = unpaired_weights(LABELS, mask=jnp.array([1, 1, 0]))
    close(weights.rows, [0.5, 0.5, 0])
    close(weights.chosen, [1, 0, 0])
    close(weights.rejected, [0, 1, 0])


# BCO


def test_bco_loss_by_hand():
    loss, metrics = bco_loss(POLICY, REF, LABELS, beta=0.5, delta=0.1)
    close(loss, -np.mean(np.log(sigmoid([0.5 - 0.1, 0.5 + 0.1, 0.25 - 0.1]))))
    close(metrics["rewards/margins"], 0.875)


def test_bco_weighs_responses_to_match_distributions():
    weights = jnp.array([0.5, 0.0, 2.0])
    loss, metrics = bco_loss(POLICY, REF.at[1].set(jnp.nan), LABELS, beta=0.5, delta=0.1, weights=weights)
    close(loss, -np.sum([0.5, 2] * np.log(sigmoid([0.4, 0.15]))))
    close(metrics["rewards/chosen"], 0.375)  # a plain mean over those that count


def test_the_shift_is_a_constant():
    assert jax.grad(lambda delta: bco_loss(POLICY, REF, LABELS, beta=0.5, delta=delta)[0])(0.1) == 0


@given(hnp.arrays(np.float32, 12, elements=st.floats(-50, 50, width=32)), st.lists(st.integers(1, 11), max_size=4))
def test_the_running_mean_is_that_of_all_rewards_however_they_come(rewards, cuts):
    state = RunningMean(jnp.zeros(()), jnp.zeros(()))
    for part in np.split(rewards, sorted(set(cuts))):
        padded = np.pad(part, (0, 12 - len(part)), constant_values=np.nan)
        state = UPDATE(state, padded, np.arange(12) < len(part))
    close(state.mean, rewards.mean(dtype=np.float64), rtol=1e-5, atol=1e-5)
    assert state.count == 12


UPDATE = jax.jit(lambda state, rewards, mask: update_running_mean(state, rewards, mask=mask))


def test_the_running_mean_of_devices_is_that_of_all_and_starts_where_it_was():
    state = RunningMean(jnp.array(2.0), jnp.array(2.0))
    rewards = jnp.array([[1.0, 3.0], [8.0, 99.0]])
    update = jax.vmap(lambda x, mask: update_running_mean(state, x, mask=mask, axis_name="data"), axis_name="data")
    means = update(rewards, jnp.array([[1, 1], [1, 0]]))
    close(means.mean, [(2 * 2 + 1 + 3 + 8) / 5] * 2)
    close(means.count, [5, 5])


def test_nothing_seen_changes_nothing():
    state = RunningMean(jnp.array(2.0), jnp.array(3.0))
    chex.assert_trees_all_equal(update_running_mean(state, jnp.ones(2), mask=jnp.zeros(2)), state)
    empty = RunningMean(jnp.zeros(()), jnp.zeros(()))
    chex.assert_trees_all_equal(update_running_mean(empty, jnp.ones(2), mask=jnp.zeros(2)), empty)


def test_the_running_mean_is_a_constant():
    state = RunningMean(jnp.zeros(()), jnp.zeros(()))
    assert not jax.grad(lambda rewards: update_running_mean(state, rewards).mean)(POLICY).any()


def test_an_unknown_loss_type_is_refused():
    with unchecked(), pytest.raises(ValueError, match=r"loss_type must be one of .*'kto'.*, got 'unheard'"):
        kto_loss(POLICY, REF, LABELS, beta=0.1, loss_type="unheard")
