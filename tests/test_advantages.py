import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from jaxrl_llm.advantages import (
    discounted_returns,
    drop_zero_std_groups,
    generalized_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
    multi_objective_advantages,
    reinforce_plus_plus_advantages,
)
from tests.golden import fixture
from tests.unchecked import unchecked

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)


ESTIMATE = jax.jit(generalized_advantages)


def array(x):
    return jnp.array(x, jnp.float32)


# Returns


def test_the_discounted_return_of_the_guide():
    # The guide prints 17.73; 10 + 0.9·5 + 0.81·3 + 0.729·1 is 17.659.
    close(discounted_returns(array([10, 5, 3, 1]), 0.9, 0.0), [17.659, 8.51, 3.9, 1])


def test_the_monte_carlo_advantages_of_the_guide():
    rewards, values, expected = array([1, 2, 3, 10]), array([5, 6, 7, 8]), [10.62329, 8.771, 5.9, 2.0]
    close(discounted_returns(rewards, 0.99, 0.0) - values, expected)
    ends = jnp.array([False, False, False, True])
    next_values = jnp.append(values[1:], 1e6)  # What lies after the end is worth nothing.
    advantages, returns = ESTIMATE(rewards, values, next_values, ends, jnp.zeros_like(ends), gamma=0.99, lam=1.0)
    close(advantages, expected)
    close(returns, values + np.array(expected))


def test_discounted_returns_equal_rlax():
    # rlax/_src/multistep_test.py, DiscountedReturnsTest.
    rewards = array([[1, 0, -1, 0, 1], [0.5, 0.8, -0.7, 0, 2.1]])
    discounts = array([[0.5, 0.9, 1, 0.5, 0.8], [0.9, 0.5, 0.3, 0.8, 0.7]])
    returns = discounted_returns(rewards.T, discounts.T, array([3, 2.7]))
    close(returns.T, [[1.315, 0.63, 0.7, 1.7, 3.4], [1.33592, 0.9288, 0.2576, 3.192, 3.99]])


# Generalized advantages: vectors are [batch, time + 1] as published, ours is time first.


def gae(rewards, values, terminated=None, truncated=None, *, gamma, lam):
    rewards, values = (np.atleast_2d(np.asarray(x, np.float32)) for x in (rewards, values))
    flags = [np.zeros(rewards.shape) if x is None else np.atleast_2d(x) for x in (terminated, truncated)]
    arrays = rewards, values[:, :-1], values[:, 1:], *flags
    advantages, returns = jax.device_get(ESTIMATE(*(x.T for x in arrays), gamma=gamma, lam=lam))
    close(returns, advantages + values[:, :-1].T)
    return advantages.T


@pytest.mark.parametrize(
    ("lam", "first", "second"),
    [
        (1.0, [-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3, 2, 1, 0, -4.9]),
        (0.7, [-0.676979, -5.248167, 2.4846, 0.6704, -0.49], [2.2899, 1.73, 1, 0, -4.9]),
        (0.4, [0.56731, -6.042, 2.3431, 0.815, -0.49], [1.725, 1.46, 1, 0, -4.9]),
    ],
)
def test_generalized_advantages_equal_rlax(lam, first, second):
    # rlax/_src/multistep_test.py, TruncatedGAETest; written to 3 to 6 digits there.
    near = functools.partial(np.testing.assert_allclose, atol=1e-3)
    near(gae([0, 0, 1, 0, -0.5], [1, 4, -3, -2, -1, -1], gamma=0.99, lam=lam)[0], first)
    near(gae([0, 0, 0, 0, 1], [-3, -2, -1, 0, 5, -1], [0, 0, 0, 1, 0], gamma=0.9, lam=lam)[0], second)


AT_TWO, NEVER = [0, 0, 1, 0], [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("lam", "terminated", "truncated", "expected"),
    [
        (1.0, NEVER, AT_TWO, [-0.271, -0.19, -0.1, 8]),
        (1.0, AT_TWO, NEVER, [-1, -1, -1, 8]),
        (0.9, NEVER, AT_TWO, [-0.24661, -0.181, -0.1, 8]),
        (0.9, AT_TWO, NEVER, [-0.8371, -0.91, -1, 8]),
        (0.9, AT_TWO, AT_TWO, [-0.8371, -0.91, -1, 8]),
        (0.9, NEVER, NEVER, [4.004918, 5.0678, 6.38, 8]),
    ],
)
def test_truncation_bootstraps_and_termination_does_not(lam, terminated, truncated, expected):
    # Stoix (stoix/tests/multistep_test.py) with λ = 1; the first two entries follow by its recursion.
    close(gae([0, 0, 0, 0], [1, 1, 1, 1, 10], terminated, truncated, gamma=0.9, lam=lam)[0], expected, rtol=2e-6)


