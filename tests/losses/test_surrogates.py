"""The surrogates by hand: values, and the gradients of those that hold a weight constant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import grpo_loss, policy_gradient_loss, rloo_loss
from jaxrl_llm.reductions import token_weights

close = functools.partial(np.testing.assert_allclose, rtol=2e-6)

# Sign of the advantage × ratio below, inside, and above the clip.
RATIOS = np.array([[0.5, 1.0, 1.5]] * 2)
ADVANTAGES = np.array([[1.0], [-1.0]])
LOG_PROBS = jnp.array([[-2.0, -0.5, -1.5]] * 2)
MASK = jnp.ones((2, 3), bool)
ONE = jnp.ones((2, 3))
RATIO_OF_ROW = 0.75 ** (1 / 3)


def value_and_gradient(loss_type, loss=grpo_loss, advantages=ADVANTAGES[:, 0], **options):
    """Computes the sum of the terms, and the gradient of each token."""
    old = LOG_PROBS - jnp.log(RATIOS)

    def of(log_probs):
        named = {"loss_type": loss_type} if loss_type else {}
        return loss(log_probs, old, jnp.asarray(advantages), MASK, weights=ONE, **named, **options)[0]

    return jax.value_and_grad(of)(LOG_PROBS)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_the_clip_takes_the_gradient_by_the_truth_table(loss_type):
    loss, grad = value_and_gradient(loss_type)
    close(loss, -(0.5 + 1 + 1.2 - 0.8 - 1 - 1.5))
    close(grad, [[-0.5, -1, 0], [0, 1, 1.5]])


def test_defect_1_the_pessimistic_side_is_not_inverted_for_negative_advantages():
    # EasyDeL: no gradient at a ratio of 1.5, and one of 0.5 at a ratio of 0.5.
    _, grad = value_and_gradient("grpo")
    close(grad[1], [0, 1, 1.5])


def test_cispo_weighs_log_probs_by_a_capped_constant():
    loss, grad = value_and_gradient("cispo", epsilon_high=1.2)
    close(grad, -np.minimum(RATIOS, 1.2) * ADVANTAGES)
    close(loss, np.sum(-np.minimum(RATIOS, 1.2) * ADVANTAGES * np.asarray(LOG_PROBS)))


def test_defect_2_the_ratio_of_cispo_has_no_gradient():
    # With one, the gradient would be -r A (1 + log π): of the wrong sign where log π < -1.
    _, grad = value_and_gradient("cispo", epsilon_high=5.0)
    assert (np.sign(grad) == -ADVANTAGES).all()
    assert (np.asarray(LOG_PROBS) < -1).any()


def test_sapo_fades_in_place_of_the_clip():
    def gate(x):
        return 1 / (1 + np.exp(-x))

    temperature = np.where(ADVANTAGES > 0, 1.0, 1.05)
    soft = gate(temperature * (RATIOS - 1))
    loss, grad = value_and_gradient("sapo")
    close(loss, np.sum(-4 / temperature * soft * ADVANTAGES))
    close(grad, -4 * soft * (1 - soft) * RATIOS * ADVANTAGES)


def test_vespo_weighs_log_probs_by_a_function_of_the_whole_sequence():
    ratio = 0.75
    weights = [np.exp(3 + 2 * np.log(ratio) - 3 * ratio), np.exp(2 + 3 * np.log(ratio) - 2 * ratio)]
    loss, grad = value_and_gradient("vespo")
    close(grad, -np.array(weights)[:, None] * ADVANTAGES * np.ones(3))
    close(loss, np.sum(np.asarray(grad) * np.asarray(LOG_PROBS)))


@pytest.mark.parametrize("correction", [np.array([[0.5], [2.0]]), np.array([[0.5, 1, 1], [1, 1, 2]])])
def test_the_correction_of_vespo_is_a_factor_of_the_ratio_of_the_sequence(correction):
    _, grad = value_and_gradient("vespo", correction=jnp.asarray(correction))
    ratio = 0.75 * np.array([0.5, 2.0])
    weights = [np.exp(3 + 2 * np.log(ratio[0]) - 3 * ratio[0]), np.exp(2 + 3 * np.log(ratio[1]) - 2 * ratio[1])]
    close(grad, -np.array(weights)[:, None] * ADVANTAGES * np.ones(3))


def test_gmpo_clips_log_ratios_token_by_token_within_a_geometric_mean():
    loss, grad = value_and_gradient("gmpo", epsilon=0.3)
    rows = np.exp([np.mean([np.log(0.5), 0, 0.3]), np.mean([-0.3, 0, np.log(1.5)])])
    close(loss, -3 * (rows[0] - rows[1]))
    close(grad, [[-rows[0], -rows[0], 0], [0, rows[1], rows[1]]], rtol=1e-5)


def test_luspo_counts_rows_by_their_length():
    options = {"importance_sampling_level": "sequence", "loss_type": "luspo"}
    old, mask = LOG_PROBS - jnp.log(RATIOS), jnp.array([[1, 1, 1], [1, 0, 0]])
    loss, _ = grpo_loss(LOG_PROBS, old, jnp.asarray(ADVANTAGES[:, 0]), mask, **options)
    close(loss, -(RATIO_OF_ROW * 1 * 3 + 0.8 * -1 * 1) / 2)


def test_defect_13_luspo_with_a_ratio_of_tokens_is_refused():
    # TRL 1.10 averages it over the padded slots.
    for level in ("token", "sequence_token"):
        with pytest.raises(ValueError, match=r"luspo.* needs importance_sampling_level='sequence', got"):
            value_and_gradient("luspo", importance_sampling_level=level)


def test_cispo_without_its_cap_is_refused():
    with pytest.raises(ValueError, match=r"cispo.* needs epsilon_high"):
        value_and_gradient("cispo")


def test_gspo_token_is_gspo_where_a_row_has_one_advantage():
    options = {"epsilon": 0.05, "epsilon_high": 0.3}
    for row, token in zip(
        value_and_gradient("grpo", importance_sampling_level="sequence", **options),
        value_and_gradient("grpo", importance_sampling_level="sequence_token", **options),
        strict=True,
    ):
        close(token, row)


def test_gspo_token_gives_each_token_the_gradient_of_its_advantage():
    advantages = np.array([[1.0, -2.0, 0.5]] * 2)
    _, grad = value_and_gradient("grpo", advantages=advantages, importance_sampling_level="sequence_token")
    close(grad, -RATIO_OF_ROW * advantages, rtol=1e-5)


def test_rloo_clips_the_ratio_of_the_sum():
    weights = token_weights(MASK, "sequence_mean")
    old = LOG_PROBS - jnp.log(RATIOS)

    def loss(log_probs, **options):
        advantages = jnp.asarray(ADVANTAGES[:, 0])
        return rloo_loss(log_probs, old, advantages, MASK, weights=weights, **options)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(LOG_PROBS)
    close(value, -(0.75 * 1 + 0.8 * -1) / 2)
    close(grad, [[-0.75 / 2] * 3, [0, 0, 0]])
    close(metrics["clip_ratio/low_mean"], 0.5)
    close(loss(LOG_PROBS, epsilon=0.3)[0], 0)


def test_on_policy_every_type_has_the_gradient_of_reinforce():
    log_probs = LOG_PROBS - 0.25
    mask, advantages = jnp.array([[1, 1, 1], [1, 1, 0]]), jnp.array([1.5, -0.5])

    def gradients(log_probs, old):
        def of(loss_type, **options):
            options = {"epsilon_high": 5.0, "max_completion_length": 7, "loss_type": loss_type} | options
            return jax.grad(lambda x: grpo_loss(x, old, advantages, mask, **options)[0])(log_probs)

        result = {name: of(name) for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "gmpo")}
        result["luspo"] = of("luspo", importance_sampling_level="sequence")
        result |= {level: of("grpo", importance_sampling_level=level) for level in ("sequence", "sequence_token")}
        result["rloo"] = jax.grad(lambda x: rloo_loss(x, old, advantages, mask)[0])(log_probs)
        return result

    def reinforce(log_probs, reduction):
        options = {"reduction": reduction, "max_length": 7}
        return jax.grad(lambda x: policy_gradient_loss(x, advantages, mask, **options)[0])(log_probs)

    sums = {"luspo": "sequence_sum", "rloo": "sequence_sum", "dr_grpo": "constant"}
    means = dict.fromkeys(("grpo", "sapo", "gmpo", "sequence", "sequence_token"), "sequence_mean")
    expected = {name: reinforce(log_probs, by) for name, by in (sums | means).items()}
    expected |= dict.fromkeys(("bnpo", "dapo", "cispo", "vespo"), reinforce(log_probs, "token_mean"))
    for old in (log_probs, None):
        for name, grad in jax.jit(gradients)(log_probs, old).items():
            close(grad, expected[name], atol=1e-8, err_msg=name)


# KL penalties: exact expectations over a vocabulary of 4, of completions of one token.

LOGITS, REFERENCE = jnp.array([0.3, -0.8, 1.1, 0.0]), jnp.array([-0.5, 0.4, 0.2, 0.1])


def expected_penalty_gradient(**options):
    """Computes the mean under the policy of the gradient of a KL penalty, as sampling would estimate it."""
    probs, ref_log_probs = jax.nn.softmax(LOGITS), jax.nn.log_softmax(REFERENCE)

    def loss(logits):
        log_probs = jax.nn.log_softmax(logits)
        fields = log_probs[:, None], None, jnp.zeros(4), jnp.ones((4, 1))
        return grpo_loss(*fields, ref_log_probs=ref_log_probs[:, None], beta=1.0, weights=probs[:, None], **options)[0]

    return jax.grad(loss)(LOGITS)


def gradient_of_kl(reverse):
    def kl(logits):
        log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q)) if reverse else jnp.sum(jnp.exp(log_q) * (log_q - log_p))

    return jax.grad(kl)(LOGITS)


def test_defect_8_the_default_penalty_pulls_where_k1_would_not():
    close(expected_penalty_gradient(kl_estimator="k1"), 0, atol=1e-7)
    close(expected_penalty_gradient(), gradient_of_kl(reverse=False), rtol=1e-5)
    close(expected_penalty_gradient(kl_estimator="k2"), gradient_of_kl(reverse=True), rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_bias_corrected_kl_has_the_gradient_of_the_kl(estimator):
    corrected = expected_penalty_gradient(kl_estimator=estimator, use_bias_correction_kl=True)
    close(corrected, gradient_of_kl(reverse=True), rtol=1e-5, atol=1e-7)


def test_an_exact_kl_enters_with_its_gradient():
    kl = jnp.array([[0.3, 0.1, 9.0]])
    fields = jnp.zeros((1, 3)), None, jnp.zeros(1), jnp.array([[1, 1, 0]])
    (loss, metrics), grad = jax.value_and_grad(lambda kl: grpo_loss(*fields, ref_kl=kl, beta=0.5), has_aux=True)(kl)
    close(loss, 0.5 * 0.2)
    close(metrics["kl"], 0.2)
    close(grad, [[0.25, 0.25, 0]])
    with pytest.raises(ValueError, match="both ref_log_probs and ref_kl"):
        grpo_loss(*fields, ref_kl=kl, ref_log_probs=kl, beta=0.5)
