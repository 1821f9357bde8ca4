import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.log_probs import token_entropy, token_log_probs
from jaxrl_llm.losses import policy_gradient_loss, ppo_loss, value_loss
from jaxrl_llm.reductions import LossWeights


def test_policy_gradient_loss_by_hand():
    log_probs = jnp.array([[-1.0, -2.0, -3.0], [-0.5, -4.0, -7.0]])
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    entropy = jnp.array([[0.3, 0.6, 9.0], [0.9, 9.0, 9.0]])
    loss, metrics = policy_gradient_loss(log_probs, jnp.array([2.0, -1.0]), mask, entropy=entropy, entropy_coef=0.1)
    # -(2·(-1) + 2·(-2) + (-1)·(-0.5)) / 3 = 5.5 / 3; the entropy is (0.3 + 0.6 + 0.9) / 3 = 0.6.
    np.testing.assert_allclose(metrics["loss/policy_avg"], 5.5 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/entropy_avg"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(loss, 5.5 / 3 - 0.06, rtol=1e-6)


def test_the_gradient_of_the_policy_gradient_loss_is_minus_the_weighted_advantage():
    advantages = jnp.array([3.0, -1.0, 2.0])
    grad = jax.grad(lambda x: policy_gradient_loss(x, advantages)[0])(jnp.array([-1.0, -2.0, -0.1]))
    np.testing.assert_allclose(grad, -advantages / 3, rtol=1e-6)


# Vectors of rlax's tests (rlax/_src/policy_gradients_test.py), which weights steps and divides by their number.
LOGITS = np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
OLD_LOGITS = np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-3.0, -2.0, -1.0]])
ADVANTAGES = np.array([0.3, 0.2, 0.1])
WEIGHTS = np.array([-2.0, 2.0, 0.0])


@pytest.mark.parametrize(
    ("shift", "actions", "sign", "expected", "expected_entropy"),
    [(0, [0, 1, 2], 1, 0.0788835088, 0.288693), (1, [0, 0, 0], -1, 0.327200909, 1.15422)],
)
def test_policy_gradient_and_entropy_equal_rlax(shift, actions, sign, expected, expected_entropy):
    logits = jnp.asarray(LOGITS + shift)
    log_probs = token_log_probs(logits, jnp.array(actions))
    weights = jnp.asarray((WEIGHTS - shift) / 3)
    loss, metrics = policy_gradient_loss(
        log_probs, jnp.asarray(sign * ADVANTAGES), entropy=token_entropy(logits), weights=weights
    )
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    np.testing.assert_allclose(-metrics["policy/entropy_avg"], expected_entropy, atol=1e-5)


@pytest.mark.parametrize(("sign", "expected"), [(1, -0.17117467), (-1, 0.19333333)])
def test_the_clipped_surrogate_equals_rlax(sign, expected):
    # The first is written there to five digits: it is (0.3 + 0.2 + 0.1 / e²) / 3.
    actions = jnp.arange(3)
    log_probs, old = (token_log_probs(jnp.asarray(logits), actions) for logits in (LOGITS, OLD_LOGITS))
    loss, _ = ppo_loss(log_probs, old, jnp.asarray(sign * ADVANTAGES), cliprange=0.2)
    np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_the_ppo_example_of_the_guide():
    # The guide gives the loss alone; ratios and advantages are ours: -(min(3, 2.4) + 0.5 + 0.9) / 3.
    ratios, advantages = jnp.array([1.5, 0.5, 0.9]), jnp.array([2.0, 1.0, 1.0])
    loss, metrics = ppo_loss(jnp.log(ratios), jnp.zeros(3), advantages, cliprange=0.2)
    np.testing.assert_allclose(loss, -1.266667, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], 1 / 3, rtol=1e-6)


