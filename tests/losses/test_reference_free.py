import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.losses import cpo_loss, dpo_loss, orpo_loss
from jaxrl_llm.losses.reference_free import CPO_LINKS
from tests.unchecked import unchecked

pytestmark = pytest.mark.usefixtures("quick_compilation")

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
CHOSEN, REJECTED = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.6]))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


# ORPO


def test_orpo_loss_by_hand():
    loss, metrics = orpo_loss(CHOSEN, REJECTED, 1.5, beta=0.1)
    odds_ratios = np.array([(0.5 / 0.5) / (0.25 / 0.75), (0.2 / 0.8) / (0.6 / 0.4)])  # 3 and 1/6
    expected = {
        "nll_loss": 1.5,
        "log_odds_ratio": np.mean(np.log(odds_ratios / (1 + odds_ratios))),
        "log_odds_chosen": np.mean(np.log(odds_ratios)),
        "rewards/chosen": 0.1 * np.log([0.5, 0.2]).mean(),
        "rewards/rejected": 0.1 * np.log([0.25, 0.6]).mean(),
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.1 * np.log([2, 1 / 3]).mean(),
        "logps/chosen": np.log([0.5, 0.2]).mean(),
        "logps/rejected": np.log([0.25, 0.6]).mean(),
    }
    close(loss, 1.5 - 0.1 * expected["log_odds_ratio"])
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        close(metrics[name], value, err_msg=name)


def test_equal_odds_cost_beta_ln_2():
    close(orpo_loss(CHOSEN, CHOSEN, 0.0, beta=0.5)[0], 0.5 * np.log(2))


def test_swapping_the_responses_turns_the_log_odds_around():
    plain, swapped = orpo_loss(CHOSEN, REJECTED, 0.0, beta=1.0), orpo_loss(REJECTED, CHOSEN, 0.0, beta=1.0)
    close(swapped[1]["log_odds_chosen"], -plain[1]["log_odds_chosen"])
    # log σ(x) - log σ(-x) = x
    close(swapped[0] - plain[0], plain[1]["log_odds_chosen"])


@pytest.mark.parametrize("certain", [0.0, -1e-12, -1e-7, -1e-6, -200.0])
def test_orpo_is_finite_where_a_response_is_certain_or_impossible(certain):
    pairs = jnp.array([certain, -1.0, certain]), jnp.array([-1.0, certain, certain])
    loss = functools.partial(orpo_loss, nll=0.0, beta=0.1)
    chex.assert_tree_all_finite(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*pairs))


# CPO, SimPO, AlphaPO

MARGINS = np.log([2, 1 / 3])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, -np.log(sigmoid(0.5 * MARGINS))),
        (
            {"label_smoothing": 0.1},
            -0.9 * np.log(sigmoid(0.5 * MARGINS)) - 0.1 * np.log(sigmoid(-0.5 * MARGINS)),
        ),
        ({"loss_type": "hinge"}, np.maximum(0, 1 - 0.5 * MARGINS)),
        ({"loss_type": "ipo"}, (MARGINS - 1) ** 2),
        ({"loss_type": "simpo", "simpo_gamma": 0.8}, -np.log(sigmoid(0.5 * MARGINS - 0.8))),
        # AlphaPO with α = 1: rewards 1 - 1/p are (-1, -4) and (-3, -2/3).
        (
            {"loss_type": "simpo", "simpo_gamma": 0.8, "alpha": 1.0},
            -np.log(sigmoid(0.5 * np.array([2, -10 / 3]) - 0.8)),
        ),
        ({"nll": 1.5, "cpo_alpha": 0.2}, 0.3 - np.log(sigmoid(0.5 * MARGINS))),
    ],
)
def test_cpo_loss_by_hand(options, expected):
    close(cpo_loss(CHOSEN, REJECTED, beta=0.5, **options)[0], np.mean(expected))


