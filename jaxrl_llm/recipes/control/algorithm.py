"""What an algorithm for environments is: how it starts, how it updates, and how it acts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from jaxrl_llm.recipes.control.normalization import Normalizers
from jaxrl_llm.recipes.control.options import ActorCriticOptions, Agent
from jaxrl_llm.rollouts.environment import EnvironmentState, Policy, greedy_policy, stochastic_policy
from jaxrl_llm.types import Key, Metrics

Curves = dict[str, Num[Array, "..."]]
"""Metrics of many updates, which are the last axis."""


class RunnerState(NamedTuple):
    """All that a run carries from update to update. No key: that of an update follows from the run's and its number.

    Attributes:
        train: What is learned: a `TrainState`, or what the algorithm has in its place.
        environments: Where the environments stand; None where every update starts new episodes.
        normalizers: What observations and rewards are normalised by.
        update: Number of updates done.
        timesteps: Environment steps taken.
    """

    train: Any
    environments: EnvironmentState | None
    normalizers: Normalizers
    update: Int[Array, ""]
    timesteps: Int[Array, ""]


def count_update(state: RunnerState, steps: Int[Array, ""] | int) -> RunnerState:
    """Counts an update and its environment steps."""
    return state._replace(update=state.update + 1, timesteps=state.timesteps + steps)


class Algorithm(NamedTuple):
    """An algorithm as pure functions.

    Attributes:
        name: As the command line has it.
        validate: `validate(config)` raises a `ValueError` that names a wrong setting.
        init: `init(key, config) -> state`; the key is consumed.
        update: `update(state, config, key) -> (state, metrics)`: collects experience and learns from it. The key, which
            is of this update alone, is consumed.
        agent: `agent(state)`: what acts, the argument of the policies.
        policies: `policies(config) -> {"greedy": policy, "sampled": policy}`.
        show: Panels of the learning curve besides the returns: {title: names of metrics}.
    """

    name: str
    validate: Callable[[Any], None]
    init: Callable[[Key, Any], RunnerState]
    update: Callable[[RunnerState, Any, Key], tuple[RunnerState, Metrics]]
    agent: Callable[[RunnerState], Any]
    policies: Callable[[Any], dict[str, Policy]]
    show: dict[str, list[str]]


def actor_critic_agent(state: RunnerState) -> Agent:
    """Gives what acts, where `state.train.params` are those of an actor-critic."""
    return Agent(state.train.params, state.normalizers.observations)


def actor_critic_policies(config: ActorCriticOptions) -> dict[str, Policy]:
    """Makes the policies of an actor-critic."""
    apply = config.apply()
    return {"greedy": greedy_policy(apply), "sampled": stochastic_policy(apply)}


def split_run_key(key: Key) -> tuple[Key, Key, Key]:
    """Splits the key of a run into those for the start, the updates and the evaluations."""
    init_key, update_key, eval_key = jax.random.split(key, 3)
    return init_key, update_key, eval_key


def train(algorithm: Algorithm, key: Key, config: Any) -> tuple[RunnerState, Curves]:
    """Trains from scratch in one scan: a pure function of the key and the settings; the caller compiles and vmaps it.

    Update number n uses `fold_in(update_key, n)`, here and in `repeat_updates`, so that a run may be cut anywhere.
    """
    init_key, update_key, _ = split_run_key(key)

    def body(state: RunnerState, _: None) -> tuple[RunnerState, Metrics]:
        return algorithm.update(state, config, jax.random.fold_in(update_key, state.update))

    return jax.lax.scan(body, algorithm.init(init_key, config), length=config.num_updates)


def repeat_updates(
    algorithm: Algorithm, state: RunnerState, config: Any, key: Key, count: Int[Array, ""] | int
) -> tuple[RunnerState, Metrics]:
    """Does `count` updates and adds up their metrics; one compiled program serves any count.

    Args:
        algorithm: Whose updates.
        state: From its `init`, or the updates before.
        config: Its settings.
        key: Of all updates of the run.
        count: How many; may be traced.

    Returns:
        The new state, and the totals of the metrics, see `to_totals`.
    """

    def step(state: RunnerState) -> tuple[RunnerState, Metrics]:
        state, metrics = algorithm.update(state, config, jax.random.fold_in(key, state.update))
        return state, to_totals(metrics)

    def body(_: Array, carry: tuple[RunnerState, Metrics]) -> tuple[RunnerState, Metrics]:
        state, totals = step(carry[0])
        return state, jax.tree.map(jnp.add, carry[1], totals)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, state)[1])
    return jax.lax.fori_loop(0, count, body, (state, zeros))


EPISODE_MEANS = ("episode/return_mean", "episode/length_mean")


def to_totals(metrics: Metrics) -> Metrics:
    """Turns the metrics of an update into numbers that add up: means over episodes become sums (0 where none ended)."""
    count = metrics["episode/count"]
    return metrics | {name: jnp.where(count > 0, metrics[name] * count, 0) for name in EPISODE_MEANS}


def to_means(totals: Metrics, updates: Any) -> Metrics:
    """Turns totals of several updates into means over updates, and over episodes (NaN where none ended)."""
    count = totals["episode/count"]
    means = {name: total / updates for name, total in totals.items()}
    return means | {name: totals[name] / count for name in EPISODE_MEANS} | {"episode/count": count}
