"""Returns and advantages: how much better an action was than expected. All pure statistics, none is differentiated.

Environment arrays are time first, `[time, …]`. Rewards of completions are `[rows]`, the completions of one prompt
contiguous, so that `reshape(-1, group_size)` gives the groups.
"""

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jaxrl_llm.reductions import masked_standardize, sum_over_axis
from jaxrl_llm.types import Mask, Numeric, Scalar

ScaleRewards: TypeAlias = Literal["group", "batch", "none"]
MultiObjectiveAggregation: TypeAlias = Literal["sum_then_normalize", "normalize_then_sum"]


def discounted_returns(
    rewards: Float[Array, "time *batch"],
    discounts: Numeric | Float[Array, "time *batch"],
    bootstrap_value: Numeric | Float[Array, "*batch"],
) -> Float[Array, "time *batch"]:
    r"""Computes $G_t = r_t + d_t G_{t+1}$ backwards from $G_T$ = `bootstrap_value`.

    Args:
        rewards: Reward of each step.
        discounts: $\gamma (1 - (\text{terminated} | \text{truncated}))$ for each step, or one number for all. At a
            truncation, add γ·V(final observation) to the reward first: the episode went on, it was only cut.
        bootstrap_value: Value of the state after the last step.

    Example:
        >>> discounted_returns(jnp.array([10.0, 5.0, 3.0, 1.0]), 0.9, 0.0).round(3).tolist()[0]
        17.659000396728516
    """
    discounts = jnp.broadcast_to(jnp.asarray(discounts, rewards.dtype), rewards.shape)
    bootstrap = jnp.broadcast_to(jnp.asarray(bootstrap_value, rewards.dtype), rewards.shape[1:])

    def backward(return_tp1: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward_t, discount_t = step
        return_t = reward_t + discount_t * return_tp1
        return return_t, return_t

    return jax.lax.scan(backward, bootstrap, (rewards, discounts), reverse=True, unroll=8)[1]


def generalized_advantages(
    rewards: Float[Array, "time *batch"],
    values: Float[Array, "time *batch"],
    next_values: Float[Array, "time *batch"],
    terminated: Bool[Array, "time *batch"] | Num[Array, "time *batch"],
    truncated: Bool[Array, "time *batch"] | Num[Array, "time *batch"] | None = None,
    *,
    gamma: Numeric,
    lam: Numeric | Float[Array, "time *batch"],
    mask: Mask | None = None,
) -> tuple[Float[Array, "time *batch"], Float[Array, "time *batch"]]:
    r"""Computes generalized advantage estimates (GAE) that bootstrap through truncation.

    $$ \delta_t = r_t + \gamma (1 - \text{terminated}_t) V(s'_{t+1}) - V(s_t), \qquad
       A_t = \delta_t + \gamma\lambda (1 - (\text{terminated}_t | \text{truncated}_t)) A_{t+1} $$

    Args:
        rewards: Reward of each step.
        values: $V(s_t)$.
        next_values: $V(s'_{t+1})$ of the observation that the step led to, BEFORE any automatic reset (gymnax:
            `info["final_observation"]`). At the end of a segment that is no end of an episode it is the bootstrap.
        terminated: The state has no future: its value is 0. Wins where both flags are set.
        truncated: The episode was cut by a time limit: its future is worth `next_values`.
        gamma: Discount, in [0, 1].
        lam: λ in [0, 1]: 0 gives one-step TD errors, 1 Monte-Carlo returns minus the value.
        mask: Nonzero where a step counts. The recursion passes over the others (`next_values` of a step must be the
            value at the next step that counts), which get advantage and return 0.

    Returns:
        Advantages, and returns (advantage + value): the targets of the value loss.

    Raises:
        ValueError: If `truncated` is missing: one `done` flag would value the future of a truncated episode at 0.

    References:
        Schulman et al., 2016, eq. 16. https://arxiv.org/abs/1506.02438; Pardo et al., 2018. https://arxiv.org/abs/1712.00378
    """
    if truncated is None:
        raise ValueError(
            "generalized_advantages needs `terminated` and `truncated` as two arrays, got one. A single `done` would "
            "count the future after a time limit as worth nothing. Pass truncated=jnp.zeros_like(terminated) only if "
            "no episode is ever cut."
        )
    terminated, truncated = jnp.asarray(terminated) != 0, jnp.asarray(truncated) != 0
    counts = jnp.ones_like(terminated) if mask is None else jnp.asarray(mask) != 0
    deltas = rewards + gamma * jnp.where(terminated, 0, next_values) - values
    decays = jnp.where(terminated | truncated, 0, gamma * lam)

    def backward(advantage_tp1: Array, step: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        delta_t, decay_t, counts_t = step
        advantage_t = delta_t + decay_t * advantage_tp1
        return jnp.where(counts_t, advantage_t, advantage_tp1), jnp.where(counts_t, advantage_t, 0)

    start = jnp.zeros_like(deltas[0])
    advantages = jax.lax.scan(backward, start, (deltas, decays, counts), reverse=True, unroll=8)[1]
    return advantages, jnp.where(counts, advantages + values, 0)


def _groups(rewards: Array, group_size: int) -> tuple[Array, Array, Array]:
    """Splits into groups: rewards with NaN (no reward applies) as 0, which are valid, and how many of each group."""
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_size must divide the number of rewards, got {rewards.shape[0]} rewards and "
            f"group_size={group_size}. Completions of one prompt are contiguous: rewards has num_prompts × "
            "num_generations entries."
        )
    groups = rewards.reshape(-1, group_size)
    valid = ~jnp.isnan(groups)
    return jnp.where(valid, groups, 0), valid, valid.sum(-1, keepdims=True)


def group_relative_advantages(
    rewards: Float[Array, " rows"],
    group_size: int,
    *,
    scale_rewards: ScaleRewards = "group",
    epsilon: Numeric = 1e-4,
    axis_name: str | None = None,
) -> Float[Array, " rows"]:
    r"""Computes GRPO's advantages: rewards minus the mean of their group, divided by a standard deviation.

    $$ A_i = (r_i - \mathrm{mean}(r_{group})) / (\mathrm{std} + \epsilon) $$

    Args:
        rewards: Total reward of each completion; NaN where no reward function applied: such a row gets advantage 0
            and does not count in its group.
        group_size: Completions for each prompt (`num_generations`). A group of one has advantage 0.
        scale_rewards: Whose standard deviation (ddof 1) divides: of the `group`, of the whole `batch`, or `none`
            (Dr. GRPO).
        epsilon: Added to the standard deviation.
        axis_name: Mapped axis over whose devices the batch's deviation is taken; groups lie within one device.

    Raises:
        ValueError: If `group_size` does not divide the number of rewards, or `scale_rewards` is unknown.

    Example:
        >>> group_relative_advantages(jnp.array([8.0, 6, 7, 9, 7, 6, 7, 10]), 8, scale_rewards="none").tolist()
        [0.5, -1.5, -0.5, 1.5, -0.5, -1.5, -0.5, 2.5]

    References:
        Shao et al., 2024, section 4.1. https://arxiv.org/abs/2402.03300; Liu et al., 2025 (Dr. GRPO).
        https://arxiv.org/abs/2503.20783
    """
    groups, valid, count = _groups(rewards, group_size)
    above = _above_lowest(groups, valid)
    centred = jnp.where(valid, above - above.sum(-1, keepdims=True) / jnp.maximum(count, 1), 0)
    if scale_rewards == "group":
        scale = _std((centred**2).sum(-1, keepdims=True), count) + epsilon
    elif scale_rewards == "batch":
        total, sum_valid = sum_over_axis((groups.sum(), valid.sum()), axis_name)
        squares = jnp.where(valid, groups - total / jnp.maximum(sum_valid, 1), 0) ** 2
        scale = _std(sum_over_axis(squares.sum(), axis_name), sum_valid) + epsilon
    elif scale_rewards == "none":
        scale = 1
    else:
        raise ValueError(f"scale_rewards must be one of {get_args(ScaleRewards)}, got {scale_rewards!r}.")
    return (centred / scale).reshape(-1)


def _above_lowest(groups: Array, valid: Array) -> Array:
    """Subtracts the lowest of each group, so that equal rewards are exactly 0 from their mean, which may be rounded.

    Adam and the natural gradient would make a whole step of a rounding error.
    """
    lowest = jnp.min(jnp.where(valid, groups, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(valid, groups - lowest, 0)


def _std(sum_of_squares: Array, count: Array) -> Array:
    return jnp.sqrt(sum_of_squares / jnp.maximum(count - 1, 1))


def leave_one_out_advantages(rewards: Float[Array, " rows"], group_size: int) -> Float[Array, " rows"]:
    r"""Computes RLOO's advantages: each reward minus the mean of the OTHER rewards of its group.

    Args:
        rewards: Total reward of each completion; NaN counts as in `group_relative_advantages`.
        group_size: Completions for each prompt. A group of one has advantage 0.

    Raises:
        ValueError: If `group_size` does not divide the number of rewards.

    References:
        Ahmadian et al., 2024, eq. 5. https://arxiv.org/abs/2402.14740
    """
    groups, valid, count = _groups(rewards, group_size)
    above = _above_lowest(groups, valid)
    others = (above.sum(-1, keepdims=True) - above) / jnp.maximum(count - 1, 1)
    return jnp.where(valid & (count > 1), above - others, 0).reshape(-1)


def multi_objective_advantages(
    rewards: Float[Array, "rows functions"],
    group_size: int,
    *,
    reward_weights: Float[Array, " functions"] | None = None,
    multi_objective_aggregation: MultiObjectiveAggregation = "sum_then_normalize",
    scale_rewards: ScaleRewards = "group",
    epsilon: Numeric = 1e-4,
    axis_name: str | None = None,
) -> Float[Array, " rows"]:
    r"""Computes group-relative advantages from several rewards.

    `sum_then_normalize`: those of the weighted sum. `normalize_then_sum` (GDPO): each reward is standardised in its
    group, so that none drowns the others, then $A = (s - \bar s) / (\mathrm{std}(s) + \epsilon)$ of the weighted sums
    $s$, over the batch.

    Args:
        rewards: Of each completion by each function, before weighting; NaN where a function does not apply. A row
            without any has advantage 0.
        group_size: Completions for each prompt (`num_generations`).
        reward_weights: One for each function; all 1 if not given.
        multi_objective_aggregation: Which of the two.
        scale_rewards: As in `group_relative_advantages`, for `sum_then_normalize`; the other has its own scale.
        epsilon: Added to the standard deviations (ddof 1).
        axis_name: Mapped axis over whose devices the batch's statistics are taken; groups lie within one device.

    Raises:
        ValueError: If a name is unknown, or `group_size` does not divide the number of rows.

    References:
        Liu et al., 2026 (GDPO). https://arxiv.org/abs/2601.05242
    """
    if multi_objective_aggregation not in get_args(MultiObjectiveAggregation):
        names = get_args(MultiObjectiveAggregation)
        raise ValueError(f"multi_objective_aggregation must be one of {names}, got {multi_objective_aggregation!r}.")
    weights = jnp.ones(rewards.shape[1], rewards.dtype) if reward_weights is None else reward_weights
    applies = ~jnp.isnan(rewards)
    valid = applies.any(-1)
    if multi_objective_aggregation == "sum_then_normalize":
        total = jnp.where(valid, jnp.where(applies, rewards, 0) @ weights, jnp.nan)
        options = {"scale_rewards": scale_rewards, "epsilon": epsilon, "axis_name": axis_name}
        return group_relative_advantages(total, group_size, **options)
    normalized = [group_relative_advantages(column, group_size, epsilon=epsilon) for column in rewards.T]
    total = jnp.stack(normalized, axis=-1) @ weights
    sums, count = sum_over_axis((jnp.where(valid, total, 0).sum(), valid.sum()), axis_name)
    centred = jnp.where(valid, total - sums / jnp.maximum(count, 1), 0)
    return centred / (_std(sum_over_axis((centred**2).sum(), axis_name), count) + epsilon)


def token_returns(
    rewards: Float[Array, "batch time"], mask: Mask, *, gamma: Numeric = 1.0
) -> Float[Array, "batch time"]:
    r"""Computes the return of each token, $G_t = r_t + \gamma G_{t+1}$, over the tokens that count.

    Args:
        rewards: Of each token (`rewards.token_rewards`).
        mask: Nonzero at completion tokens; 0 elsewhere in the result.
        gamma: Discount for each token that counts, in [0, 1].
    """
    mask = jnp.asarray(mask) != 0
    discounts = jnp.where(mask, gamma, 1).astype(rewards.dtype)
    returns = discounted_returns(jnp.where(mask, rewards, 0).T, discounts.T, jnp.zeros_like(rewards[:, 0])).T
    return jnp.where(mask, returns, 0)


def reinforce_plus_plus_advantages(
    rewards: Float[Array, "batch time"],
    mask: Mask,
    *,
    gamma: Numeric = 1.0,
    epsilon: Numeric = 1e-8,
    axis_name: str | None = None,
) -> Float[Array, "batch time"]:
    r"""Computes REINFORCE++ advantages: the return of each token, standardised over all tokens of the batch.

    $$ G_t = r_t + \gamma G_{t+1}, \qquad A_t = (G_t - \bar G) / \sqrt{s^2 + \epsilon} $$

    There are no groups and no critic; the batch is the baseline.

    Args:
        rewards: Of each token: the score at the end, and the KL penalty of each token (`rewards.token_rewards`).
        mask: Nonzero at completion tokens.
        gamma: Discount for each token that counts, in [0, 1].
        epsilon: Added to the variance (ddof 1).
        axis_name: Mapped axis over whose devices the statistics are taken.

    References:
        Hu et al., 2025, eq. 9 and 10. https://arxiv.org/abs/2501.03262
    """
    return masked_standardize(token_returns(rewards, mask, gamma=gamma), mask, epsilon=epsilon, axis_name=axis_name)


class GroupSelection(NamedTuple):
    """Which rows belong to groups that teach something.

    Attributes:
        keep: False for the rows of a group whose rewards are all equal.
        frac_reward_zero_std: Share of such groups, the metric of that name.
    """

    keep: Bool[Array, " rows"]
    frac_reward_zero_std: Scalar


def drop_zero_std_groups(
    rewards: Float[Array, " rows"], group_size: int, *, axis_name: str | None = None
) -> GroupSelection:
    """Finds the groups whose rewards are all equal: their advantages are 0, but their tokens count in the averages.

    Put `mask & keep[:, None]` in the place of the mask, before weights are made, to average over the others alone
    (`sequence_mean` still divides by all rows). DAPO samples others in their place.

    Args:
        rewards: Total reward of each completion; NaN where no reward function applied.
        group_size: Completions for each prompt.
        axis_name: Mapped axis over whose devices the groups are counted.

    Raises:
        ValueError: If `group_size` does not divide the number of rewards.

    Example:
        >>> drop_zero_std_groups(jnp.array([1.0, 0.0, 0.1, 0.1]), 2).keep.tolist()
        [True, True, False, False]

    References:
        Yu et al., 2025, eq. 11 (dynamic sampling). https://arxiv.org/abs/2503.14476
    """
    groups, valid, _ = _groups(rewards, group_size)
    # By comparison: the deviation of equal rewards may be a rounding error instead of 0.
    lowest, highest = (jnp.where(valid, groups, end * jnp.inf) for end in (1, -1))
    differ = lowest.min(-1) < highest.max(-1)
    equal, count = sum_over_axis(((~differ).sum(), jnp.asarray(differ.size)), axis_name)
    return GroupSelection(jnp.repeat(differ, group_size), equal / count)