def test_several_truncations_equal_stoix():
    rewards, values, truncated = [0, 1, 0, 0, 0, 1, 0], [0, 1, 2, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0, 0]
    expected = [1.629, 0.81, -1.1, -0.19, 0.9, 0, 0]
    close(gae(rewards, values, None, truncated, gamma=0.9, lam=1.0)[0], expected, atol=1e-6)


@pytest.mark.parametrize("lam", [1.0, 0.7, 0.4])
def test_a_truncated_step_has_its_td_error_and_others_are_untouched(lam):
    rewards = [[0, 0, 1, 0, -0.5], [0, 0, 0, 0, 1]]
    values = [[1, 4, -3, -2, -1, -1], [-3, -2, -1, 0, 5, -1]]
    cut = gae(rewards, values, None, [[0, 0, 0, 0, 0], [0, 0, 0, 1, 0]], gamma=0.9, lam=lam)
    plain = gae(rewards, values, gamma=0.9, lam=lam)
    close(cut[0], plain[0])
    close(cut[1, 4], plain[1, 4])
    close(cut[1, 3], 0 + 0.9 * 5 - 0)


def test_termination_and_truncation_in_one_batch_equal_stoix():
    rewards = [[1, 0, 0], [0, 0.5, 0], [0, 0, 2]]
    values = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0.5, 0]]
    terminated, truncated = [[0, 0, 1], [0, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    expected = [[0, -1, 0], [-0.55, -0.5, -1], [0.62, 0.8, 1.5]]
    close(gae(rewards, values, terminated, truncated, gamma=0.9, lam=1.0), expected, atol=1e-6)


def test_an_endless_reward_is_worth_that_much_across_time_limits():
    # One reward a step for ever, cut every 8 steps: with V = 1 / (1 - γ) there is nothing left to learn.
    value, steps = 1 / (1 - 0.98), jnp.arange(64)
    constant = jnp.full(64, value)
    advantages, returns = ESTIMATE(
        jnp.ones(64), constant, constant, jnp.zeros(64), steps % 8 == 7, gamma=0.98, lam=0.95
    )
    close(advantages, 0, atol=1e-4)
    close(returns, 50)


SHAPE = (6, 2)
floats = hnp.arrays(np.float32, (3, *SHAPE), elements=st.floats(-10, 10, width=32))
flags = hnp.arrays(bool, (2, *SHAPE))
lams = st.floats(0, 1, width=32)


@jax.jit
def forms(arrays, flags, lam):
    rewards, values, next_values = arrays
    terminated, truncated = flags
    estimate = functools.partial(generalized_advantages, gamma=0.9)
    return {
        "as is": estimate(rewards, values, next_values, terminated, truncated, lam=lam),
        "λ as an array": estimate(
            rewards, values, next_values, terminated, truncated, lam=jnp.broadcast_to(lam, SHAPE)
        ),
        # The other form of the same thing: the value behind a truncation is folded into the reward, then both end.
        "folded": estimate(
            rewards + 0.9 * next_values * (truncated & ~terminated),
            values,
            next_values,
            terminated | truncated,
            jnp.zeros_like(truncated),
            lam=lam,
        ),
        "all truncated": estimate(rewards, values, next_values, terminated, jnp.ones_like(truncated), lam=lam),
    }


@given(floats, flags, lams)
def test_both_forms_of_bootstrapping_agree_and_so_do_scalar_and_array_lambda(arrays, flags, lam):
    results = jax.device_get(forms(arrays, flags, lam))
    for name in ("λ as an array", "folded"):
        for ours, other in zip(results["as is"], results[name], strict=True):
            close(ours, other, atol=1e-4, err_msg=name)


@given(floats, flags)
def test_lambda_zero_gives_td_errors(arrays, flags):
    rewards, values, next_values = arrays
    td_errors = rewards + 0.9 * np.where(flags[0], 0, next_values) - values
    close(forms(arrays, flags, 0.0)["as is"][0], td_errors, atol=1e-5)
    close(forms(arrays, flags, 0.7)["all truncated"][0], td_errors, atol=1e-5)


@given(floats, flags)
def test_lambda_one_gives_returns_minus_values(arrays, flags):
    rewards, values, next_values = arrays
    next_values[:-1] = values[1:]  # Where an episode goes on, the next value is that of the next step.
    terminated, truncated = flags
    folded = rewards + 0.9 * next_values * (truncated & ~terminated)
    discounts = 0.9 * ~(terminated | truncated)
    returns = RETURNS(folded, discounts.astype(np.float32), next_values[-1])
    close(forms(arrays, flags, 1.0)["as is"][1], returns, atol=1e-4)


RETURNS = jax.jit(discounted_returns)


def test_a_mask_passes_over_steps():
    rng = np.random.default_rng(0)
    rewards, values, next_values = (rng.normal(size=(9, 3)).astype(np.float32) for _ in range(3))
    terminated, truncated = rng.random((2, 9, 3)) < 0.2
    mask = rng.random((9, 3)) < 0.6
    estimate = functools.partial(ESTIMATE, gamma=0.9, lam=0.8)
    arrays = rewards, values, next_values, terminated, truncated
    spoiled = (np.where(mask, x, True if x.dtype == bool else np.nan) for x in arrays)
    advantages, returns = jax.device_get(estimate(*spoiled, mask=mask))
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    for column in range(3):
        expected = estimate(*(x[mask[:, column], column] for x in arrays))
        close(advantages[mask[:, column], column], expected[0], rtol=1e-5, atol=1e-6)
        close(returns[mask[:, column], column], expected[1], rtol=1e-5, atol=1e-6)


def test_one_flag_for_termination_and_truncation_is_refused():
    with pytest.raises(ValueError, match=r"needs `terminated` and `truncated` as two arrays.*truncated=jnp.zeros_like"):
        generalized_advantages(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), gamma=0.9, lam=0.9)


# Groups


def test_the_advantages_of_the_guide():
    advantages = group_relative_advantages(array([8, 6, 7, 9, 7, 6, 7, 10]), 8, scale_rewards="none")
    close(advantages, [0.5, -1.5, -0.5, 1.5, -0.5, -1.5, -0.5, 2.5])


@pytest.mark.parametrize("scale", ["group", "batch", "none", "rloo"])
def test_advantages_of_groups_equal_trl(scale):
    rewards = array([1, 0, 0.5, 0, 2, 2, 2, 2, -1, 3, 0, 1])
    expected = fixture.GOLDEN["adv R=[1,0,.5,0|2,2,2,2|-1,3,0,1] G=4"][scale]
    if scale == "rloo":
        advantages = leave_one_out_advantages(rewards, 4)
    else:
        advantages = group_relative_advantages(rewards, 4, scale_rewards=scale)
    np.testing.assert_allclose(advantages, expected, rtol=fixture.RTOL)


REWARDS = array([0.57450, 0.09969, 0.74197, 0.89418, 0.59657, 0.45325])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale_rewards": "none"}, [0.10245, -0.372365, 0.269915, 0.246179, -0.051432, -0.194747]),
        ({"epsilon": 1e-6}, [0.307498, -1.117636, 0.810138, 1.094526, -0.228671, -0.865855]),
    ],
)
def test_advantages_of_groups_equal_tunix(options, expected):
    # Tunix's rewards are known to five digits.
    np.testing.assert_allclose(group_relative_advantages(REWARDS, 3, **options), expected, atol=3e-5)


