"""A run of a control algorithm on the host: several updates in each compiled call, and between them all the rest.

Several runs are made at once: one for each seed, and in a sweep for each seed and each point of a grid of settings.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxrl_llm.recipes.control.algorithm import (
    Algorithm,
    RunnerState,
    repeat_updates,
    split_run_key,
    to_means,
)
from jaxrl_llm.recipes.control.options import RunConfig
from jaxrl_llm.recipes.loop import training_loop
from jaxrl_llm.recipes.options import require
from jaxrl_llm.recipes.progress import facts, table
from jaxrl_llm.recipes.report import plot_metrics
from jaxrl_llm.rollouts.environment import evaluate, mean_over_episodes
from jaxrl_llm.training.logging import read_metrics
from jaxrl_llm.training.parallel import num_shards, parse_mesh, shard
from jaxrl_llm.types import ROW_AXES, Key, Metrics


class Lanes(NamedTuple):
    """The runs that are made at once; each has an index.

    Attributes:
        names: Of each run, such as `seed_3` or `gamma=0.99/seed_3`.
        seeds: Of each run.
        settings: {name of a setting: its value in each run}; those of the config for all others.
    """

    names: tuple[str, ...]
    seeds: Int[Array, " runs"]
    settings: dict[str, Array]


def make_lanes(config: RunConfig) -> Lanes:
    """Makes one run for each seed and each point of the grid."""
    points = config.points()
    seeds = range(config.seed, config.seed + config.num_seeds)
    labels = ["".join(f"{name}={value:.9g}/" for name, value in point.items()) for point in points]
    settings = {
        name: jnp.repeat(jnp.array([point[name] for point in points], jnp.float32), config.num_seeds)
        for name in points[0]
    }
    names = tuple(f"{label}seed_{seed}" for label in labels for seed in seeds)
    return Lanes(names, jnp.array([seed for _ in points for seed in seeds]), settings)


def run_control(config: RunConfig, algorithm: Algorithm) -> dict[str, Any]:
    """Trains with progress, metrics, evaluations, checkpoints and resume; draws the learning curve at the end.

    All runs train in the same compiled call, and metrics are means over them.

    Args:
        config: Settings.
        algorithm: What trains.

    Returns:
        Figures: `timesteps` (a mean over runs), `eval/greedy_return` and `eval/sampled_return` (means over the last
        evaluation), and, of a complete run, `train/return` (mean over the episodes that ended in the last tenth of its
        steps, or in the last one), `runs` (the same of each run by name) and `learning_curve` (a file).

    Raises:
        ValueError: If a setting is wrong, or a run is resumed with another number of updates in each step of the run.
    """
    require(
        "processes", jax.process_count(), "one for environments: these networks are small", lambda count: count == 1
    )
    for point in config.points():
        algorithm.validate(dataclasses.replace(config, **point))
    lanes = make_lanes(config)
    init_keys, update_keys, eval_keys = jax.vmap(split_run_key)(jax.vmap(jax.random.key)(lanes.seeds))
    init = jax.vmap(lambda key, settings: algorithm.init(key, dataclasses.replace(config, **settings)))
    state = place(jax.jit(init)(init_keys, lanes.settings), config)
    evaluations = make_evaluation(config, algorithm, lanes)
    step = make_step(config, algorithm, lanes)
    planned = {"runs": f"{len(lanes.names)}, {lanes.names[0]} to {lanes.names[-1]}"} if len(lanes.names) > 1 else {}
    facts(f"{algorithm.name} on {config.env}", config.plan() | planned | {"folder": config.output_dir})

    last: dict[str, Array] = {}

    def report(state: RunnerState) -> dict[str, Any]:
        last.update(evaluations(state, eval_keys))
        return _summary(last)

    state, complete = training_loop(
        config,
        state,
        lambda state, index: step(state, index, update_keys),
        total_steps=-(-config.num_updates // config.updates_per_step),
        label=algorithm.name,
        about={"algorithm": algorithm.name},
        evaluate=report,
        show=("timesteps", "episode/return_mean", "eval/greedy_return"),
    )
    if not (last and complete):  # else the loop has evaluated the last state
        report(state)
    figures = {"timesteps": float(state.timesteps.mean())} | _summary(last)
    return figures | _conclude(config, algorithm, lanes, last) if complete else figures


def place(states: RunnerState, config: RunConfig) -> RunnerState:
    """Divides the states of all runs over the devices of a mesh; the compiled program follows where they lie.

    Each device has whole runs, if they divide evenly: then nothing is exchanged. Else `data` and `fsdp` divide the
    environments of every run, and `fsdp` and `tensor` its networks.

    Raises:
        ValueError: If neither divides, or there are not so many devices.
    """
    mesh, runs = parse_mesh(config.mesh), states.update.shape[0]
    if mesh is None:
        return states
    number = num_shards(mesh)
    if number > 1 and runs % number == 0:
        return jax.device_put(states, NamedSharding(mesh, PartitionSpec(ROW_AXES)))
    environments = 0 if states.environments is None else config.num_envs
    meant = f"of a number that divides the runs, {runs}" + (f", or of num_envs={environments}" if environments else "")
    require("mesh", config.mesh, meant, lambda _: number == 1 or (environments > 0 and environments % number == 0))
    by_environment = NamedSharding(mesh, PartitionSpec(None, ROW_AXES))
    rest = shard(states._replace(environments=None), mesh)
    return rest._replace(environments=jax.device_put(states.environments, by_environment))


def make_step(
    config: RunConfig, algorithm: Algorithm, lanes: Lanes
) -> Callable[[RunnerState, int, Key], tuple[RunnerState, dict[str, Any]]]:
    """Makes `step(states, index, keys) -> (states, metrics)`: `updates_per_step` updates of every run.

    The last step of a run does what is left. The states are donated. Compiles once.
    """

    @partial(jax.jit, donate_argnums=0)
    def updates(states: RunnerState, keys: Key, count: Int[Array, ""]) -> tuple[RunnerState, Metrics]:
        def one(state: RunnerState, key: Key, settings: dict[str, Array]) -> tuple[RunnerState, Metrics]:
            return repeat_updates(algorithm, state, dataclasses.replace(config, **settings), key, count)

        states, totals = jax.vmap(one)(states, keys, lanes.settings)
        runs = len(lanes.names)
        metrics = to_means(jax.tree.map(lambda x: x.sum(0), totals), count * runs)
        metrics |= {"timesteps": states.timesteps.mean()}
        if runs > 1:
            each = jax.vmap(to_means, in_axes=(0, None))(totals, count)
            for index, name in enumerate(lanes.names):
                metrics |= {f"{name}/{key}": each[key][index] for key in ("episode/return_mean", "episode/count")}
        return states, metrics

    def step(states: RunnerState, index: int, keys: Key) -> tuple[RunnerState, dict[str, Any]]:
        done = index * config.updates_per_step
        if int(states.update[0]) != done:
            raise ValueError(
                f"updates_per_step={config.updates_per_step} does not go on from the checkpoint, which holds "
                f"{states.update[0]} updates after {index} steps. Resume with the settings of its config.json; a run "
                "whose last step was not a whole one cannot be made longer."
            )
        count = min(config.updates_per_step, config.num_updates - done)
        return updates(states, keys, jnp.array(count))

    return step


def make_evaluation(
    config: RunConfig, algorithm: Algorithm, lanes: Lanes
) -> Callable[[RunnerState, Key], dict[str, Array]]:
    """Makes `evaluate(states, keys) -> {"eval/greedy_return": [runs, episodes], "eval/sampled_return": …}`.

    Starts and samples depend on the keys and on how far training is, not on how it went.
    """
    env, env_params = config.environment()

    def one(state: RunnerState, key: Key, settings: dict[str, Array]) -> dict[str, Array]:
        agent, policies = algorithm.agent(state), algorithm.policies(dataclasses.replace(config, **settings))
        keys = jax.random.split(jax.random.fold_in(key, state.update), len(policies))
        return {
            f"eval/{name}_return": evaluate(policy, agent, key, env, env_params, config.eval_episodes)[0]
            for (name, policy), key in zip(policies.items(), keys, strict=True)
        }

    evaluate_all = jax.jit(jax.vmap(one))
    return lambda states, keys: evaluate_all(states, keys, lanes.settings)


def _summary(returns: dict[str, Array]) -> dict[str, float]:
    return {name: float(x.mean()) for name, x in returns.items()}


def _conclude(config: RunConfig, algorithm: Algorithm, lanes: Lanes, returns: dict[str, Array]) -> dict[str, Any]:
    """Draws and prints what a complete run reached; returns the figures that only such a run has."""
    training = [final_return(config, name if len(lanes.names) > 1 else "") for name in lanes.names]
    columns = {"train/return": training} | {name: x.mean(-1).tolist() for name, x in returns.items()}
    runs = {name: {key: values[i] for key, values in columns.items()} for i, name in enumerate(lanes.names)}
    table(
        f"Mean return of {config.eval_episodes} episodes",
        ["run", *columns],
        [[n, *r.values()] for n, r in runs.items()],
    )
    if config.grid:
        _summarize_grid(config, columns)
    curve = str(draw_learning_curve(config, algorithm, lanes))
    figures = {"train/return": final_return(config), "learning_curve": curve}
    facts("Training", figures)
    return figures | {"runs": runs}


def _summarize_grid(config: RunConfig, columns: dict[str, list[float]]) -> None:
    """Prints, for each point of the grid, mean and standard deviation over its seeds."""
    rows = []
    for index, point in enumerate(config.points()):
        seeds = slice(index * config.num_seeds, (index + 1) * config.num_seeds)
        parts = [np.array(values[seeds]) for values in columns.values()]
        cells = [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" if len(x) > 1 else f"{x.mean():.1f}" for x in parts]
        rows.append([" ".join(f"{name}={value:.9g}" for name, value in point.items()), *cells])
    table(f"Mean ± standard deviation over {config.num_seeds} seeds", ["settings", *columns], rows)


def final_return(config: RunConfig, run: str = "") -> float:
    """Computes the mean return of the episodes that ended in the last tenth of a run's steps, at least in the last one.

    Args:
        config: Settings of the run.
        run: Name of one of several; empty for the mean over all.
    """
    prefix = f"{run}/" if run else ""
    records = [r for r in read_metrics(config.output_dir) if f"{prefix}episode/count" in r]
    last = records[-max(len(records) // 10, 1) :]
    means, counts = ([record[f"{prefix}episode/{name}"] for record in last] for name in ("return_mean", "count"))
    return float(mean_over_episodes(jnp.array(means), jnp.array(counts)))


def draw_learning_curve(config: RunConfig, algorithm: Algorithm, lanes: Lanes) -> Path:
    """Draws returns, training and evaluation, into `<output_dir>/learning_curve.png`.

    Several seeds are drawn as their mean with a 95 % interval, a line for each point of the grid.
    """
    path = Path(config.output_dir) / "learning_curve.png"
    panels = {
        "Evaluation (return)": [f"eval/{name}_return" for name in algorithm.policies(config)],
        **algorithm.show,
    }
    bands = {}
    if len(lanes.names) > 1:
        groups = [lanes.names[i : i + config.num_seeds] for i in range(0, len(lanes.names), config.num_seeds)]
        bands = {group[0].rpartition("/")[0] or "mean": [f"{n}/episode/return_mean" for n in group] for group in groups}
    else:
        panels = {"Episodes that ended in training (return)": ["episode/return_mean"]} | panels
    x_label = f"step of the run ({config.updates_per_step} updates each)"
    title = "Episodes that ended in training (return)"
    plot_metrics(config.output_dir, panels, path, x_label=x_label, bands={title: bands} if bands else None)
    return path
