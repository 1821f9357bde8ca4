"""What PPO, A2C and TRPO share: steps of several environments, their advantages, and an update from both.

An algorithm brings `learn`; the rest of an update is here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxrl_llm.advantages import generalized_advantages
from jaxrl_llm.recipes.control.algorithm import (
    Algorithm,
    RunnerState,
    actor_critic_agent,
    actor_critic_policies,
    count_update,
)
from jaxrl_llm.recipes.control.normalization import (
    Normalizers,
    RewardScale,
    init_moments,
    scale_rewards,
    update_moments,
)
from jaxrl_llm.recipes.control.options import (
    SHARE,
    ActorCriticOptions,
    Agent,
    Hyperparameter,
    StepOptions,
    require_hyperparameters,
)
from jaxrl_llm.recipes.options import require
from jaxrl_llm.rollouts.environment import Transition, episode_metrics, reset, rollout, stochastic_policy
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicyOptions(StepOptions, ActorCriticOptions):
    """How steps become advantages."""

    gamma: Hyperparameter = 0.99
    """Discount, in [0, 1]."""
    gae_lambda: Hyperparameter = 0.95
    """λ of the advantage estimates, in [0, 1]: 0 trusts the value function, 1 the observed returns."""
    normalize_rewards: bool = False
    """Divide rewards by the standard deviation of discounted returns, within ±10, by the statistics of all rollouts before.
    The reported returns are those of the environment."""

    def validate_on_policy(self, *, standardized: bool) -> None:
        """Checks the values, those of `StepOptions` too; whether the advantages of an update are standardised at once."""
        self.validate_steps()
        meant = "at least 2 with num_envs=1, for normalize_advantage compares steps"
        require("num_steps", self.num_steps, meant, lambda n: not standardized or n * self.num_envs > 1)
        require_hyperparameters(self, {"gamma": SHARE, "gae_lambda": SHARE})


class Batch(NamedTuple):
    """What an update learns from: steps in any order.

    Attributes:
        features: What the networks read of the observation.
        action: What was done.
        log_prob: Log-probability of the action when it was taken, nats.
        value: Prediction of the critic at that time.
        advantage: How much better than that the action turned out.
        returns: Target of the critic.
    """

    features: Float[Array, "batch features"]
    action: Shaped[Array, "batch ..."]
    log_prob: Float[Array, " batch"]
    value: Float[Array, " batch"]
    advantage: Float[Array, " batch"]
    returns: Float[Array, " batch"]


Learn = Callable[[Any, Batch, Any, Key, Scalar], tuple[Any, Metrics]]
"""`learn(train, batch, config, key, remaining) -> (train, metrics)`; `remaining` is the share of the run that is left."""


def init_runner(key: Key, config: OnPolicyOptions, make_train: Callable[[Params], Any]) -> RunnerState:
    """Makes the state before the first update.

    Args:
        key: Consumed.
        config: Settings.
        make_train: Makes what is learned from the first parameters of the networks.
    """
    params_key, reset_key = jax.random.split(key)
    scale = RewardScale(jnp.zeros(config.num_envs), init_moments(1)) if config.normalize_rewards else None
    return RunnerState(
        train=make_train(config.init_params(params_key)),
        environments=reset(reset_key, *config.environment(), config.num_envs),
        normalizers=Normalizers(config.init_moments(), scale),
        update=jnp.zeros((), jnp.int32),
        timesteps=jnp.zeros((), jnp.int32),
    )


def make_batch(
    agent: Agent, transitions: Transition, rewards: Float[Array, "time envs"], config: OnPolicyOptions
) -> Batch:
    """Estimates advantages and returns of a rollout, and drops the order of its steps.

    The value of the state that a step led to is that of its `final_observation`: right inside an episode, at a time
    limit and at the end of the rollout; where the episode terminated it is not used.

    Args:
        agent: What acted.
        transitions: What happened, `[time, envs]`.
        rewards: Those to learn from.
        config: Settings.
    """
    features = config.features(transitions.observation, agent.observations)
    _, value = config.forward(agent.params, features)
    _, next_value = config.apply()(agent, transitions.final_observation)
    advantage, returns = generalized_advantages(
        rewards,
        value,
        next_value,
        transitions.terminated,
        transitions.truncated,
        gamma=config.gamma,
        lam=config.gae_lambda,
    )
    batch = Batch(features, transitions.action, transitions.log_prob, value, advantage, returns)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def update_normalizers(
    normalizers: Normalizers, transitions: Transition, config: OnPolicyOptions
) -> tuple[Float[Array, "time envs"], Normalizers]:
    """Gives the rewards to learn from, and the statistics for the next rollout."""
    rewards, (observations, scale) = transitions.reward, normalizers
    if observations is not None:
        observations = update_moments(observations, config.features(transitions.observation))
    if scale is not None:
        rewards, scale = scale_rewards(
            scale, rewards, transitions.terminated | transitions.truncated, gamma=config.gamma
        )
    return rewards, Normalizers(observations, scale)


def make_algorithm(
    name: str,
    validate: Callable[[Any], None],
    learn: Learn,
    make_train: Callable[[Params, Any], Any],
    *,
    show: dict[str, list[str]],
) -> Algorithm:
    """Makes an algorithm that learns from each rollout once.

    Args:
        name: As the command line has it.
        validate: `validate(config)` raises a `ValueError` that names a wrong setting.
        learn: What it learns from a batch.
        make_train: `make_train(params, config)`: what is learned, before the first update.
        show: More panels of the learning curve.
    """

    def init(key: Key, config: Any) -> RunnerState:
        return init_runner(key, config, lambda params: make_train(params, config))

    def update(state: RunnerState, config: Any, key: Key) -> tuple[RunnerState, Metrics]:
        env, env_params = config.environment()
        rollout_key, learn_key = jax.random.split(key)
        acting, policy = actor_critic_agent(state), stochastic_policy(config.apply())
        assert state.environments is not None
        environments, transitions = rollout(
            policy, acting, rollout_key, env, env_params, state.environments, config.num_steps
        )
        rewards, normalizers = update_normalizers(state.normalizers, transitions, config)
        batch = make_batch(acting, transitions, rewards, config)
        train, metrics = learn(state.train, batch, config, learn_key, 1 - state.update / config.num_updates)
        new = RunnerState(train, environments, normalizers, state.update, state.timesteps)
        return count_update(new, config.steps_per_update), metrics | episode_metrics(transitions)

    return Algorithm(name, validate, init, update, actor_critic_agent, actor_critic_policies, show)
