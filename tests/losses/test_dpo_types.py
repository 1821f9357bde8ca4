"""What holds for each of the loss types of Direct Preference Optimization."""

import functools
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.losses import dpo_loss
from jaxrl_llm.losses.preference import POINTWISE, SORTED, DPOLossType, FDivergence
from tests.unchecked import unchecked

pytestmark = pytest.mark.usefixtures("quick_compilation")

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
TYPES = get_args(DPOLossType)
LENGTHS = {"chosen_lengths": jnp.array([2, 4, 3]), "rejected_lengths": jnp.array([5, 1, 3])}
FIELDS = jnp.array([[-1.0, -6.0, -2.0], [-3.0, -2.0, -2.5], [-2.0, -5.0, -1.5], [-2.5, -2.0, -4.0]])
"""Log-ratios of chosen (1, -1, -0.5) and rejected (-0.5, 0, 1.5): margins of 1.5, -1, and -2."""


def loss_of(fields, name, beta=0.5, label_smoothing=0.1, tau=0.05, **options):
    """Computes a loss of [4, pairs] log-probs: chosen, rejected, and those of the reference."""
    smoothed = {"label_smoothing": label_smoothing, "discopop_tau": tau}
    return dpo_loss(*fields, beta=beta, loss_type=name, **LENGTHS, **smoothed, **options)[0]


@functools.partial(jax.jit, static_argnames="f_divergence_type")
def each_type(fields, beta=0.5, label_smoothing=0.1, tau=0.05, f_divergence_type="reverse_kl"):
    """Computes value and gradient of every type."""
    options = beta, label_smoothing, tau
    loss = functools.partial(loss_of, f_divergence_type=f_divergence_type)
    own = () if f_divergence_type == "reverse_kl" else (*POINTWISE, *SORTED)
    return {name: jax.value_and_grad(loss)(fields, name, *options) for name in TYPES if name not in own}


def values(fields, *options):
    return {name: value for name, (value, _) in jax.device_get(each_type(fields, *options)).items()}


# By hand


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def softplus(x):
    return np.log1p(np.exp(x))