def test_two_rewards_have_opposite_advantages():
    # (1 - 2) / (√2 + 1e-4), with the sample's deviation (ddof 1).
    close(group_relative_advantages(array([1, 3]), 2), [-0.7070568, 0.7070568])


@pytest.mark.parametrize(("size", "expected"), [(3, [-1.5, 0, 1.5, -1.5, 0, 1.5]), (1, np.zeros(6)), (2, [-1, 1] * 3)])
def test_leave_one_out_advantages_equal_tunix(size, expected):
    close(leave_one_out_advantages(array([1, 2, 3, 4, 5, 6]), size), expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_or_without_differences_has_no_advantage(scale):
    close(group_relative_advantages(array([3, 4]), 1, scale_rewards=scale), [0, 0])
    close(group_relative_advantages(jnp.full(6, 0.1), 3, scale_rewards=scale), 0, atol=1e-3)


rewards = hnp.arrays(np.float32, 12, elements=st.floats(-10, 10, width=32))
holes = hnp.arrays(bool, 12)


@jax.jit
def all_advantages(rewards):
    groups = {s: group_relative_advantages(rewards, 4, scale_rewards=s) for s in ("group", "batch", "none")}
    return groups | {"leave_one_out": leave_one_out_advantages(rewards, 4)}


@given(rewards, holes, st.floats(-8, 8, width=32))
def test_advantages_sum_to_zero_in_each_group_and_ignore_a_shift(rewards, holes, shift):
    rewards[holes] = np.nan
    advantages, moved = jax.device_get((all_advantages(rewards), all_advantages(rewards + shift)))
    for name in ("none", "leave_one_out"):
        close(advantages[name].reshape(-1, 4).sum(-1), 0, atol=1e-5, err_msg=name)
        close(advantages[name], moved[name], atol=1e-5, err_msg=name)


@given(rewards)
def test_scaling_divides_by_the_deviation_of_the_group_or_of_the_batch(rewards):
    advantages = jax.device_get(all_advantages(rewards))
    deviation = np.repeat(rewards.astype(np.float64).reshape(3, 4).std(-1, ddof=1), 4)
    close(advantages["group"] * (deviation + 1e-4), advantages["none"], atol=2e-5)
    close(advantages["batch"] * (rewards.astype(np.float64).std(ddof=1) + 1e-4), advantages["none"], atol=2e-5)


@given(rewards, holes)
def test_completions_without_a_reward_count_nowhere(rewards, holes):
    rewards[holes] = np.nan
    groups = rewards.astype(np.float64).reshape(-1, 4)
    count = (~np.isnan(groups)).sum(-1, keepdims=True)
    total = np.nansum(groups, -1, keepdims=True)
    centred = groups - total / np.maximum(count, 1)
    others = np.where(count > 1, groups - (total - groups) / np.maximum(count - 1, 1), 0)
    advantages = jax.device_get(all_advantages(rewards))
    close(advantages["none"], np.nan_to_num(centred).reshape(-1), atol=1e-5)
    close(advantages["leave_one_out"], np.nan_to_num(others).reshape(-1), atol=1e-5)
    assert all(np.isfinite(x).all() for x in advantages.values())


def test_advantages_over_devices_are_those_of_the_whole():
    rewards = np.random.default_rng(0).normal(size=16).astype(np.float32)
    rewards[3] = np.nan
    whole = functools.partial(group_relative_advantages, group_size=2, scale_rewards="batch")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    mapped = functools.partial(whole, axis_name="data")
    sharded = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    close(sharded(rewards), jax.jit(whole)(rewards))


@pytest.mark.parametrize("size", [0, 4])
def test_a_group_size_that_does_not_divide_the_rewards_is_refused(size):
    for advantages in (group_relative_advantages, leave_one_out_advantages):
        with pytest.raises(ValueError, match=f"must divide the number of rewards, got 6 rewards and group_size={size}"):
            advantages(REWARDS, size)


def test_an_unknown_scale_is_refused():
    with unchecked(), pytest.raises(ValueError, match=r"scale_rewards must be one of .*'group'.*, got 'row'"):
        group_relative_advantages(REWARDS, 3, scale_rewards="row")


@pytest.mark.parametrize(("rewards", "expected"), [([1.0, 3.0], 0.7070568), ([0.0, 10.0], 0.7070968)])
def test_defects_3_and_15_the_deviation_of_a_group_is_that_of_a_sample(rewards, expected):
    # EasyDeL, and TRL's asynchronous GRPO, divide by the population's: [1, 3] gives -1 and +1.
    close(group_relative_advantages(array(rewards), 2), [-expected, expected])


SEVERAL = np.array([[1, 100], [0, 300], [0.5, np.nan], [0, 200], [2, 0], [np.nan, np.nan], [2, 0], [3, 50]])


def test_several_rewards_are_summed_before_they_are_normalized():
    weights = np.array([1.0, 0.01])
    total = np.nansum(SEVERAL * weights, axis=1)
    total[5] = np.nan
    advantages = multi_objective_advantages(array(SEVERAL), 4, reward_weights=array(weights))
    close(advantages, group_relative_advantages(array(total), 4), rtol=1e-5)


def test_gdpo_normalizes_each_reward_before_they_are_summed():
    groups, weights = SEVERAL.reshape(2, 4, 2), np.array([1.0, 0.5])
    mean, std = np.nanmean(groups, 1, keepdims=True), np.nanstd(groups, 1, ddof=1, keepdims=True)
    total = np.nansum(((groups - mean) / (std + 1e-4)).reshape(8, 2) * weights, axis=1)
    total[5] = np.nan
    expected = np.nan_to_num((total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + 1e-4))
    options = {"reward_weights": array(weights), "multi_objective_aggregation": "normalize_then_sum"}
    advantages = multi_objective_advantages(array(SEVERAL), 4, **options)
    close(advantages, expected, rtol=1e-5)
    scaled = multi_objective_advantages(array(SEVERAL * [1, 1000]), 4, **options)
    close(scaled, advantages, atol=1e-3)  # But for the 1e-4 beside the deviation, no scale drowns another.


def test_an_unknown_aggregation_is_refused():
    with unchecked(), pytest.raises(ValueError, match=r"multi_objective_aggregation must be .*, got 'sum'"):
        multi_objective_advantages(array(SEVERAL), 4, multi_objective_aggregation="sum")


TOKEN_REWARDS = array([[-0.1, 0.2, 1.0, 0.0], [-0.3, 0.0, 5.0, 0.5]])
TOKENS = array([[1, 1, 1, 0], [1, 1, 0, 1]])


def test_reinforce_plus_plus_standardizes_returns_over_the_tokens_of_the_batch():
    returns = np.array([1 * 0.25 + 0.1 - 0.1, 0.2 + 0.5, 1.0, -0.3 + 0.125, 0.25, 0.5])
    counts = np.asarray(TOKENS) != 0
    advantages = reinforce_plus_plus_advantages(TOKEN_REWARDS, TOKENS, gamma=0.5)
    close(advantages[counts], (returns - returns.mean()) / returns.std(ddof=1), rtol=1e-5)
    assert not np.any(advantages[~counts])


def test_equal_rewards_have_advantages_of_exactly_zero_whatever_they_are():
    # Their mean is rounded, and an optimizer that divides by the size of the gradient makes a step of the difference.
    rewards = jnp.repeat(jnp.array([0.1, 0.3, 0.7, 1.7, 2.3, -2.2, 123.4], jnp.float32), 6).at[8].set(jnp.nan)
    for estimate in (group_relative_advantages, leave_one_out_advantages):
        np.testing.assert_array_equal(jax.jit(estimate, static_argnums=1)(rewards, 6), np.zeros(42))


def test_groups_with_equal_rewards_are_dropped_and_counted():
    # The deviation of three times 0.1 is 1.4e-17 in float64, and not 0.
    rewards = array([0.1, 0.1, 0.1, 1, 0, 1, np.nan, np.nan, np.nan, np.nan, 2, 2])
    keep, share = drop_zero_std_groups(rewards, 3)
    np.testing.assert_array_equal(keep, np.repeat([False, True, False, False], 3))
    close(share, 0.75)


def test_statistics_of_all_devices_are_those_of_the_whole():
    rng, mesh = (
        np.random.default_rng(0),
        jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]),
    )

    def estimate(rewards, tokens, mask, axis_name=None):
        gdpo = multi_objective_advantages(
            rewards, 2, multi_objective_aggregation="normalize_then_sum", axis_name=axis_name
        )
        returns = reinforce_plus_plus_advantages(tokens, mask, axis_name=axis_name)
        return gdpo, returns, drop_zero_std_groups(rewards[:, 0], 2, axis_name=axis_name)

    fields = array(rng.normal(size=(8, 2))), array(rng.normal(size=(8, 3))), array(rng.random((8, 3)) < 0.6)
    fields = fields[0].at[:2, 0].set(1.0), *fields[1:]
    mapped = functools.partial(estimate, axis_name="data")
    specs = P("data"), P("data"), type(drop_zero_std_groups(fields[0][:, 0], 2))(P("data"), P())
    sharded = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=P("data"), out_specs=specs))(*fields)
    jax.tree.map(functools.partial(close, rtol=1e-5, atol=1e-6), sharded, jax.jit(estimate)(*fields))
