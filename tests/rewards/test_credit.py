"""From scores to token rewards and advantages, for PPO on language."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_llm.reductions import masked_mean, masked_std
from jaxrl_llm.rewards import (
    penalize_missing_eos,
    response_advantages,
    soft_overlong_punishment,
    step_mask,
    token_rewards,
)
from tests.unchecked import unchecked

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7)

MASK = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
SCORES = jnp.array([1.0, 2.0, 3.0, 4.0])
PAST = {"score_position": "after_last"}


def test_the_score_is_at_the_last_token():
    close(token_rewards(SCORES, MASK), [[0, 0, 1, 0], [0, 0, 0, 2], [3, 0, 0, 0], [0, 0, 0, 0]])


def test_the_score_may_be_one_past_the_last_token_where_there_is_room():
    close(token_rewards(SCORES, MASK, **PAST), [[0, 0, 0, 1], [0, 0, 0, 2], [0, 3, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(step_mask(MASK, **PAST).sum(-1), [4, 4, 2, 0])
    np.testing.assert_array_equal(step_mask(MASK), MASK != 0)


@pytest.mark.parametrize(("estimator", "penalty"), [("k1", lambda d: d), ("k3", lambda d: np.exp(-d) + d - 1)])
def test_each_token_pays_for_its_kl(estimator, penalty):
    gaps = np.array([[0.5, -0.3, 0.1, 9.0], [0.2, 0.0, -0.1, 0.4], [1.0, 9.0, 9.0, 9.0], [9.0] * 4])
    pair = {"log_probs": jnp.asarray(gaps) - 2, "ref_log_probs": jnp.full((4, 4), -2.0)}
    rewards = token_rewards(SCORES, MASK, kl_coef=0.1, kl_estimator=estimator, **pair)
    close(rewards, np.asarray(token_rewards(SCORES, MASK)) - 0.1 * penalty(gaps) * np.asarray(MASK))


def test_garbage_under_the_mask_pays_nothing():
    log_probs = jnp.where(MASK != 0, -1.0, jnp.nan)
    close(
        token_rewards(SCORES, MASK, log_probs=log_probs, ref_log_probs=-log_probs * 0 - 1), token_rewards(SCORES, MASK)
    )


def test_defect_5_a_fraction_of_a_reward_is_not_cut_off():
    # Tunix adds scores into zeros of the type of the token ids: 0.7 becomes 0.
    ids = jnp.ones((1, 2), int)
    close(token_rewards(jnp.array([0.7]), ids), [[0, 0.7]])
    penalized = token_rewards(jnp.array([1]), ids, log_probs=ids * 0.5, ref_log_probs=ids * 0.0, kl_coef=0.1)
    close(penalized, [[-0.05, 0.95]])


def test_a_completion_without_an_end_is_penalized():
    ids = jnp.array([[5, 9, 0], [5, 6, 7], [5, 6, 8], [5, 6, 9]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]])
    close(penalize_missing_eos(SCORES, ids, mask, jnp.array([8, 9]), 0.5), [1, 1.5, 3, 3.5])
    close(penalize_missing_eos(SCORES, ids, mask, 9), [1, 1, 2, 3])


def test_defect_9_the_soft_overlong_punishment_counts_tokens_and_stops_at_minus_one():
    # The case of TRL's tests (50, 90, 110), and the ends of the slope. Tunix counts characters, and goes on to -15.
    lengths = jnp.array([50, 80, 85, 90, 100, 101, 110, 500])
    punish = jax.jit(
        lambda cache: soft_overlong_punishment(lengths, max_completion_length=100, soft_punish_cache=cache)
    )
    close(punish(20), [0, 0, -0.25, -0.5, -1, -1, -1, -1])
    close(punish(0), [0, 0, 0, 0, 0, -1, -1, -1])


def loop(rewards, values, gamma, lam):
    """Computes GAE of one response, by its definition."""
    advantages, ahead, next_value = np.zeros(len(rewards)), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        ahead = rewards[t] + gamma * next_value - values[t] + gamma * lam * ahead
        advantages[t], next_value = ahead, values[t]
    return advantages


@pytest.mark.parametrize("mask", [MASK, jnp.array([[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])])
def test_advantages_are_of_the_response_tokens_alone(mask):
    rng = np.random.default_rng(0)
    rewards, values = (np.where(mask, rng.normal(size=(4, 4)), np.nan) for _ in range(2))
    learned = response_advantages(
        jnp.asarray(rewards), jnp.asarray(values), mask, gamma=0.9, lam=0.8, whiten_advantages=False
    )
    for row, counts in enumerate(np.asarray(mask) != 0):
        expected = loop(rewards[row, counts], values[row, counts], 0.9, 0.8)
        close(learned.advantages[row, counts], expected, atol=1e-6)
        close(learned.returns[row, counts], expected + values[row, counts], atol=1e-6)
    assert not np.any(np.where(mask, 0, learned.advantages))
    assert not np.any(np.where(mask, 0, learned.returns))
    np.testing.assert_array_equal(learned.value_mask, mask != 0)


def test_advantages_are_standardized_over_the_tokens_and_returns_are_not():
    rewards = token_rewards(SCORES, MASK)
    values = jnp.arange(16.0).reshape(4, 4) / 8
    plain, white = (response_advantages(rewards, values, MASK, whiten_advantages=x) for x in (False, True))
    close(masked_mean(white.advantages, MASK), 0, atol=1e-6)
    close(masked_std(white.advantages, MASK), 1)
    close(white.returns, plain.returns)


def test_defect_4_whitened_rewards_keep_their_mean_and_have_a_sample_deviation_of_one():
    # EasyDeL divides without adding the mean back, by the population's deviation.
    rewards = jnp.where(MASK != 0, jnp.arange(16.0).reshape(4, 4) / 8 + 3, 0)
    options = {"gamma": 0.0, "lam": 0.0, "whiten_advantages": False}
    white = response_advantages(rewards, jnp.zeros((4, 4)), MASK, whiten_rewards=True, **options).advantages
    close(masked_mean(white, MASK), masked_mean(rewards, MASK))
    close(masked_std(white, MASK), 1)


def test_statistics_are_those_of_all_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    fields = token_rewards(SCORES, MASK), jnp.arange(16.0).reshape(4, 4) / 8, MASK
    whiten = functools.partial(response_advantages, whiten_rewards=True)
    mapped = functools.partial(whiten, axis_name="data")
    sharded = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(*fields)
    for ours, whole in zip(sharded, whiten(*fields), strict=True):
        close(ours, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_probs": jnp.zeros((4, 4))}, r"needs log_probs and ref_log_probs; got one"),
        ({"score_position": "first"}, r"score_position must be one of .*'after_last'.*, got 'first'"),
    ],
)
def test_errors_name_the_argument_and_the_cure(options, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        token_rewards(SCORES, MASK, **options)
