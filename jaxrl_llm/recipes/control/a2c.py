"""A2C on a gymnax environment: one step of RMSprop for every few steps of many environments.

    jaxrl-llm control a2c --env CartPole-v1

The loss is minus the advantage times the log-probability, half the squared error of the values, and the entropy bonus. With
`gae_lambda` 1 the advantage is the observed return of the rollout, continued by the value of its end, minus the value.

References:
    Mnih et al., 2016. https://arxiv.org/abs/1602.01783
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from jaxrl_llm.distributions import make_distribution
from jaxrl_llm.losses import policy_gradient_loss, value_loss
from jaxrl_llm.recipes.control import algorithm, runner
from jaxrl_llm.recipes.control.algorithm import Curves, RunnerState
from jaxrl_llm.recipes.control.on_policy import Batch, OnPolicyOptions, make_algorithm
from jaxrl_llm.recipes.control.options import (
    NOT_NEGATIVE,
    FirstOrderOptions,
    Hyperparameter,
    require_hyperparameters,
    traceable,
)
from jaxrl_llm.reductions import masked_standardize
from jaxrl_llm.training import TrainState, init_train_state, make_train_step
from jaxrl_llm.types import Key, Metrics, Numeric, Params, Scalar


@traceable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyOptions, FirstOrderOptions):
    """Settings of A2C. A `Hyperparameter` may be traced; the others shape the program."""

    output_dir: str = "runs/control_a2c"
    """Folder for metrics, checkpoints and the learning curve."""
    num_envs: int = 8
    """Environments that run side by side."""
    num_steps: int = 5
    """Steps in each environment between two updates."""
    updates_per_step: int = 250
    """Updates in one compiled call. That is one step of progress, logging, evaluation and checkpoints."""
    gae_lambda: Hyperparameter = 1.0
    """λ of the advantage estimates, in [0, 1]; 1 for returns of up to num_steps steps."""
    optim: Literal["adam", "rmsprop", "sgd"] = "rmsprop"
    """Adam, RMSprop (as torch has it) or plain steps."""
    learning_rate: Hyperparameter = 7e-4
    """Step size."""
    anneal_lr: bool = False
    """Lower the learning rates linearly, from update to update, towards zero."""
    ent_coef: Hyperparameter = 0.0
    """Weight of the entropy bonus."""
    vf_coef: Hyperparameter = 1.0
    """Weight of the value loss, one half of the mean squared error (SB3's 0.5 times the whole mean squared error)."""
    normalize_advantage: bool = False
    """Standardise the advantages of an update."""


def validate(config: Config) -> None:
    """Checks the values of the settings, which must be plain numbers here.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_on_policy(standardized=config.normalize_advantage)
    config.validate_optimizer()
    require_hyperparameters(config, {"ent_coef": NOT_NEGATIVE, "vf_coef": NOT_NEGATIVE})


def loss_fn(params: Params, batch: Batch, key: Key, *, config: Config) -> tuple[Scalar, Metrics]:
    """Computes the loss of a rollout; see `losses.policy_gradient_loss` and `losses.value_loss` for the metrics."""
    del key  # nothing is random here
    output, value = config.forward(params, batch.features)
    policy, advantage = make_distribution(output), batch.advantage
    if config.normalize_advantage:
        advantage = masked_standardize(advantage, jnp.ones_like(advantage))
    of_policy, metrics = policy_gradient_loss(
        policy.log_prob(batch.action), advantage, entropy=policy.entropy(), entropy_coef=config.ent_coef
    )
    of_value, value_metrics = value_loss(value, batch.returns)
    return of_policy + config.vf_coef * of_value, metrics | value_metrics


def learn(
    state: TrainState, batch: Batch, config: Config, key: Key, remaining: Numeric = 1.0
) -> tuple[TrainState, Metrics]:
    """Takes one step of the optimizer on the whole batch."""
    return make_train_step(partial(loss_fn, config=config), config.optimizer(remaining))(state, batch, key)


ALGORITHM = make_algorithm(
    "a2c",
    validate,
    learn,
    lambda params, config: init_train_state(params, config.optimizer()),
    show={"Entropy of the policy (nats)": ["policy/entropy_avg"]},
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