def test_metrics_of_cpo_by_hand():
    _, metrics = cpo_loss(CHOSEN, REJECTED, beta=0.5, alpha=1.0, nll=1.5)
    expected = {
        "nll_loss": 1.5,
        "rewards/chosen": 0.5 * (-1 - 4) / 2,
        "rewards/rejected": 0.5 * (-3 - 2 / 3) / 2,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.5 * (2 - 10 / 3) / 2,
        "logps/chosen": np.log([0.5, 0.2]).mean(),
        "logps/rejected": np.log([0.25, 0.6]).mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        close(metrics[name], value, err_msg=name)


rows = hnp.arrays(np.float32, (2, 3), elements=st.floats(-20, -0.125, width=32))


@jax.jit
def cpo_and_dpo(pairs, beta, label_smoothing):
    ours = {
        name: cpo_loss(*pairs, beta=beta, label_smoothing=label_smoothing, loss_type=name, simpo_gamma=0.0)[0]
        for name in CPO_LINKS
    }
    lengths = {"chosen_lengths": jnp.ones(3), "rejected_lengths": jnp.ones(3)}
    dpos = {
        name: dpo_loss(*pairs, None, None, beta=beta, label_smoothing=label_smoothing, loss_type=name, **lengths)[0]
        for name in ("sigmoid", "hinge", "ipo")
    }
    return ours, dpos | {"simpo": dpos["sigmoid"]}


@given(rows, st.floats(0.0625, 2, width=32), st.floats(0, 0.4375, width=32))
def test_cpo_is_dpo_without_a_reference(pairs, beta, label_smoothing):
    ours, dpos = jax.device_get(cpo_and_dpo(pairs, beta, label_smoothing))
    close(list(ours.values()), [dpos[name] for name in ours], rtol=1e-5, atol=1e-6)


@jax.jit
def alpha_po(alpha, beta=0.5, gamma=0.5):
    loss = functools.partial(cpo_loss, beta=beta, loss_type="simpo", alpha=alpha, simpo_gamma=gamma)
    return jax.value_and_grad(lambda *pairs: loss(*pairs)[0], argnums=(0, 1))(CHOSEN, REJECTED)


def test_alpha_po_is_simpo_at_0_and_near_it():
    swept = jax.vmap(alpha_po)(jnp.array([0.0, 1e-4, -1e-4]))
    simpo = functools.partial(cpo_loss, beta=0.5, loss_type="simpo", simpo_gamma=0.5)
    expected = jax.value_and_grad(lambda *pairs: simpo(*pairs)[0], argnums=(0, 1))(CHOSEN, REJECTED)
    for i, rtol in enumerate((1e-6, 1e-3, 1e-3)):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], swept), expected, rtol=rtol)


def test_hyperparameters_of_cpo_may_be_traced():
    grid = jnp.array([0.0, 0.25, 0.0]), jnp.array([0.1, 0.5, 2.0]), jnp.array([0.0, 0.5, 1.0])
    swept = jax.vmap(alpha_po)(*grid)
    for i, options in enumerate(zip(*grid, strict=True)):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], swept), alpha_po(*options), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.25, 2.0])
def test_cpo_is_finite_at_200_nats(alpha):
    @jax.jit
    def results(pairs):
        return {
            name: jax.value_and_grad(
                lambda x, name=name: cpo_loss(*x, beta=0.1, loss_type=name, alpha=alpha), has_aux=True
            )(pairs)
            for name in CPO_LINKS
        }

    for pairs in ([[-200.0], [-0.1]], [[-0.1], [-200.0]], [[-200.0], [-200.0]]):
        chex.assert_tree_all_finite(results(jnp.array(pairs)))


def test_an_unknown_loss_type_is_refused():
    with unchecked(), pytest.raises(ValueError, match=r"loss_type must be one of .*'simpo'.*, got 'unheard'"):
        cpo_loss(CHOSEN, REJECTED, beta=0.1, loss_type="unheard")
