"""PPO on a gymnax environment, with discrete or continuous actions: CartPole-v1 in half a million steps, in seconds on a CPU.

    jaxrl-llm control ppo --env CartPole-v1 --output-dir runs/ppo

The order of computation is that of CleanRL's `ppo.py`: two tanh networks, orthogonal initialisation, advantages
standardised in each minibatch, Adam with epsilon 1e-5, a learning rate that falls to zero. An episode that the time limit
cuts is bootstrapped with the value of the state it had reached: CleanRL and others treat the cut like a fall, which on
CartPole-v1 alone costs 10 to 15 of the 500 points. The hyperparameters are CleanRL's too, but that values are not clipped,
for what suits returns of 100 does not suit others, and that steps are four times as large. With `--preset cleanrl` they are
all CleanRL's.

A whole run is one pure function, `train(key, config)`. Those fields of `Config` that are a `Hyperparameter` are leaves of a
tree. So compile it, once for all their values, and `vmap` it over seeds or over them:

    jax.jit(train)(key, config)
    jax.vmap(train, in_axes=(0, None))(keys, config)
    jax.vmap(lambda rate: train(key, dataclasses.replace(config, learning_rate=rate)))(rates)

`run(config)` is the same computation in a loop on the host, a few updates at a time, with progress, metrics,
checkpoints and exact resume.

References:
    Schulman et al., 2017. https://arxiv.org/abs/1707.06347; Huang et al., 2022, The 37 Implementation Details of PPO.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.distributions import make_distribution
from jaxrl_llm.losses import ppo_loss
from jaxrl_llm.recipes.control import algorithm, runner
from jaxrl_llm.recipes.control.algorithm import Curves, RunnerState
from jaxrl_llm.recipes.control.on_policy import Batch, OnPolicyOptions, make_algorithm
from jaxrl_llm.recipes.control.options import (
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_NONE,
    FirstOrderOptions,
    Hyperparameter,
    OptionalHyperparameter,
    annealed,
    require_hyperparameters,
    traceable,
)
from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.reductions import masked_standardize
from jaxrl_llm.training import TrainState, init_train_state, make_train_step
from jaxrl_llm.types import Key, Metrics, Numeric, Params, Scalar


@traceable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyOptions, FirstOrderOptions):
    """Settings of PPO. A `Hyperparameter` may be traced; the others shape the program."""

    output_dir: str = "runs/control_ppo"
    """Folder for metrics, checkpoints and the learning curve."""
    update_epochs: int = 4
    """Passes over the collected steps in each update."""
    num_minibatches: int = 4
    """Parts that the collected steps are split into, at random, in each pass."""
    clip_eps: Hyperparameter = 0.2
    """Half-width of the interval around 1 that the probability ratio is clipped to."""
    anneal_clip: bool = False
    """Lower clip_eps linearly, from update to update, towards zero."""
    learning_rate: Hyperparameter = 1e-3
    """Step size."""
    vf_clip_eps: OptionalHyperparameter = None
    """Half-width of the clip of values around those of the rollout, in units of reward; None: no clip.
    It bounds how far an update moves the critic."""
    ent_coef: Hyperparameter = 0.01
    """Weight of the entropy bonus."""
    vf_coef: Hyperparameter = 0.5
    """Weight of the value loss, one half of the mean squared error."""
    normalize_advantage: Literal["minibatch", "batch", "none"] = "minibatch"
    """Standardise the advantages in each minibatch, in the whole batch once, or not at all."""
    target_kl: OptionalHyperparameter = None
    """Skip the remaining epochs of an update once the mean KL divergence of an epoch, in nats, exceeds this."""


_GUIDE = Config(
    num_envs=1,
    num_steps=2048,
    update_epochs=10,
    num_minibatches=32,
    activation="relu",
    learning_rate=3e-4,
    anneal_lr=False,
)
PRESETS = {
    "cleanrl": Config(learning_rate=2.5e-4, vf_clip_eps=0.2),
    "guide": dataclasses.replace(_GUIDE, vf_learning_rate=1e-3),
    "guide-shared": dataclasses.replace(_GUIDE, shared_trunk=True, hidden_sizes=(128, 128)),
}
"""`--preset NAME`: CleanRL's settings, or those of a widespread tutorial, with two networks or with one of two heads."""