def ppo_by_hand(**options):
    ratios = jnp.array([[1.1, 0.7], [1.4, 5.0]])
    return ppo_loss(
        jnp.log(ratios) - 1,
        jnp.full((2, 2), -1.0),
        jnp.array([[1.0, -2.0], [3.0, 8.0]]),
        jnp.array([[1, 1], [1, 0]]),
        values=jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        returns=jnp.array([[0.0, 4.0], [3.0, 9.0]]),
        entropy=jnp.array([[0.1, 0.2], [0.6, 5.0]]),
        **options,
    )


def test_ppo_loss_by_hand():
    loss, metrics = ppo_by_hand(vf_coef=0.25, entropy_coef=0.1)
    policy = -(1.1 * 1 + max(0.7, 0.8) * -2 + 1.2 * 3) / 3
    value = 0.5 * (1 + 4 + 0) / 3
    np.testing.assert_allclose(metrics["loss/policy_avg"], policy, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/value_avg"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/entropy_avg"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(loss, policy + 0.25 * value - 0.1 * 0.3, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["val/ratio"], (1.1 + 0.7 + 1.4) / 3, rtol=1e-6)
    approx_kl = np.mean([r - 1 - np.log(r) for r in (1.1, 0.7, 1.4)])
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], approx_kl, rtol=1e-5)


def test_each_term_of_ppo_takes_its_own_weights():
    weights = LossWeights(*(jnp.full((2, 2), x) for x in (1.0, 10.0, 100.0)))
    metrics = ppo_by_hand(weights=weights)[1]
    np.testing.assert_allclose(metrics["policy/entropy_avg"], 10 * 0.9, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/policy_avg"], -(1.1 - 1.6 + 3.6), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/value_avg"], 100 * 0.5 * 5, rtol=1e-6)


def test_the_value_mask_of_ppo_is_its_own():
    _, metrics = ppo_by_hand(value_mask=jnp.array([[0, 0], [0, 1]]))
    np.testing.assert_allclose(metrics["loss/value_avg"], 0.5 * 25)


def test_ppo_serves_environment_steps_without_a_mask():
    # [time, envs]: the mean over all steps, whatever the axes mean.
    time_first = ppo_loss(jnp.array([[-1.0], [-2.0]]), jnp.array([[-1.5], [-2.5]]), jnp.array([[1.0], [-1.0]]))
    np.testing.assert_allclose(time_first[0], (-1.2 + np.exp(0.5)) / 2, rtol=1e-6)


def test_hyperparameters_of_ppo_may_be_traced():
    sweep = jnp.array([[0.1, 0.3, 0.5, 0.0], [0.4, 0.1, 0.2, 0.1]])

    def loss(setting):
        options = {"old_values": jnp.zeros((2, 2)), "cliprange": setting[0], "cliprange_value": setting[1]}
        return ppo_by_hand(vf_coef=setting[2], entropy_coef=setting[3], **options)[0]

    swept, one = jax.jit(jax.vmap(loss))(sweep), jax.jit(loss)
    np.testing.assert_allclose(swept, [one(setting) for setting in sweep], rtol=1e-6)


def test_ppo_refuses_values_without_returns():
    with pytest.raises(ValueError, match="values without returns"):
        ppo_loss(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), values=jnp.zeros(2))


def test_ppo_refuses_a_value_clip_without_old_values():
    with pytest.raises(ValueError, match="cliprange_value needs old_values"):
        ppo_by_hand(cliprange_value=0.2)


def test_the_value_term_of_ppo_is_the_value_loss():
    values, returns, old = (jnp.array(x) for x in ([1.0, 2.0, 5.0], [0.0, 2.5, 1.0], [0.5, 2.9, 3.0]))
    zeros = jnp.zeros(3)
    options = {"old_values": old, "cliprange_value": 0.3}
    loss, _ = ppo_loss(zeros, zeros, zeros, values=values, returns=returns, vf_coef=1.0, **options)
    np.testing.assert_allclose(loss, value_loss(values, returns, **options)[0], rtol=1e-6)
