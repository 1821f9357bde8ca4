"""Our returns, advantages, losses and distributions against rlax's, on random batches."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.advantages import discounted_returns, generalized_advantages
from jaxrl_llm.distributions import Categorical, DiagonalGaussian
from jaxrl_llm.losses import policy_gradient_loss, ppo_loss, q_learning_loss, value_loss
from jaxrl_llm.rollouts.environment import Transition
from jaxrl_llm.rollouts.replay import n_step_experience

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports use names that jax has deprecated
    import rlax

pytestmark = pytest.mark.filterwarnings("ignore:Rlax:PendingDeprecationWarning")
TIME, ENVS, ACTIONS = 7, 3, 4
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=5)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng([seed, len(shape), *shape]).normal(size=shape), jnp.float32)


def episodes(seed):
    """Rewards, values of T + 1 states, and where episodes terminate, for one environment after the other."""
    rng = np.random.default_rng(seed)
    return random(seed, TIME, ENVS), random(seed, TIME + 1, ENVS), jnp.asarray(rng.random((TIME, ENVS)) < 0.2)


@few
@given(seeds)
def test_returns(seed):
    rewards, values, terminated = episodes(seed)
    discounts = 0.9 * (1 - terminated)
    found = discounted_returns(rewards, discounts, values[-1])
    for env in range(ENVS):
        close(found[:, env], rlax.discounted_returns(rewards[:, env], discounts[:, env], values[-1, env]))


@few
@given(seeds, st.sampled_from([0.0, 0.4, 0.95, 1.0]))
def test_advantages(seed, lam):
    rewards, values, terminated = episodes(seed)
    found, returns = generalized_advantages(
        rewards, values[:-1], values[1:], terminated, jnp.zeros_like(terminated), gamma=0.9, lam=lam
    )
    for env in range(ENVS):
        expected = rlax.truncated_generalized_advantage_estimation(
            rewards[:, env], 0.9 * (1 - terminated[:, env]), lam, values[:, env]
        )
        close(found[:, env], expected)
        close(returns[:, env], expected + values[:-1, env])


@few
@given(seeds)
def test_policy_gradient_and_entropy(seed):
    logits, advantages = random(seed, TIME, ACTIONS), random(seed, TIME)
    actions = jnp.asarray(np.random.default_rng(seed).integers(0, ACTIONS, TIME))
    policy, ones = Categorical(logits), jnp.ones(TIME)
    loss, metrics = policy_gradient_loss(
        policy.log_prob(actions), advantages, entropy=policy.entropy(), entropy_coef=0.1
    )
    of_policy = rlax.policy_gradient_loss(logits, actions, advantages, ones)
    close(metrics["loss/policy_avg"], of_policy)
    close(loss, of_policy + 0.1 * rlax.entropy_loss(logits, ones))  # which is minus the entropy

    def ours(logits):
        return policy_gradient_loss(Categorical(logits).log_prob(actions), advantages)[0]

    close(jax.grad(ours)(logits), jax.grad(rlax.policy_gradient_loss)(logits, actions, advantages, ones))


@few
@given(seeds, st.sampled_from([0.05, 0.2, 1.0]))
def test_clipped_surrogate(seed, epsilon):
    new, old, advantages = random(seed, TIME), random(seed, TIME, 1)[:, 0], random(seed, TIME)[::-1]
    found, _ = ppo_loss(new, old, advantages, cliprange=epsilon)
    close(found, rlax.clipped_surrogate_pg_loss(jnp.exp(new - old), advantages, epsilon))


@few
@given(seeds)
def test_values(seed):
    values, returns = random(seed, TIME), random(seed, TIME, 1)[:, 0]
    close(value_loss(values, returns)[0], jnp.mean(rlax.l2_loss(values, returns)))


@few
@given(seeds, st.booleans(), st.sampled_from([None, 0.5, 1.0]))
def test_q_learning(seed, double, delta):
    q, target, online = (
        random(seed, TIME, ACTIONS),
        random(seed, TIME + 1, ACTIONS)[1:],
        random(seed, TIME + 2, ACTIONS)[2:],
    )
    rng = np.random.default_rng(seed)
    actions, rewards = jnp.asarray(rng.integers(0, ACTIONS, TIME)), random(seed, TIME)
    discounts = jnp.asarray(rng.choice([0.0, 0.9], TIME), jnp.float32)
    if double:
        errors = jax.vmap(rlax.double_q_learning)(q, actions, rewards, discounts, target, online)
    else:
        errors = jax.vmap(rlax.q_learning)(q, actions, rewards, discounts, target)
    expected = rlax.l2_loss(errors) if delta is None else rlax.huber_loss(errors, delta)
    found, metrics = q_learning_loss(
        q, actions, rewards, discounts, target, next_q_online=online if double else None, huber_delta=delta
    )
    close(found, jnp.mean(expected))
    close(metrics["loss/td_avg"], jnp.mean(jnp.abs(errors)))


@pytest.mark.parametrize("n", [1, 3, 7])
def test_n_step_targets(n):
    rewards, values, terminated = episodes(n)
    steps = Transition(
        observation=values[:-1],
        action=jnp.zeros((TIME, ENVS), jnp.int32),
        log_prob=jnp.zeros((TIME, ENVS)),
        reward=rewards,
        terminated=terminated,
        truncated=jnp.zeros_like(terminated),
        final_observation=values[1:],  # a state shows its own value
        episode_return=rewards,
        episode_length=jnp.zeros((TIME, ENVS), jnp.int32),
    )
    experience = n_step_experience(steps, gamma=0.9, n=n)
    found = (experience.reward + experience.discount * experience.next_observation).reshape(TIME, ENVS)
    for env in range(ENVS):
        discounts = 0.9 * (1 - terminated[:, env])
        close(found[:, env], rlax.n_step_bootstrapped_returns(rewards[:, env], discounts, values[1:, env], n))


@few
@given(seeds)
def test_distributions(seed):
    p, q = random(seed, TIME, ACTIONS), random(seed, TIME + 1, ACTIONS)[1:]
    close(Categorical(p).kl(Categorical(q)), rlax.categorical_kl_divergence(p, q))
    close(Categorical(p).entropy(), rlax.softmax().entropy(p))
    mean, log_std, action = p, 0.3 * q, p[::-1]
    gaussian, theirs = DiagonalGaussian(mean, log_std), rlax.gaussian_diagonal()
    close(gaussian.log_prob(action), theirs.logprob(action, mean, jnp.exp(log_std)))
    close(gaussian.entropy(), theirs.entropy(mean, jnp.exp(log_std)))
    other = DiagonalGaussian(mean[::-1], -log_std)
    close(
        gaussian.kl(other),
        rlax.multivariate_normal_kl_divergence(mean, jnp.exp(log_std), other.mean, jnp.exp(-log_std)),
    )