def by_hand(beta=0.5, smoothing=0.1, tau=0.05):
    """The equations once more, in terms of softplus(-x) = -log σ(x)."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = np.asarray(FIELDS, np.float64)
    c, r = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    chosen_lengths, rejected_lengths = (np.asarray(x) for x in LENGTHS.values())
    x, averaged = beta * (c - r), c / chosen_lengths - r / rejected_lengths
    paired = beta * (np.sort(policy_chosen - policy_rejected) - np.sort(ref_chosen - ref_rejected))
    unpaired = beta * (np.sort(c) - np.sort(r))
    blend = sigmoid(x / tau)

    def logistic(x):
        return (1 - smoothing) * softplus(-x) + smoothing * softplus(x)

    def entropy_to_labels(p):
        return p * np.log(p / (1 - smoothing)) + (1 - p) * np.log((1 - p) / smoothing)

    return {
        "sigmoid": logistic(x),
        "hinge": np.maximum(0, 1 - x),
        "ipo": (averaged - 1) ** 2,
        "exo_pair": entropy_to_labels(sigmoid(x)),
        "nca_pair": softplus(-beta * c) + (softplus(beta * c) + softplus(beta * r)) / 2,
        "robust": (0.9 * softplus(-x) - 0.1 * softplus(x)) / 0.8,
        "bco_pair": softplus(-beta * c) + softplus(beta * r),
        "sppo_hard": (c - 1) ** 2 + (r + 1) ** 2,
        "aot": logistic(paired),
        "aot_unpaired": logistic(unpaired),
        "apo_zero": 1 - sigmoid(beta * c) + sigmoid(beta * r),
        "apo_down": sigmoid(beta * c) + 1 - sigmoid(x),
        "discopop": (1 - blend) * softplus(-x) + blend * np.exp(-x),
        "sft": -policy_chosen.sum() / chosen_lengths.sum(),
        "sigmoid_norm": logistic(beta * averaged),
    }


def test_every_type_by_hand():
    expected = by_hand()
    assert set(expected) == set(TYPES)
    for name, value in values(FIELDS).items():
        close(value, expected[name].mean(), err_msg=name, rtol=2e-6)


def test_where_policy_and_reference_agree_each_type_has_its_constant():
    ln2 = np.log(2)
    expected = {"hinge": 1, "ipo": 25, "nca_pair": 2 * ln2, "bco_pair": 2 * ln2, "sppo_hard": 50, "apo_zero": 1}
    expected |= {"apo_down": 1, "discopop": (ln2 + 1) / 2, "exo_pair": -ln2 - np.log(0.1 * 0.9) / 2, "sft": 9 / 9}
    for name, value in values(FIELDS[jnp.array([0, 1, 0, 1])], 0.1).items():
        close(value, expected.get(name, ln2), err_msg=name)


# Symmetries

MIRRORED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "sigmoid_norm")
"""Swapping the responses swaps the labels: hinge and ipo ask for a margin, discopop and apo_down have no mirror, and the
others treat good and bad responses differently."""
REVERSED = (
    *("sigmoid", "hinge", "exo_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero"),
    "discopop",
)
"""Swapping the responses, and policy with reference, changes nothing."""

rows = hnp.arrays(np.float32, (4, 3), elements=st.floats(-20, 0, width=32))


@given(rows, st.floats(0.0625, 0.4375, width=32))
def test_swapping_the_responses_swaps_the_labels_where_the_formula_does(fields, label_smoothing):
    # Of equal lengths, as the lengths do not swap.
    plain = swappable(fields, label_smoothing)
    for name, value in swappable(fields[[1, 0, 3, 2]], 1 - label_smoothing).items():
        close(value, plain[name], rtol=1e-4, atol=1e-5, err_msg=name)


@jax.jit
def swappable(fields, label_smoothing):
    same = {"chosen_lengths": jnp.full(3, 4), "rejected_lengths": jnp.full(3, 4)}
    options = {"beta": 0.5, "label_smoothing": label_smoothing}
    return {name: dpo_loss(*fields, loss_type=name, **same, **options)[0] for name in MIRRORED}


@given(rows)
def test_swapping_the_responses_and_the_policies_changes_nothing_where_the_formula_says_so(fields):
    plain, turned = values(fields), values(fields[[3, 2, 1, 0]])
    for name in REVERSED:
        close(turned[name], plain[name], rtol=1e-4, atol=1e-4, err_msg=name)


@given(rows, hnp.arrays(np.float32, (2, 3), elements=st.floats(-5, 5, width=32)))
def test_only_the_log_ratios_matter(fields, shift):
    plain, moved = values(fields), values(fields + np.concatenate([shift, shift]))
    for name in set(TYPES) - {"sft", "aot"}:  # Likelihood alone, and policy and reference sorted by themselves.
        close(moved[name], plain[name], rtol=1e-3, atol=1e-3, err_msg=name)


# Hyperparameters


def test_hyperparameters_of_every_type_may_be_traced():
    grid = jnp.array([0.1, 0.5]), jnp.array([0.05, 0.2]), jnp.array([0.05, 0.5])
    swept = jax.vmap(each_type, (None, 0, 0, 0))(FIELDS, *grid)
    for i, options in enumerate(zip(*grid, strict=True)):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], swept), each_type(FIELDS, *options), rtol=1e-5)


@jax.jit
def alpha_divergence(alpha):
    divergence = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    return jax.value_and_grad(loss_of)(FIELDS, "sigmoid", **divergence)


def test_alpha_is_the_forward_kl_at_0_and_the_reverse_kl_at_1():
    swept = jax.vmap(alpha_divergence)(jnp.array([0.0, 1.0, 1.0001]))
    for i, (name, rtol) in enumerate([("forward_kl", 1e-6), ("reverse_kl", 1e-6), ("reverse_kl", 1e-3)]):
        expected = jax.value_and_grad(loss_of)(FIELDS, "sigmoid", f_divergence_type=name)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], swept), expected, rtol=rtol)


def test_the_scores_of_all_divergences_agree_where_policy_and_reference_do():
    # Each is ρ to first order, JS half of it: so they agree in value, and in gradient up to this factor.
    near = FIELDS[jnp.array([0, 1, 0, 1])]
    results = {
        name: jax.jit(jax.value_and_grad(loss_of), static_argnums=1, static_argnames="f_divergence_type")(
            near, "sigmoid", f_divergence_type=name
        )
        for name in get_args(FDivergence)
    }
    for name, (value, grad) in results.items():
        close(value, np.log(2))
        close(grad, results["reverse_kl"][1] * (0.5 if name == "js_divergence" else 1), err_msg=name)


@pytest.mark.parametrize("f_divergence_type", get_args(FDivergence))
def test_every_type_is_finite_where_policy_and_reference_are_200_nats_apart(f_divergence_type):
    for chosen, rejected in ((200, -200), (-200, 200), (200, 200), (-200, -200)):
        moved = FIELDS + jnp.array([[chosen], [rejected], [0], [0]])
        chex.assert_tree_all_finite(each_type(moved, f_divergence_type=f_divergence_type))


# Parts


def test_reference_free_is_a_reference_of_zero():
    for name in TYPES:
        free = loss_of([*FIELDS[:2], None, None], name)
        close(free, loss_of([*FIELDS[:2], jnp.zeros(3), jnp.zeros(3)], name), err_msg=name)


def test_the_reference_is_a_constant():
    for name, (_, grad) in each_type(FIELDS).items():
        assert not np.any(grad[2:]), name
        assert np.any(grad[:2]), name


def test_several_types_add_up_by_their_weights():
    weights = [0.1 * i + 0.2 for i in range(len(TYPES))]
    total = jax.value_and_grad(loss_of)(FIELDS, TYPES, loss_weights=weights)
    parts = each_type(FIELDS)
    expected = jax.tree.map(lambda *x: sum(w * y for w, y in zip(weights, x, strict=True)), *[parts[n] for n in TYPES])
    chex.assert_trees_all_close(total, expected, rtol=1e-5, atol=1e-6)
    close(loss_of(FIELDS, ("sigmoid", "hinge")), parts["sigmoid"][0] + parts["hinge"][0])


def test_weighted_pairs_count_by_their_weights_which_are_constants():
    factors = jnp.array([0.5, 0.0, 2.0])
    ours = functools.partial(dpo_loss, *FIELDS, beta=0.5)
    each = [ours(weights=jnp.eye(3)[i])[0] for i in range(3)]
    loss, grad = jax.value_and_grad(lambda x: ours(pair_weights=x)[0])(factors)
    close(loss, (0.5 * each[0] + 2 * each[2]) / 3)
    assert not grad.any()


# Errors


def test_one_reference_alone_is_refused():
    with pytest.raises(ValueError, match="one of ref_chosen and ref_rejected; give both, or neither"):
        dpo_loss(*FIELDS[:3], None, beta=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "unheard"}, r"loss_type must be one of .*'sigmoid'.*, got 'unheard'"),
        ({"loss_type": ("sigmoid", "unheard")}, r"loss_type must be one of .*'sigmoid'.*, got 'unheard'"),
        ({"f_divergence_type": "kl"}, r"f_divergence_type must be one of .*'reverse_kl'.*, got 'kl'"),
        ({"loss_type": "ipo"}, "'ipo' and 'sigmoid_norm' need chosen_lengths and rejected_lengths, in tokens"),
        ({"loss_type": "sigmoid_norm"}, "'ipo' and 'sigmoid_norm' need chosen_lengths and rejected_lengths"),
        ({"loss_type": "sft"}, "loss_type='sft' is a mean over tokens: it needs chosen_lengths"),
        (
            {"loss_type": "sft", "weights": jnp.ones(3) / 3, "chosen_lengths": jnp.ones(3)},
            r"where weights are given, those of dpo_weights\(chosen_lengths\)",
        ),
        ({"loss_type": "exo_pair"}, r"loss_type='exo_pair' needs label_smoothing above 0, such as 1e-3; got 0.0"),
        (
            {"loss_type": ("sigmoid", "hinge"), "loss_weights": (1.0,)},
            r"loss_weights must have one weight for each of \('sigmoid', 'hinge'\), got 1",
        ),
    ],
)
def test_what_a_type_needs_and_lacks_is_said(options, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        dpo_loss(*FIELDS, beta=0.1, **options)


@pytest.mark.parametrize("loss_type", [*POINTWISE, *SORTED])
def test_a_loss_with_the_reverse_kl_built_in_takes_no_other_divergence(loss_type):
    zeros = jnp.zeros(2)
    with pytest.raises(ValueError, match="has the reverse KL built in, got f_divergence_type='js_divergence'"):
        dpo_loss(zeros, zeros, zeros, zeros, beta=0.1, loss_type=loss_type, f_divergence_type="js_divergence")
