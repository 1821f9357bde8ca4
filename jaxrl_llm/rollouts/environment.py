"""Rollouts in gymnax environments: one `lax.scan`, time first, with the end of an episode told exactly.

gymnax (1.0 and later) says how an episode ended: `terminated` (the state has no future) or `truncated` (a time limit
cut it), and resets at once. The observation that a step returns at the end of an episode is therefore the FIRST of the
next one; the state that the step led to is `Transition.final_observation`, and it is that one whose value bootstraps.

A policy is a function `policy(params, observation, key) -> (action, log_prob)` of a batch of observations; it is passed
in, so nothing here knows a model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jaxrl_llm.distributions import make_distribution
from jaxrl_llm.rollouts.spaces import clip_action
from jaxrl_llm.types import Key, Metrics, Params

Policy: TypeAlias = Callable[[Params, Any, Key], tuple[Array, Array]]
"""`policy(params, observation, key) -> (action, log_prob)`: a batch of observations to a batch of actions. The key is
consumed."""


class EnvironmentState(NamedTuple):
    """Where a batch of environments stands: what `rollout` starts from, and returns.

    Attributes:
        observation: What the policy sees next; a tree of arrays `[envs, …]`.
        state: gymnax's own state of each environment.
        episode_return: Undiscounted reward since the last reset.
        episode_length: Steps since the last reset.
    """

    observation: PyTree[Shaped[Array, "envs ..."]]
    state: Any
    episode_return: Float[Array, " envs"]
    episode_length: Int[Array, " envs"]


class Transition(NamedTuple):
    """Steps of a batch of environments, `[time, envs]`.

    Attributes:
        observation: What the policy saw, `[time, envs, …]`.
        action: What it did; a continuous one before it was brought into range.
        log_prob: Log-probability of that action when it was taken, nats.
        reward: Reward of the step.
        terminated: The step led to a state without a future. May be set together with `truncated`, and then wins.
        truncated: The step reached the time limit.
        final_observation: What the step led to, BEFORE the automatic reset, `[time, envs, …]`. Where no episode ends,
            it is the next row of `observation`.
        episode_return: Sum of the rewards of the episode up to this step; its return where the episode ends here.
        episode_length: Steps of the episode up to this one; its length where the episode ends here.
    """

    observation: PyTree[Shaped[Array, "time envs ..."]]
    action: Shaped[Array, "time envs ..."]
    log_prob: Float[Array, "time envs"]
    reward: Float[Array, "time envs"]
    terminated: Bool[Array, "time envs"]
    truncated: Bool[Array, "time envs"]
    final_observation: PyTree[Shaped[Array, "time envs ..."]]
    episode_return: Float[Array, "time envs"]
    episode_length: Int[Array, "time envs"]


def stochastic_policy(apply: Callable[..., tuple[Any, Any]]) -> Policy:
    """Makes the policy that samples from the distribution of a model.

    Args:
        apply: `apply(params, observation) -> (logits or (mean, log_std), anything)`. What the policy does not use of a
            model costs nothing once compiled.
    """

    def policy(params: Params, observation: Any, key: Key) -> tuple[Array, Array]:
        distribution = make_distribution(apply(params, observation)[0])
        action = distribution.sample(key)
        return action, distribution.log_prob(action)

    return policy


def greedy_policy(apply: Callable[..., tuple[Any, Any]]) -> Policy:
    """Makes the policy that takes a model's most likely action, with log-probability 0; see `stochastic_policy`."""

    def policy(params: Params, observation: Any, key: Key) -> tuple[Array, Array]:
        del key
        output, _ = apply(params, observation)
        action = make_distribution(output).mode()
        return action, jnp.zeros(jax.tree.leaves(output)[0].shape[:-1])

    return policy


def random_policy(env: Any, env_params: Any) -> Policy:
    """Makes the policy that takes any action alike, with log-probability 0; its parameters are not used."""

    def policy(params: Params, observation: Any, key: Key) -> tuple[Array, Array]:
        del params
        num_envs = jax.tree.leaves(observation)[0].shape[0]
        action = jax.vmap(env.action_space(env_params).sample)(jax.random.split(key, num_envs))
        return action, jnp.zeros(num_envs)

    return policy


def reset(key: Key, env: Any, env_params: Any, num_envs: int) -> EnvironmentState:
    """Starts `num_envs` episodes.

    Args:
        key: Consumed.
        env: A gymnax environment.
        env_params: Its parameters, shared by all.
        num_envs: How many run side by side.
    """
    observation, state = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, num_envs), env_params)
    zeros = jnp.zeros(num_envs)
    return _strongly_typed(EnvironmentState(observation, state, zeros, zeros.astype(jnp.int32)))