def validate(config: Config) -> None:
    """Checks the values of the settings, which must be plain numbers here.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_on_policy(standardized=config.normalize_advantage == "batch")
    require_at_least(1, update_epochs=config.update_epochs, num_minibatches=config.num_minibatches)
    config.validate_optimizer()
    require_hyperparameters(
        config, {"clip_eps": POSITIVE, "vf_clip_eps": POSITIVE_OR_NONE, "target_kl": POSITIVE_OR_NONE}
    )
    require_hyperparameters(config, dict.fromkeys(("ent_coef", "vf_coef"), NOT_NEGATIVE))
    names = get_args(Config.__annotations__["normalize_advantage"])
    require("normalize_advantage", config.normalize_advantage, f"one of {names}", lambda name: name in names)
    size, least = config.steps_per_update, 1 if config.normalize_advantage == "none" else 2
    require(
        "num_minibatches",
        config.num_minibatches,
        f"a divisor of num_envs × num_steps = {size} that leaves minibatches of at least {least}",
        lambda parts: size % parts == 0 and size // parts >= least,
    )


def loss_fn(params: Params, batch: Batch, key: Key, *, config: Config, clip_eps: Numeric) -> tuple[Scalar, Metrics]:
    """Computes the loss of a minibatch; see `losses.ppo_loss` for the metrics."""
    del key  # nothing is random here
    output, value = config.forward(params, batch.features)
    policy, advantage = make_distribution(output), batch.advantage
    if config.normalize_advantage == "minibatch":
        advantage = masked_standardize(advantage, jnp.ones_like(advantage))
    return ppo_loss(
        policy.log_prob(batch.action),
        batch.log_prob,
        advantage,
        values=value,
        old_values=batch.value,
        returns=batch.returns,
        entropy=policy.entropy(),
        cliprange=clip_eps,
        cliprange_value=config.vf_clip_eps,
        vf_coef=config.vf_coef,
        entropy_coef=config.ent_coef,
    )


def learn(
    state: TrainState, batch: Batch, config: Config, key: Key, remaining: Numeric = 1.0
) -> tuple[TrainState, Metrics]:
    """Takes the optimizer steps of one update, on shuffled minibatches.

    Args:
        state: Parameters and state of the optimizer.
        batch: The steps of one rollout.
        config: Settings.
        key: Consumed.
        remaining: Share of the run that is left, for what falls with it.

    Returns:
        The new state, and the metrics of the loss, averaged over the minibatches that were learned from, with
        `optimizer/epochs`, the number of passes, and `optimizer/learning_rate`.
    """
    clip_eps = annealed(config.clip_eps, remaining, config.anneal_clip)
    step = make_train_step(partial(loss_fn, config=config, clip_eps=clip_eps), config.optimizer(remaining))
    shuffle_key, step_key = jax.random.split(key)
    if config.normalize_advantage == "batch":
        batch = batch._replace(advantage=masked_standardize(batch.advantage, jnp.ones_like(batch.advantage)))

    def epoch(carry: tuple[TrainState, Array], index: Array) -> tuple[tuple[TrainState, Array], tuple[Metrics, Array]]:
        state, active = carry
        minibatches = _shuffle(batch, jax.random.fold_in(shuffle_key, index), config.num_minibatches)
        learned, metrics = jax.lax.scan(lambda state, minibatch: step(state, minibatch, step_key), state, minibatches)
        metrics = jax.tree.map(lambda x: x.mean(0), metrics)
        if config.target_kl is None:
            return (learned, active), (metrics, active)
        state = jax.tree.map(partial(jnp.where, active), learned, state)
        return (state, active & (metrics["policy/approxkl_avg"] <= config.target_kl)), (metrics, active)

    epochs = jnp.arange(config.update_epochs)
    (state, _), (metrics, active) = jax.lax.scan(epoch, (state, jnp.array(True)), epochs)
    metrics = {name: jnp.mean(x, where=active) for name, x in metrics.items()}
    rate = jnp.asarray(config.rate(remaining))
    return state, metrics | {"optimizer/epochs": active.sum(), "optimizer/learning_rate": rate}


def _shuffle(batch: Batch, key: Key, num_minibatches: int) -> Batch:
    """Splits a batch at random: `[minibatches, batch / minibatches, …]`."""
    order = jax.random.permutation(key, batch.log_prob.shape[0])
    return jax.tree.map(lambda x: x[order].reshape(num_minibatches, -1, *x.shape[1:]), batch)


ALGORITHM = make_algorithm(
    "ppo",
    validate,
    learn,
    lambda params, config: init_train_state(params, config.optimizer()),
    show={"Entropy of the policy (nats)": ["policy/entropy_avg"]},
)
init, update = ALGORITHM.init, ALGORITHM.update


def train(key: Key, config: Config) -> tuple[RunnerState, Curves]:
    """Trains from scratch, `config.num_updates` updates: a pure function; compile it, and vmap it.

    Args:
        key: Consumed.
        config: Settings; those that are a `Hyperparameter` may be traced.

    Returns:
        The final state, and the metrics of each update, `[updates]`.

    Example:
        >>> config = Config(total_timesteps=256, num_steps=32)
        >>> state, metrics = jax.jit(train)(jax.random.key(0), config)
        >>> metrics["loss"].shape
        (2,)
    """
    return algorithm.train(ALGORITHM, key, config)


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates, and saves everything to `config.output_dir`; see `runner.run_control` for the figures.

    Raises:
        ValueError: If a setting is wrong.
    """
    return runner.run_control(config, ALGORITHM)
