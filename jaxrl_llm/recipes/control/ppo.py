"""PPO on a gymnax environment with discrete actions: CartPole-v1 in half a million steps, in seconds on a CPU.

    jaxrl-llm control ppo --env CartPole-v1 --output-dir runs/ppo

The hyperparameters and the order of computation are those of CleanRL's `ppo.py`: two tanh networks, orthogonal
initialisation, advantages standardised in each minibatch, clipped values, Adam with epsilon 1e-5, a learning rate that
falls to zero. It departs from it in one point: an episode that the time limit cuts is bootstrapped with the value of
the state it had reached. CleanRL and others treat the cut like a fall; on CartPole-v1 that alone costs about ten of the
500 points.

A whole run is one pure function, `train(key, config)`. Compile it, `vmap` it over seeds, or over those fields of
`Config` that are a `Hyperparameter`:

    jax.vmap(train, in_axes=(0, None))(keys, config)
    jax.vmap(lambda rate: train(key, dataclasses.replace(config, learning_rate=rate)))(rates)

`run(config)` is the same computation in a loop on the host, a few updates at a time, with progress, metrics,
checkpoints and exact resume.

References:
    Schulman et al., 2017. https://arxiv.org/abs/1707.06347; Huang et al., 2022, The 37 Implementation Details of PPO.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped

from jaxrl_llm.advantages import generalized_advantages
from jaxrl_llm.log_probs import token_entropy, token_log_probs
from jaxrl_llm.losses import ppo_loss
from jaxrl_llm.optimizers import make_optimizer
from jaxrl_llm.recipes.control import runner
from jaxrl_llm.recipes.control.options import ControlOptions, Hyperparameter, OptionalHyperparameter
from jaxrl_llm.recipes.control.runner import Curves, RunnerState
from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.reductions import masked_standardize
from jaxrl_llm.rollouts.environment import (
    Transition,
    episode_metrics,
    make_environment,
    observation_shape,
    reset,
    rollout,
    stochastic_policy,
)
from jaxrl_llm.training import TrainState, init_train_state, make_train_step
from jaxrl_llm.types import Key, Metrics, Numeric, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ControlOptions):
    """Settings of PPO. A `Hyperparameter` may be traced; the others shape the program."""

    output_dir: str = "runs/control_ppo"
    """Folder for metrics, checkpoints and the learning curve."""
    update_epochs: int = 4
    """Passes over the collected steps in each update."""
    num_minibatches: int = 4
    """Parts that the collected steps are split into, at random, in each pass."""
    learning_rate: Hyperparameter = 2.5e-4
    """Step size of Adam."""
    anneal_lr: bool = True
    """Lower the learning rate linearly, from update to update, towards zero."""
    gamma: Hyperparameter = 0.99
    """Discount, in [0, 1]."""
    gae_lambda: Hyperparameter = 0.95
    """λ of the advantage estimates, in [0, 1]: 0 trusts the value function, 1 the observed returns."""
    clip_eps: Hyperparameter = 0.2
    """Half-width of the interval around 1 that the probability ratio is clipped to."""
    vf_clip_eps: OptionalHyperparameter = 0.2
    """Half-width of the clip of values around those of the rollout, in units of reward; None: no clip.
    (Without it the other defaults often fail on CartPole-v1.)"""
    ent_coef: Hyperparameter = 0.01
    """Weight of the entropy bonus."""
    vf_coef: Hyperparameter = 0.5
    """Weight of the value loss, one half of the mean squared error."""
    max_grad_norm: Hyperparameter = 0.5
    """Bound on the global norm of the gradient."""
    normalize_advantage: bool = True
    """Standardise the advantages in each minibatch."""
    target_kl: OptionalHyperparameter = None
    """Skip the remaining epochs of an update once the mean KL divergence of an epoch, in nats, exceeds this."""


class Batch(NamedTuple):
    """What an update learns from: steps in any order.

    Attributes:
        observation: What the policy saw.
        action: What it did.
        log_prob: Log-probability of the action when it was taken, nats.
        value: Prediction of the critic at that time.
        advantage: How much better than that the action turned out.
        returns: Target of the critic.
    """

    observation: Shaped[Array, "batch ..."]
    action: Int[Array, " batch"]
    log_prob: Float[Array, " batch"]
    value: Float[Array, " batch"]
    advantage: Float[Array, " batch"]
    returns: Float[Array, " batch"]


def validate(config: Config) -> None:
    """Checks the values of the settings, which must be plain numbers here.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_control()
    require_at_least(1, update_epochs=config.update_epochs, num_minibatches=config.num_minibatches)
    for name in ("gamma", "gae_lambda"):
        require(name, getattr(config, name), "in [0, 1]", lambda value: 0 <= value <= 1)
    for name in ("learning_rate", "clip_eps", "max_grad_norm"):
        require(name, getattr(config, name), "positive", lambda value: value > 0)
    for name in ("vf_clip_eps", "target_kl"):
        require(name, getattr(config, name), "positive or None", lambda value: value is None or value > 0)
    for name in ("ent_coef", "vf_coef"):
        require(name, getattr(config, name), "at least 0", lambda value: value >= 0)
    least = 2 if config.normalize_advantage else 1
    require(
        "num_minibatches",
        config.num_minibatches,
        f"a divisor of num_envs × num_steps = {config.batch_size} that leaves minibatches of at least {least}",
        lambda parts: config.batch_size % parts == 0 and config.batch_size // parts >= least,
    )


