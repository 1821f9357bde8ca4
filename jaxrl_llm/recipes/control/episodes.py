"""What REINFORCE and GRPO share: whole episodes from fresh starts, as completions of prompts are for language models."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxrl_llm.recipes.control.algorithm import (
    Algorithm,
    RunnerState,
    actor_critic_agent,
    actor_critic_policies,
    count_update,
)
from jaxrl_llm.recipes.control.normalization import Normalizers, update_moments
from jaxrl_llm.recipes.control.options import (
    SHARE,
    EpisodeOptions,
    FirstOrderOptions,
    Hyperparameter,
    require_hyperparameters,
)
from jaxrl_llm.rollouts.environment import play_episodes, reset, stochastic_policy
from jaxrl_llm.training import init_train_state
from jaxrl_llm.types import Key, Metrics, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeEpisodeOptions(EpisodeOptions, FirstOrderOptions):
    """How whole episodes are weighed."""

    gamma: Hyperparameter = 0.99
    """Discount, in [0, 1]."""

    def validate_whole_episodes(self) -> None:
        """Checks the values, those of `EpisodeOptions` and `FirstOrderOptions` too."""
        self.validate_episodes()
        self.validate_optimizer()
        require_hyperparameters(self, {"gamma": SHARE})


class Episodes(NamedTuple):
    """Whole episodes, `[envs, time]`: a row for each, as for completions of prompts.

    Attributes:
        features: What the networks read of the observations, `[envs, time, features]`.
        final_features: The same of the state that each step led to.
        action: What was done.
        log_prob: Log-probability of the action when it was taken, nats.
        reward: Of each step; 0 after the end.
        mask: Steps that belong to the episode.
        truncated: The step at which the time limit cut it.
    """

    features: Float[Array, "envs time features"]
    final_features: Float[Array, "envs time features"]
    action: Shaped[Array, "envs time ..."]
    log_prob: Float[Array, "envs time"]
    reward: Float[Array, "envs time"]
    mask: Bool[Array, "envs time"]
    truncated: Bool[Array, "envs time"]


def play(state: RunnerState, config: WholeEpisodeOptions, key: Key, group_size: int) -> tuple[Episodes, Normalizers]:
    """Plays `num_envs` episodes, `group_size` of them, which are contiguous, from the same start.

    Args:
        state: Of the run.
        config: Settings.
        key: Consumed.
        group_size: Episodes of a group.

    Returns:
        The episodes, and the normalizers for the next ones.
    """
    env, env_params = config.environment()
    reset_key, action_key = jax.random.split(key)
    starts = reset(reset_key, env, env_params, config.num_envs // group_size)
    starts = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), starts)
    agent, policy = actor_critic_agent(state), stochastic_policy(config.apply())
    steps, mask = play_episodes(policy, agent, action_key, env, env_params, starts)
    by_time = Episodes(
        features=config.features(steps.observation, agent.observations),
        final_features=config.features(steps.final_observation, agent.observations),
        action=steps.action,
        log_prob=steps.log_prob,
        reward=jnp.where(mask, steps.reward, 0),
        mask=mask,
        truncated=steps.truncated & ~steps.terminated & mask,
    )
    moments = agent.observations
    if moments is not None:
        moments = update_moments(moments, config.features(steps.observation), mask)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), by_time), Normalizers(moments)


def make_algorithm(
    name: str, validate: Callable[[Any], None], learn: Any, group_size: Any, *, show: dict[str, list[str]]
) -> Algorithm:
    """Makes an algorithm that learns from whole episodes.

    Args:
        name: As the command line has it.
        validate: `validate(config)` raises a `ValueError` that names a wrong setting.
        learn: `learn(train, episodes, config, key, remaining) -> (train, metrics)`; `remaining` is the share of the run that
            is left.
        group_size: `group_size(config)`: episodes from the same start.
        show: More panels of the learning curve.
    """

    def init(key: Key, config: Any) -> RunnerState:
        return RunnerState(
            train=init_train_state(config.init_params(key), config.optimizer()),
            environments=None,
            normalizers=Normalizers(config.init_moments()),
            update=jnp.zeros((), jnp.int32),
            timesteps=jnp.zeros((), jnp.int32),
        )

    def update(state: RunnerState, config: Any, key: Key) -> tuple[RunnerState, Metrics]:
        play_key, learn_key = jax.random.split(key)
        episodes, normalizers = play(state, config, play_key, group_size(config))
        remaining: Scalar = 1 - state.update / config.num_updates
        train, metrics = learn(state.train, episodes, config, learn_key, remaining)
        steps = episodes.mask.sum()
        of_episodes = {
            "episode/count": jnp.array(config.num_envs),
            "episode/return_mean": episodes.reward.sum(1).mean(),
            "episode/length_mean": steps / config.num_envs,
            "optimizer/learning_rate": jnp.asarray(config.rate(remaining)),
        }
        new = RunnerState(train, None, normalizers, state.update, state.timesteps)
        return count_update(new, steps), metrics | of_episodes

    return Algorithm(name, validate, init, update, actor_critic_agent, actor_critic_policies, show)
