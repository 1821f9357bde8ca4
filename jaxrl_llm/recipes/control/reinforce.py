r"""REINFORCE on a gymnax environment: whole episodes, rewards to go, and a baseline.

    jaxrl-llm control reinforce --env CartPole-v1 --baseline value

The gradient is the mean over steps of $(G_t - b_t) \nabla \log\pi(a_t|s_t)$ with $G_t = \sum_{k \ge t} \gamma^{k-t} r_k$. The
baseline $b_t$ is a value network, or nothing; either way the result is standardised over the steps of the update by default.
With a value network, an episode that the time limit cuts goes on with the value of its last state. Without one its returns are
those observed, although more would have come.

References:
    Williams, 1992; Sutton and Barto, 2018, sections 13.3 and 13.4.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.advantages import token_returns
from jaxrl_llm.distributions import make_distribution
from jaxrl_llm.losses import policy_gradient_loss, value_loss
from jaxrl_llm.recipes.control import algorithm, runner
from jaxrl_llm.recipes.control.algorithm import Curves, RunnerState
from jaxrl_llm.recipes.control.episodes import Episodes, WholeEpisodeOptions, make_algorithm
from jaxrl_llm.recipes.control.options import NOT_NEGATIVE, Hyperparameter, require_hyperparameters, traceable
from jaxrl_llm.recipes.options import require
from jaxrl_llm.reductions import masked_standardize
from jaxrl_llm.training import TrainState, make_train_step
from jaxrl_llm.types import Key, Metrics, Numeric, Params, Scalar


@traceable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(WholeEpisodeOptions):
    """Settings of REINFORCE. A `Hyperparameter` may be traced; the others shape the program."""

    output_dir: str = "runs/control_reinforce"
    """Folder for metrics, checkpoints and the learning curve."""
    learning_rate: Hyperparameter = 1e-2
    """Step size."""
    baseline: Literal["value", "none"] = "value"
    """What is subtracted from the return of a step: the value network's prediction, or nothing."""
    normalize_advantage: bool = True
    """Standardise over the steps of an update; without a value network that makes their mean return the baseline."""
    ent_coef: Hyperparameter = 0.0
    """Weight of the entropy bonus."""
    vf_coef: Hyperparameter = 0.5
    """Weight of the value loss, one half of the mean squared error."""


class Batch(NamedTuple):
    """What an update learns from.

    Attributes:
        episodes: What was played.
        returns: Discounted reward to go.
        advantage: What the log-probabilities are weighed by.
    """

    episodes: Episodes
    returns: Float[Array, "envs time"]
    advantage: Float[Array, "envs time"]


def validate(config: Config) -> None:
    """Checks the values of the settings, which must be plain numbers here.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_whole_episodes()
    require_hyperparameters(config, {"ent_coef": NOT_NEGATIVE, "vf_coef": NOT_NEGATIVE})
    require("baseline", config.baseline, "value or none", lambda name: name in ("value", "none"))
    meant = "as it is by default where baseline is none: there is no value network"
    without = config.baseline == "none"
    require("vf_coef", config.vf_coef, meant, lambda coef: not without or coef == Config.vf_coef)
    meant = "None where baseline is none: there is no value network"
    require("vf_learning_rate", config.vf_learning_rate, meant, lambda rate: rate is None or config.baseline == "value")


def make_batch(params: Params, episodes: Episodes, config: Config) -> Batch:
    """Computes returns and advantages."""
    rewards = episodes.reward
    if config.baseline == "value":
        _, future = config.forward(params, episodes.final_features)
        rewards = rewards + jnp.where(episodes.truncated, config.gamma * future, 0)
    returns = token_returns(rewards, episodes.mask, gamma=config.gamma)
    advantage = returns
    if config.baseline == "value":
        advantage = returns - config.forward(params, episodes.features)[1]
    if config.normalize_advantage:
        advantage = masked_standardize(advantage, episodes.mask)
    return Batch(episodes, returns, advantage)


def loss_fn(params: Params, batch: Batch, key: Key, *, config: Config) -> tuple[Scalar, Metrics]:
    """Computes the loss of an update; see `losses.policy_gradient_loss` and `losses.value_loss` for the metrics."""
    del key  # nothing is random here
    episodes = batch.episodes
    output, value = config.forward(params, episodes.features)
    policy = make_distribution(output)
    log_probs, entropy = policy.log_prob(episodes.action), policy.entropy()
    loss, metrics = policy_gradient_loss(
        log_probs, batch.advantage, episodes.mask, entropy=entropy, entropy_coef=config.ent_coef
    )
    if config.baseline == "none":
        return loss, metrics
    of_value, value_metrics = value_loss(value, batch.returns, episodes.mask)
    return loss + config.vf_coef * of_value, metrics | value_metrics


def learn(
    state: TrainState, episodes: Episodes, config: Config, key: Key, remaining: Numeric = 1.0
) -> tuple[TrainState, Metrics]:
    """Takes one step of the optimizer on all episodes."""
    batch = jax.lax.stop_gradient(make_batch(state.params, episodes, config))
    return make_train_step(partial(loss_fn, config=config), config.optimizer(remaining))(state, batch, key)


ALGORITHM = make_algorithm(
    "reinforce", validate, learn, lambda config: 1, show={"Entropy of the policy (nats)": ["policy/entropy_avg"]}
)


def train(key: Key, config: Config) -> tuple[RunnerState, Curves]:
    """Trains from scratch, a pure function: see `ppo.train`."""
    return algorithm.train(ALGORITHM, key, config)


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates, and saves everything to `config.output_dir`; see `runner.run_control` for the figures.

    Raises:
        ValueError: If a setting is wrong.
    """
    return runner.run_control(config, ALGORITHM)