def _adam(config: Config, learning_rate: Numeric) -> optax.GradientTransformation:
    """Makes the optimizer of one update. Its state does not depend on the learning rate, a new one each update."""
    return make_optimizer("adam", learning_rate=learning_rate, max_grad_norm=config.max_grad_norm, adam_epsilon=1e-5)


def init(key: Key, config: Config) -> RunnerState:
    """Makes the state before the first update.

    Args:
        key: Consumed.
        config: Settings.
    """
    params_key, reset_key = jax.random.split(key)
    env, env_params = make_environment(config.env)
    params = config.network().init(params_key, jnp.zeros((1, *observation_shape(env, env_params))))["params"]
    return RunnerState(
        train=init_train_state(params, _adam(config, config.learning_rate)),
        environments=reset(reset_key, env, env_params, config.num_envs),
        update=jnp.zeros((), jnp.int32),
    )


def make_batch(params: Params, transitions: Transition, config: Config) -> Batch:
    """Estimates advantages and returns of a rollout, and drops the order of its steps.

    The value of the state that a step led to is that of its `final_observation`: right inside an episode, at a time
    limit and at the end of the rollout; where the episode terminated it is not used.
    """
    apply = config.apply()
    _, value = apply(params, transitions.observation)
    _, next_value = apply(params, transitions.final_observation)
    advantage, returns = generalized_advantages(
        transitions.reward,
        value,
        next_value,
        transitions.terminated,
        transitions.truncated,
        gamma=config.gamma,
        lam=config.gae_lambda,
    )
    batch = Batch(transitions.observation, transitions.action, transitions.log_prob, value, advantage, returns)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def loss_fn(params: Params, batch: Batch, key: Key, *, config: Config) -> tuple[Scalar, Metrics]:
    """Computes the loss of a minibatch; see `losses.ppo_loss` for the metrics."""
    del key  # nothing is random here
    logits, value = config.apply()(params, batch.observation)
    advantage = batch.advantage
    if config.normalize_advantage:
        advantage = masked_standardize(advantage, jnp.ones_like(advantage))
    return ppo_loss(
        token_log_probs(logits, batch.action),
        batch.log_prob,
        advantage,
        values=value,
        old_values=batch.value,
        returns=batch.returns,
        entropy=token_entropy(logits),
        cliprange=config.clip_eps,
        cliprange_value=config.vf_clip_eps,
        vf_coef=config.vf_coef,
        entropy_coef=config.ent_coef,
    )


def learn(
    state: TrainState, batch: Batch, config: Config, key: Key, learning_rate: Numeric
) -> tuple[TrainState, Metrics]:
    """Takes the optimizer steps of one update, on shuffled minibatches.

    Args:
        state: Parameters and state of the optimizer.
        batch: The steps of one rollout.
        config: Settings.
        key: Consumed.
        learning_rate: Of this update.

    Returns:
        The new state, and the metrics of the loss, averaged over the minibatches that were learned from, with
        `optimizer/epochs`, the number of passes.
    """
    step = make_train_step(partial(loss_fn, config=config), _adam(config, learning_rate))
    shuffle_key, step_key = jax.random.split(key)

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
    return state, metrics | {"optimizer/epochs": active.sum()}


def _shuffle(batch: Batch, key: Key, num_minibatches: int) -> Batch:
    """Splits a batch at random: `[minibatches, batch / minibatches, …]`."""
    order = jax.random.permutation(key, batch.action.shape[0])
    return jax.tree.map(lambda x: x[order].reshape(num_minibatches, -1, *x.shape[1:]), batch)


def update(state: RunnerState, config: Config, key: Key) -> tuple[RunnerState, Metrics]:
    """Collects num_envs × num_steps steps, and learns from them.

    Args:
        state: From `init`, or the update before.
        config: Settings.
        key: Of this update; consumed.

    Returns:
        The new state, and metrics: those of `learn`, those of `episode_metrics` and `optimizer/learning_rate`.
    """
    env, env_params = make_environment(config.env)
    rollout_key, learn_key = jax.random.split(key)
    policy = stochastic_policy(config.apply())
    environments, transitions = rollout(
        policy, state.train.params, rollout_key, env, env_params, state.environments, config.num_steps
    )
    batch = make_batch(state.train.params, transitions, config)
    remaining = 1 - state.update / config.num_updates if config.anneal_lr else 1.0
    learning_rate = config.learning_rate * remaining
    train, metrics = learn(state.train, batch, config, learn_key, learning_rate)
    metrics |= episode_metrics(transitions) | {"optimizer/learning_rate": jnp.asarray(learning_rate)}
    return RunnerState(train, environments, state.update + 1), metrics


def train(key: Key, config: Config) -> tuple[RunnerState, Curves]:
    """Trains from scratch, `config.num_updates` updates: a pure function; compile it, and vmap it.

    Args:
        key: Consumed.
        config: Settings, static; those that are a `Hyperparameter` may be traced.

    Returns:
        The final state, and the metrics of each update, `[updates]`.

    Example:
        >>> config = Config(total_timesteps=256, num_steps=32)
        >>> state, metrics = jax.jit(train, static_argnums=1)(jax.random.key(0), config)
        >>> metrics["loss"].shape
        (2,)
    """
    return runner.train(init, update, key, config)


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates, and saves everything to `config.output_dir`; see `runner.run_control` for the figures.

    Raises:
        ValueError: If a setting is wrong.
    """
    validate(config)
    return runner.run_control(config, init, update, label="ppo")
