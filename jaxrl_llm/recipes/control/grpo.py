r"""GRPO on a gymnax environment: groups of whole episodes from the same start, and no critic.

    jaxrl-llm control grpo --env CartPole-v1

An episode stands for a completion, its start for the prompt. The advantage of all its steps is its return, relative to the
mean of its group and divided by the group's standard deviation; the loss is that of GRPO on language, `losses.grpo_loss`,
with its mean over all steps alike.

It does well where episodes are short and rewards dense, as on CartPole. Over long horizons a critic, which knows better than
the whole episode's return which step was good, is hard to replace.

References:
    Shao et al., 2024. https://arxiv.org/abs/2402.03300
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
from jaxtyping import Array, Float

from jaxrl_llm.advantages import ScaleRewards, group_relative_advantages
from jaxrl_llm.distributions import make_distribution
from jaxrl_llm.losses import grpo_loss
from jaxrl_llm.recipes.control import algorithm, runner
from jaxrl_llm.recipes.control.algorithm import Curves, RunnerState
from jaxrl_llm.recipes.control.episodes import Episodes, WholeEpisodeOptions, make_algorithm
from jaxrl_llm.recipes.control.options import NOT_NEGATIVE, POSITIVE, Hyperparameter, require_hyperparameters, traceable
from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.training import TrainState, make_train_step
from jaxrl_llm.types import Key, Metrics, Numeric, Params, Scalar


@traceable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(WholeEpisodeOptions):
    """Settings of GRPO. A `Hyperparameter` may be traced; the others shape the program."""

    output_dir: str = "runs/control_grpo"
    """Folder for metrics, checkpoints and the learning curve."""
    num_generations: int = 8
    """Episodes of a group. num_envs is a multiple of it."""
    same_start: bool = True
    """Whether the episodes of a group start in the same state, as completions of one prompt do."""
    gamma: Hyperparameter = 1.0
    """Discount of the return that the episodes of a group are compared by, in [0, 1]."""
    update_epochs: int = 4
    """Steps of the optimizer in each update, each on all episodes."""
    learning_rate: Hyperparameter = 3e-3
    """Step size."""
    clip_eps: Hyperparameter = 0.2
    """Half-width of the interval around 1 that the probability ratio is clipped to."""
    ent_coef: Hyperparameter = 0.0
    """Weight of the entropy bonus."""
    loss_type: Literal["bnpo", "grpo"] = "bnpo"
    """How the loss is averaged: bnpo (over all steps alike) or grpo (over steps, then over episodes)."""
    scale_rewards: ScaleRewards = "group"
    """Standard deviation that divides the advantages: of the group, of the batch, or none (Dr. GRPO)."""


class Batch(NamedTuple):
    """What an update learns from: episodes, and the advantage of each."""

    episodes: Episodes
    advantage: Float[Array, " envs"]


def validate(config: Config) -> None:
    """Checks the values of the settings, which must be plain numbers here.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_whole_episodes()
    require_at_least(1, update_epochs=config.update_epochs)
    require_at_least(2, num_generations=config.num_generations)
    size, meant = config.num_generations, f"a multiple of num_generations={config.num_generations}"
    require("num_envs", config.num_envs, meant, lambda envs: envs % size == 0)
    require_hyperparameters(config, {"clip_eps": POSITIVE, "ent_coef": NOT_NEGATIVE})
    names = get_args(Config.__annotations__["loss_type"])
    require("loss_type", config.loss_type, f"one of {names}", lambda name: name in names)
    require("shared_trunk", config.shared_trunk, "false: there is no critic", lambda shared: not shared)
    require("vf_learning_rate", config.vf_learning_rate, "None: there is no critic", lambda rate: rate is None)


def loss_fn(params: Params, batch: Batch, key: Key, *, config: Config) -> tuple[Scalar, Metrics]:
    """Computes the loss of all episodes; see `losses.grpo_loss` for the metrics."""
    del key  # nothing is random here
    episodes = batch.episodes
    policy = make_distribution(config.forward(params, episodes.features)[0])
    return grpo_loss(
        policy.log_prob(episodes.action),
        episodes.log_prob,
        batch.advantage,
        episodes.mask,
        entropy=policy.entropy(),
        entropy_coef=config.ent_coef,
        epsilon=config.clip_eps,
        loss_type=config.loss_type,
    )


def learn(
    state: TrainState, episodes: Episodes, config: Config, key: Key, remaining: Numeric = 1.0
) -> tuple[TrainState, Metrics]:
    """Takes the optimizer steps of one update; metrics are means over them."""
    discounts = config.gamma ** (episodes.mask.cumsum(1) - 1)
    returns = (discounts * episodes.reward).sum(1)
    advantage = group_relative_advantages(returns, config.num_generations, scale_rewards=config.scale_rewards)
    step = make_train_step(partial(loss_fn, config=config), config.optimizer(remaining))

    def epoch(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
        return step(state, Batch(episodes, advantage), key)

    state, metrics = jax.lax.scan(epoch, state, length=config.update_epochs)
    return state, jax.tree.map(lambda x: x.mean(0), metrics)


ALGORITHM = make_algorithm(
    "grpo",
    validate,
    learn,
    lambda config: config.num_generations if config.same_start else 1,
    show={"Entropy of the policy (nats)": ["entropy"]},
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