def _strongly_typed(tree: Any) -> Any:
    """Makes weak types strong (gymnax's counters are weak), so that a restored state compiles to the same program."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)


def rollout(
    policy: Policy,
    params: Params,
    key: Key,
    env: Any,
    env_params: Any,
    start: EnvironmentState,
    num_steps: int,
) -> tuple[EnvironmentState, Transition]:
    """Lets a policy act for `num_steps` steps in each of the environments of `start`.

    Episodes that end are reset at once, and go on; `end` can be passed as the next `start`.

    Args:
        policy: See `Policy`.
        params: Its parameters.
        key: Consumed.
        env: A gymnax environment.
        env_params: Its parameters.
        start: From `reset`, or the end of the rollout before.
        num_steps: Steps in each environment.

    Returns:
        Where the environments stand now, and what happened, `[time, envs]`.
    """
    num_envs = start.episode_return.shape[0]
    action_key, environment_key = jax.random.split(key)
    # All keys are split at once, which is faster, and enter the loop as plain numbers: jax's check for reused keys takes
    # the keys of a scan under vmap for used ones.
    keys = jax.random.split(action_key, num_steps), jax.random.split(environment_key, (num_steps, num_envs))

    def wrap(data: Array) -> Key:
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))

    def step(now: EnvironmentState, key_data: tuple[Array, Array]) -> tuple[EnvironmentState, Transition]:
        action, log_prob = policy(params, now.observation, wrap(key_data[0]))
        return _step(wrap(key_data[1]), env, env_params, now, action, log_prob)

    return jax.lax.scan(step, start, jax.tree.map(jax.random.key_data, keys))


def _step(
    keys: Key, env: Any, env_params: Any, now: EnvironmentState, action: Array, log_prob: Array
) -> tuple[EnvironmentState, Transition]:
    """Steps every environment once, and keeps count of its episode."""
    observation, state, reward, terminated, truncated, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
        keys, now.state, clip_action(env, env_params, action), env_params
    )
    reward = reward.astype(jnp.float32)  # some environments pay whole numbers
    episode_return, episode_length = now.episode_return + reward, now.episode_length + 1
    done = terminated | truncated
    transition = Transition(
        observation=now.observation,
        action=action,
        log_prob=log_prob,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        final_observation=info["final_observation"],
        episode_return=episode_return,
        episode_length=episode_length,
    )
    end = EnvironmentState(observation, state, jnp.where(done, 0, episode_return), jnp.where(done, 0, episode_length))
    return _strongly_typed((end, transition))


def episode_metrics(transitions: Transition) -> Metrics:
    """Computes statistics of the episodes that ENDED in these steps.

    Returns:
        `episode/count`, and `episode/return_mean` and `episode/length_mean` over these episodes: NaN where none ended,
        as a zero would pass for a bad return. `mean_over_episodes` joins several such means.
    """
    done = transitions.terminated | transitions.truncated
    count = done.sum()
    return {
        "episode/count": count,
        "episode/return_mean": jnp.where(done, transitions.episode_return, 0).sum() / count,
        "episode/length_mean": jnp.where(done, transitions.episode_length, 0).sum() / count,
    }


def mean_over_episodes(
    means: Float[Array, "*batch updates"], counts: Int[Array, "*batch updates"]
) -> Float[Array, "*batch"]:
    """Joins means over episodes into the mean over all of them, along the last axis; NaN where there was none."""
    return jnp.where(counts > 0, means * counts, 0).sum(-1) / counts.sum(-1)


def play_episodes(
    policy: Policy, params: Params, key: Key, env: Any, env_params: Any, start: EnvironmentState
) -> tuple[Transition, Bool[Array, "time envs"]]:
    """Plays one whole episode in each environment of `start`.

    Args:
        policy: See `Policy`.
        params: Its parameters.
        key: Consumed.
        env: A gymnax environment.
        env_params: Its parameters; `max_steps_in_episode` is how many steps are computed.
        start: From `reset`. The same state may stand there several times: a group of episodes from one start.

    Returns:
        What happened, and the steps that belong to the episode: those after its end do not.
    """
    _, transitions = rollout(policy, params, key, env, env_params, start, int(env_params.max_steps_in_episode))
    ended = (transitions.terminated | transitions.truncated).astype(jnp.int32)
    return transitions, jnp.cumsum(ended, axis=0) - ended == 0


def evaluate(
    policy: Policy, params: Params, key: Key, env: Any, env_params: Any, num_episodes: int
) -> tuple[Float[Array, " episodes"], Int[Array, " episodes"]]:
    """Plays whole episodes side by side, from fresh starts.

    Args:
        policy: See `Policy`.
        params: Its parameters.
        key: Consumed. Use another one than training did.
        env: A gymnax environment.
        env_params: Its parameters; `max_steps_in_episode` is how long it takes.
        num_episodes: How many.

    Returns:
        Undiscounted return and length of each episode.
    """
    reset_key, rollout_key = jax.random.split(key)
    start = reset(reset_key, env, env_params, num_episodes)
    transitions, mask = play_episodes(policy, params, rollout_key, env, env_params, start)
    return jnp.where(mask, transitions.reward, 0).sum(0), mask.sum(0)
