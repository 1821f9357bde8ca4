import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import group_relative_advantages
from jaxrl_llm.losses import grpo_loss
from jaxrl_llm.losses.group_relative import GRPO_PRESETS, grpo_weights
from tests.unchecked import unchecked

pytestmark = pytest.mark.usefixtures("quick_compilation")

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)

RATIOS = np.array([[1.1, 1.5, 3.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]])
MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
ADVANTAGES = np.array([1.0, -2.0, 5.0])
TERMS = -np.array([[1.1, 1.2, 1.2], [-2 * 0.8, 0, 0], [0, 0, 0]])


def by_hand(**options):
    old = jnp.full(RATIOS.shape, -1.0)
    return grpo_loss(old + jnp.log(RATIOS), old, jnp.asarray(ADVANTAGES), jnp.asarray(MASK), **options)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", (TERMS[0].sum() / 3 + TERMS[1].sum() / 1 + 0) / 3),
        ("bnpo", TERMS.sum() / 4),
        ("dapo", TERMS.sum() / 4),
        ("dr_grpo", TERMS.sum() / (3 * 7)),
    ],
)
def test_grpo_loss_by_hand(loss_type, expected):
    loss, metrics = by_hand(loss_type=loss_type, max_completion_length=7)
    close(loss, expected)
    close(metrics["policy_loss"], expected)
    weights = grpo_weights(jnp.asarray(MASK), loss_type, max_completion_length=7)
    close(by_hand(weights=weights)[0], expected)


def test_clip_metrics_by_hand():
    _, metrics = by_hand()
    expected = {"low_mean": 1 / 4, "high_mean": 2 / 4, "region_mean": 3 / 4, "low_min": 0, "high_max": 2 / 3}
    for name, value in expected.items():
        close(metrics[f"clip_ratio/{name}"], value, err_msg=name)


def test_the_sequence_ratio_is_the_geometric_mean_over_the_tokens():
    loss, _ = by_hand(importance_sampling_level="sequence", epsilon=0.9, loss_type="grpo")
    close(loss, -((1.1 * 1.5 * 3) ** (1 / 3) * 1 + 0.5 * -2) / 3)


def test_the_gradient_of_the_sequence_ratio_is_shared_by_its_tokens():
    def loss(log_ratios):
        options = {"importance_sampling_level": "sequence", "epsilon": 0.9, "loss_type": "grpo"}
        return grpo_loss(log_ratios, jnp.zeros((3, 3)), jnp.asarray(ADVANTAGES), jnp.asarray(MASK), **options)[0]

    grad = jax.grad(loss)(jnp.log(RATIOS))
    ratios = np.array([[(1.1 * 1.5 * 3) ** (1 / 3)], [0.5], [0]])
    close(grad, -MASK * ratios * ADVANTAGES[:, None] / np.maximum(MASK.sum(-1, keepdims=True), 1) / 3)


def test_clip_higher_moves_the_upper_bound_alone():
    close(by_hand(epsilon_high=0.6)[0], (TERMS.sum() - 0.3 - 0.4) / 4)


def test_kl_penalty_by_hand():
    ref_log_ratios = np.array([[0.3, -0.2, 0.0], [1.0, 50.0, 50.0], [50.0, 50.0, 50.0]])
    reference = jnp.log(RATIOS) - 1 - ref_log_ratios
    loss, metrics = by_hand(loss_type="grpo", beta=0.5, ref_log_probs=reference)
    k3 = (np.exp(-ref_log_ratios) + ref_log_ratios - 1) * MASK
    plain, _ = by_hand(loss_type="grpo")
    close(metrics["kl"], k3.sum() / 4)
    close(loss - plain, 0.5 * (k3[0].sum() / 3 + k3[1].sum()) / 3)


def test_there_is_no_kl_penalty_where_policy_and_reference_agree():
    loss, metrics = by_hand(beta=0.5, ref_log_probs=jnp.log(RATIOS) - 1)
    assert metrics["kl"] == 0
    close(loss, by_hand()[0])


def test_the_entropy_bonus_has_the_same_scale_for_all_loss_types():
    entropy = jnp.arange(9.0).reshape(3, 3)
    for loss_type in GRPO_PRESETS:
        options = {"loss_type": loss_type, "max_completion_length": 7, "epsilon_high": 5.0}
        options |= {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
        loss, metrics = by_hand(entropy=entropy, entropy_coef=0.1, **options)
        close(metrics["entropy"], (0 + 1 + 2 + 3) / 4)
        close(loss - by_hand(**options)[0], -0.1 * 1.5, rtol=1e-5)


def test_advantages_may_be_given_for_each_token():
    per_token = jnp.asarray(np.repeat(ADVANTAGES[:, None], 3, 1))
    old = jnp.full(RATIOS.shape, -1.0)
    close(grpo_loss(old + jnp.log(RATIOS), old, per_token, jnp.asarray(MASK))[0], by_hand()[0])


def test_the_grpo_example_of_the_guide():
    # The guide gives its rewards and the loss; the ratios are ours: of 8 answers, the best has become less likely.
    advantages = group_relative_advantages(jnp.array([8.0, 6, 7, 9, 7, 6, 7, 10]), 8, scale_rewards="none")
    ratios = jnp.ones((8, 1)).at[7].set(0.8)
    loss, _ = grpo_loss(jnp.log(ratios), jnp.zeros((8, 1)), advantages, jnp.ones((8, 1), bool))
    close(loss, 0.0625)


def test_hyperparameters_of_grpo_may_be_traced():
    names = "epsilon", "epsilon_high", "delta", "beta", "entropy_coef", "max_completion_length"
    sweep = jnp.array([[0.2, 0.28, 1.5, 0.04, 0.0, 7.0], [0.1, 0.6, 2.5, 0.0, 0.1, 3.0]])

    def loss(setting):
        reference, entropy = jnp.zeros(RATIOS.shape), jnp.ones(RATIOS.shape)
        options = dict(zip(names, setting, strict=True))
        return by_hand(loss_type="dr_grpo", ref_log_probs=reference, entropy=entropy, **options)[0]

    swept, one = jax.jit(jax.vmap(loss))(sweep), jax.jit(loss)
    close(swept, [one(setting) for setting in sweep])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "unheard"}, r"loss_type must be one of .*'dapo'.*, got 'unheard'"),
        ({"importance_sampling_level": "row"}, r"importance_sampling_level must be one of .*'sequence'.*, got 'row'"),
        ({"beta": 0.1}, r"beta=0.1 needs ref_log_probs"),
        ({"loss_type": "dr_grpo"}, r"dr_grpo.* needs max_completion_length"),
    ],
)
def test_errors_name_the_argument_and_the_cure(options, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        by_hand(**options)
