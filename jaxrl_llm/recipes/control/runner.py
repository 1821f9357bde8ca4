"""A run of a control algorithm on the host: several updates in each compiled call, and between them all the rest.

An algorithm is two pure functions, `init(key, config) -> state` and `update(state, config, key) -> (state, metrics)`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from jaxrl_llm.recipes.control.options import ControlOptions
from jaxrl_llm.recipes.loop import training_loop
from jaxrl_llm.recipes.progress import facts, table
from jaxrl_llm.recipes.report import plot_metrics
from jaxrl_llm.rollouts.environment import (
    EnvironmentState,
    evaluate,
    greedy_policy,
    make_environment,
    mean_over_episodes,
    stochastic_policy,
)
from jaxrl_llm.training import TrainState
from jaxrl_llm.training.logging import read_metrics
from jaxrl_llm.types import Key, Metrics, Numeric


class RunnerState(NamedTuple):
    """All that a run carries from update to update. No key: that of an update follows from the run's and its number.

    Attributes:
        train: Parameters and state of the optimizer.
        environments: Where the environments stand.
        update: Number of updates done.
    """

    train: TrainState
    environments: EnvironmentState
    update: Int[Array, ""]


Init: TypeAlias = Callable[[Key, Any], RunnerState]
"""`init(key, config) -> state`; the key is consumed."""

Update: TypeAlias = Callable[[RunnerState, Any, Key], tuple[RunnerState, Metrics]]
"""`update(state, config, key) -> (state, metrics)`: collects experience and learns from it. The key, which is of this
update alone, is consumed."""

Curves: TypeAlias = dict[str, Num[Array, "..."]]
"""Metrics of many updates, which are the last axis."""


def split_run_key(key: Key) -> tuple[Key, Key, Key]:
    """Splits the key of a run into those for the start, the updates and the evaluations."""
    init_key, update_key, eval_key = jax.random.split(key, 3)
    return init_key, update_key, eval_key


def train(init: Init, update: Update, key: Key, config: Any) -> tuple[RunnerState, Curves]:
    """Trains from scratch in one scan: a pure function of the key and the settings; the caller compiles and vmaps it.

    Update number n uses `fold_in(update_key, n)`, here and in `repeat_updates`, so that a run may be cut anywhere.
    """
    init_key, update_key, _ = split_run_key(key)

    def body(state: RunnerState, _: None) -> tuple[RunnerState, Metrics]:
        return update(state, config, jax.random.fold_in(update_key, state.update))

    return jax.lax.scan(body, init(init_key, config), length=config.num_updates)


def repeat_updates(
    update: Update, state: RunnerState, config: Any, key: Key, count: Int[Array, ""] | int
) -> tuple[RunnerState, Metrics]:
    """Does `count` updates and adds up their metrics; one compiled program serves any count.

    Args:
        update: Of an algorithm.
        state: From its `init`, or the updates before.
        config: Its settings.
        key: Of all updates of the run.
        count: How many; may be traced.

    Returns:
        The new state, and the totals of the metrics, see `to_totals`.
    """

    def step(state: RunnerState) -> tuple[RunnerState, Metrics]:
        state, metrics = update(state, config, jax.random.fold_in(key, state.update))
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


def to_means(totals: Metrics, updates: Numeric) -> Metrics:
    """Turns totals of several updates into means over updates, and over episodes (NaN where none ended)."""
    count = totals["episode/count"]
    means = {name: total / updates for name, total in totals.items()}
    return means | {name: totals[name] / count for name in EPISODE_MEANS} | {"episode/count": count}


def run_control(config: ControlOptions, init: Init, update: Update, *, label: str) -> dict[str, Any]:
    """Trains with progress, metrics, evaluations, checkpoints and resume; draws the learning curve at the end.

    With `num_seeds` above 1, all seeds train in the same compiled call, and metrics are means over them.

    Args:
        config: Settings, already validated.
        init: Makes the state before the first update.
        update: Makes one update.
        label: Name of the algorithm.

    Returns:
        Figures of the run: `timesteps` (of each seed), `eval/greedy_return` and `eval/sampled_return` (means over the
        last evaluation), and, of a complete run, `train/return` (mean over the episodes that ended in the last tenth of
        the run) and `learning_curve` (a file).

    Raises:
        ValueError: If a run is resumed with another number of environment steps in each step of the run.
    """
    seeds = jnp.arange(config.seed, config.seed + config.num_seeds)
    init_keys, update_keys, eval_keys = jax.vmap(split_run_key)(jax.vmap(jax.random.key)(seeds))
    state = jax.jit(jax.vmap(init, in_axes=(0, None)), static_argnums=1)(init_keys, config)
    evaluations = make_evaluation(config)
    step = make_step(config, update)
    facts(f"{label} on {config.env}", plan(config))

    def report(state: RunnerState) -> dict[str, Any]:
        return _summary(evaluations(state, eval_keys))

    state, complete = training_loop(
        config,
        state,
        lambda state, index: step(state, index, update_keys),
        total_steps=-(-config.num_updates // config.updates_per_step),
        label=label,
        evaluate=report,
        show=("timesteps", "episode/return_mean", "eval/greedy_return"),
    )
    returns = evaluations(state, eval_keys)
    figures = {"timesteps": int(state.update[0]) * config.batch_size} | _summary(returns)
    return figures | _conclude(config, returns) if complete else figures


def _conclude(config: ControlOptions, returns: dict[str, Array]) -> dict[str, Any]:
    """Draws and prints what a complete run reached; returns the figures that only such a run has."""
    means = zip(*(x.mean(-1).tolist() for x in returns.values()), strict=True)
    rows = [[config.seed + i, *row] for i, row in enumerate(means)]
    table(f"Mean return of {config.eval_episodes} episodes", ["seed", *returns], rows)
    figures = {"train/return": final_return(config), "learning_curve": str(draw_learning_curve(config))}
    facts("Training", figures)
    return figures


def plan(config: ControlOptions) -> dict[str, Any]:
    """Tells what a run will do, above all how many environment steps it really takes."""
    steps = config.num_updates * config.batch_size
    left_out = config.total_timesteps - steps
    return {
        "environment steps": f"{steps:,} = {config.num_updates:,} updates × {config.num_envs} environments × "
        f"{config.num_steps} steps" + (f" ({left_out:,} of total_timesteps fill no update)" if left_out else ""),
        "seeds": ", ".join(str(config.seed + i) for i in range(config.num_seeds)),
        "folder": config.output_dir,
    }


def make_step(
    config: ControlOptions, update: Update
) -> Callable[[RunnerState, int, Key], tuple[RunnerState, dict[str, Any]]]:
    """Makes `step(states, index, keys) -> (states, metrics)`: `updates_per_step` updates of every seed.

    The last step of a run does what is left. The states are donated. Compiles once.
    """

    @partial(jax.jit, donate_argnums=0)
    def updates(states: RunnerState, keys: Key, count: Int[Array, ""]) -> tuple[RunnerState, Metrics]:
        states, totals = jax.vmap(lambda state, key: repeat_updates(update, state, config, key, count))(states, keys)
        metrics = to_means(jax.tree.map(lambda x: x.sum(0), totals), count * config.num_seeds)
        if config.num_seeds > 1:
            returns = jax.vmap(to_means, in_axes=(0, None))(totals, count)["episode/return_mean"]
            metrics |= {f"seed_{config.seed + i}/episode/return_mean": mean for i, mean in enumerate(returns)}
        return states, metrics

    def step(states: RunnerState, index: int, keys: Key) -> tuple[RunnerState, dict[str, Any]]:
        done = index * config.updates_per_step
        if int(states.update[0]) != done:
            raise ValueError(
                f"updates_per_step={config.updates_per_step} is not that of the checkpoint, which holds "
                f"{states.update[0]} updates after {index} steps. Resume with the settings of its config.json."
            )
        count = min(config.updates_per_step, config.num_updates - done)
        states, metrics = updates(states, keys, jnp.array(count))
        return states, metrics | {"timesteps": (done + count) * config.batch_size}

    return step


def make_evaluation(config: ControlOptions) -> Callable[[RunnerState, Key], dict[str, Array]]:
    """Makes `evaluate(states, keys) -> {"eval/greedy_return": [seeds, episodes], "eval/sampled_return": …}`.

    Starts and samples depend on the keys and on how far training is, not on how it went.
    """
    env, env_params = make_environment(config.env)
    apply = config.apply()
    policies = {"eval/greedy_return": greedy_policy(apply), "eval/sampled_return": stochastic_policy(apply)}

    def one_seed(state: RunnerState, key: Key) -> dict[str, Array]:
        keys = jax.random.split(jax.random.fold_in(key, state.update), len(policies))
        return {
            name: evaluate(policy, state.train.params, key, env, env_params, config.eval_episodes)[0]
            for (name, policy), key in zip(policies.items(), keys, strict=True)
        }

    return jax.jit(jax.vmap(one_seed))


def _summary(returns: dict[str, Array]) -> dict[str, float]:
    return {name: float(x.mean()) for name, x in returns.items()}


def final_return(config: ControlOptions) -> float:
    """Computes the mean return of the episodes that ended in the last tenth of training, from metrics.jsonl."""
    steps = config.num_updates * config.batch_size
    records = [r for r in read_metrics(config.output_dir) if r.get("timesteps", 0) > 0.9 * steps]
    means, counts = ([record[f"episode/{name}"] for record in records] for name in ("return_mean", "count"))
    return float(mean_over_episodes(jnp.array(means), jnp.array(counts)))


def draw_learning_curve(config: ControlOptions) -> Path:
    """Draws returns, training and evaluation, into `<output_dir>/learning_curve.png`."""
    path = Path(config.output_dir) / "learning_curve.png"
    seeds = [f"seed_{config.seed + i}/episode/return_mean" for i in range(config.num_seeds)]
    panels = {
        "Episodes that ended in training (return)": seeds if config.num_seeds > 1 else ["episode/return_mean"],
        "Evaluation (return)": ["eval/greedy_return", "eval/sampled_return"],
        "Entropy of the policy (nats)": ["policy/entropy_avg"],
    }
    size = config.updates_per_step * config.batch_size
    plot_metrics(config.output_dir, panels, path, x_label=f"step of the run ({size:,} environment steps each)")
    return path
