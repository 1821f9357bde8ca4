"""Algorithms for environments against the published figures: many seeds at once, by one command each.

    python -m benchmarks.control ppo_cartpole               # or another of the cases below
    python -m benchmarks.control truncation                 # the same with the time limit taken for a fall
    python -m benchmarks.control trpo_bounds                # TRPO with three bounds on the KL divergence

All seeds of a case are one compiled program (`jax.vmap(train)`). Reported are the mean return of the episodes that ended in the
last tenth of training (sampled actions), the greedy return of fresh episodes, and, on CartPole, the step at which the last 100
training episodes first had a mean of at least 475, and that at which the episodes of one update had.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from gymnax.environments.classic_control.cartpole import CartPole

from benchmarks.plots import band_curves
from benchmarks.results import FOLDER, record
from jaxrl_llm.recipes.control import a2c, dqn, grpo, ppo, reinforce, trpo
from jaxrl_llm.recipes.options import RunOptions
from jaxrl_llm.rollouts.environment import evaluate, mean_over_episodes

SOLVED = 475
EPISODES = 300


class Conflated(CartPole):
    """CartPole-v1 that calls its time limit a termination, as code with one flag `done` does."""

    def step(self, key, state, action, params=None):
        """Steps the environment."""
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        return observation, state, reward, terminated | truncated, truncated, info


gymnax.register("CartPole-conflated", Conflated)


class Case(NamedTuple):
    """A run to reach something with.

    Attributes:
        module: The recipe.
        config: Its settings.
        published: What others report, or what is to be reached.
        seeds: How many.
    """

    module: Any
    config: Any
    published: str
    seeds: int = 10


ZOO_PPO = {"num_envs": 8, "num_steps": 32, "num_minibatches": 1, "update_epochs": 20, "ent_coef": 0.0, "vf_coef": 1.0}
"""SB3's value loss has no half before the square, and 0.5 where 1 stands here."""
ZOO_NORMALIZED = {"total_timesteps": 1_000_000, "num_envs": 16, "ent_coef": 0.0, "vf_coef": 1.0}
ZOO_NORMALIZED |= {"normalize_observations": True, "normalize_rewards": True}
CASES: dict[str, Case] = {
    "ppo_cartpole_default": Case(ppo, ppo.Config(), "CleanRL 490.04 ± 6.12 (sampled, 500k steps)"),
    "ppo_cartpole": Case(ppo, ppo.PRESETS["cleanrl"], "CleanRL 490.04 ± 6.12 (sampled, 500k steps)"),
    "ppo_cartpole_zoo": Case(
        ppo,
        ppo.Config(
            **ZOO_PPO, total_timesteps=100_000, gae_lambda=0.8, gamma=0.98, learning_rate=1e-3, anneal_clip=True
        ),
        "rl-zoo 500 ± 0 (greedy, 100k steps)",
    ),
    "trpo_cartpole": Case(trpo, trpo.Config(), "rl-zoo 500 ± 0 (greedy, 100k steps, other settings)"),
    "grpo_cartpole": Case(grpo, grpo.Config(), "nobody"),
    "reinforce_cartpole": Case(reinforce, reinforce.Config(), "nobody"),
    "a2c_cartpole": Case(a2c, a2c.Config(), "rl-zoo 500 ± 0 (greedy, 500k steps)"),
    "dqn_cartpole": Case(
        dqn, dqn.Config(), "CleanRL 488.69 ± 16.11 (sampled, 500k steps); rl-zoo 500 ± 0 (greedy, 50k steps)"
    ),
    "ppo_guide": Case(ppo, dataclasses.replace(ppo.PRESETS["guide"], total_timesteps=200_000), "no figure"),
    "ppo_guide_shared": Case(
        ppo, dataclasses.replace(ppo.PRESETS["guide-shared"], total_timesteps=200_000), "no figure"
    ),
    "trpo_guide": Case(trpo, trpo.PRESETS["guide"], "no figure"),
    "ppo_pendulum": Case(
        ppo,
        ppo.Config(
            env="Pendulum-v1",
            total_timesteps=100_000,
            num_envs=4,
            num_steps=256,
            update_epochs=10,
            num_minibatches=16,
            gamma=0.97,
            ent_coef=0.0,
            vf_coef=1.0,
            normalize_rewards=True,
            learning_rate=1e-3,
        ),
        "rl-zoo -172 (greedy, 100k steps)",
    ),
    "trpo_pendulum": Case(
        trpo,
        trpo.Config(
            env="Pendulum-v1",
            total_timesteps=200_000,
            num_envs=4,
            num_steps=256,
            gamma=0.95,
            gae_lambda=0.95,
            normalize_rewards=True,
            max_kl=0.005,
        ),
        "rl-zoo -174.6 (greedy, 100k steps)",
    ),
    "ppo_acrobot": Case(
        ppo,
        ppo.Config(
            **ZOO_NORMALIZED,
            env="Acrobot-v1",
            num_steps=256,
            gae_lambda=0.94,
            learning_rate=3e-4,
            anneal_lr=False,
            num_minibatches=64,
        ),
        "rl-zoo -73.5 (greedy, 1M steps)",
    ),
    "ppo_mountaincar": Case(
        ppo,
        ppo.Config(**ZOO_NORMALIZED, env="MountainCar-v0", num_steps=16, gae_lambda=0.98),
        "rl-zoo -110.4 (greedy, 1M steps)",
    ),
    "ppo_breakout": Case(
        ppo,
        ppo.Config(
            env="Breakout-MinAtar",
            total_timesteps=10_000_000,
            num_envs=64,
            num_steps=128,
            num_minibatches=8,
            activation="relu",
            shared_trunk=True,
            learning_rate=2e-3,
            ent_coef=0.1,
        ),
        "gymnax 28 (PPO, 10M steps)",
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    case: tyro.conf.Positional[str]
    """One of the cases, `truncation`, or `trpo_bounds`."""
    seeds: int = 0
    """Runs, with seeds 0, 1 …; 0: as many as the case has."""


class Result(NamedTuple):
    """What seeds reached.

    Attributes:
        figures: To record.
        steps: Environment steps, evenly spaced.
        curves: Mean return of the last 100 training episodes there, [seeds, steps].
    """

    figures: dict[str, Any]
    steps: np.ndarray
    curves: np.ndarray


def run_case(case: Case, seeds: int) -> Result:
    """Trains and evaluates all seeds of a case."""
    module, config = case.module, case.config
    module.validate(config)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    compiled = jax.jit(jax.vmap(partial(module.train, config=config))).lower(keys).compile()
    started = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(keys))
    seconds = time.perf_counter() - started
    means, counts = (np.asarray(metrics[f"episode/{name}"]) for name in ("return_mean", "count"))
    curves = trailing_means(means, counts)
    steps = steps_of(config, metrics, int(state.timesteps.mean()))
    greedy = greedy_returns(case, state, EPISODES)
    final = last_tenth(means, counts)
    figures = {
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k not in HOST_SIDE},
        "published": case.published,
        "timesteps": float(state.timesteps.mean()),
        "train_return": final,
        "train_return_mean": float(np.mean(final)),
        "greedy_episodes": EPISODES,
        "greedy_return": greedy.mean(1),
        "greedy_return_mean": float(greedy.mean()),
        "seconds": seconds,
        "steps_per_second": float(state.timesteps.sum()) / seconds,
    }
    if "CartPole" in config.env:
        figures |= {"solved_at": first_solved(steps, curves), "update_solved_at": first_solved(steps, means)}
    common = np.linspace(0, steps[:, -1].min(), steps.shape[1])  # whole episodes take each seed another number of steps
    curves = np.stack([np.interp(common, x, y, left=np.nan) for x, y in zip(steps, curves, strict=True)])
    return Result(figures, common, curves)


def first_solved(steps: np.ndarray, curves: np.ndarray) -> list[float | None]:
    """Finds the step at which each curve first reaches `SOLVED`; None where it never does."""
    reached = curves >= SOLVED
    return [float(x[np.argmax(y)]) if y.any() else None for x, y in zip(steps, reached, strict=True)]


HOST_SIDE = {field.name for field in dataclasses.fields(RunOptions)}
HOST_SIDE |= {"grid", "num_seeds", "mesh", "updates_per_step", "eval_episodes"}
"""Settings that `train` does not read."""


def greedy_returns(case: Case, state: Any, episodes: int) -> np.ndarray:
    """Plays greedy episodes with each agent: returns, [seeds, episodes]."""
    algorithm = case.module.ALGORITHM
    env, env_params = case.config.environment()
    policy = algorithm.policies(case.config)["greedy"]

    def one(state: Any, key: jax.Array) -> jax.Array:
        return evaluate(policy, algorithm.agent(state), key, env, env_params, episodes)[0]

    keys = jax.random.split(jax.random.key(10_000), state.update.shape[0])
    return np.asarray(jax.jit(jax.vmap(one))(state, keys))


def trailing_means(means: np.ndarray, counts: np.ndarray, window: int = 100) -> np.ndarray:
    """Gives the mean return of the last episodes at each update: of the fewest updates that make up the window; else NaN."""
    sums = np.cumsum(np.where(counts > 0, means * counts, 0), axis=1)
    totals = np.cumsum(counts, axis=1)
    result = np.full(means.shape, np.nan)
    for seed, total in enumerate(totals):
        first = np.searchsorted(total, total - window, side="right") - 1  # the last update before the window
        before = np.where(first >= 0, sums[seed][first], 0), np.where(first >= 0, total[first], 0)
        enough = total >= window
        result[seed] = np.where(enough, (sums[seed] - before[0]) / np.maximum(total - before[1], 1), np.nan)
    return result


def last_tenth(means: np.ndarray, counts: np.ndarray) -> list[float]:
    """Gives the mean return of the episodes that ended in the last tenth of the updates, for each seed."""
    last = slice(-max(means.shape[1] // 10, 1), None)
    return mean_over_episodes(jnp.array(means[:, last]), jnp.array(counts[:, last])).tolist()


def steps_of(config: Any, metrics: dict[str, Any], total: int) -> np.ndarray:
    """Gives environment steps at each update, [seeds, updates]."""
    counts = np.asarray(metrics["episode/count"])
    if hasattr(config, "total_timesteps"):
        first = total - config.num_updates * config.steps_per_update
        return np.broadcast_to(first + config.steps_per_update * np.arange(1, counts.shape[1] + 1), counts.shape)
    return np.cumsum(np.asarray(metrics["episode/length_mean"]) * counts, axis=1)


def run_one(name: str, seeds: int) -> dict[str, Any]:
    """Runs a case; draws its curve."""
    case = CASES[name]
    seeds = seeds or case.seeds
    result = run_case(case, seeds)
    title = f"{name}: {seeds} seeds, mean and 95 % interval"
    draw(name, {name: result}, title)
    return result.figures


def draw(name: str, results: dict[str, Result], title: str) -> None:
    """Draws the trailing returns of results that have the same steps, from where all seeds have 100 episodes."""
    first = next(iter(results.values()))
    begin = int(np.argmax(np.isfinite(np.concatenate([r.curves for r in results.values()])).all(0)))
    thin = slice(begin, None, max(first.curves.shape[1] // 400, 1))
    lines = {label: result.curves[:, thin] for label, result in results.items()}
    y = "mean return of the last 100 training episodes"
    band_curves(FOLDER / f"control_{name}.png", lines, first.steps[thin], "environment steps", y, title)


def run_several(name: str, seeds: int) -> dict[str, Any]:
    """Runs variants of a case, and draws them together."""
    base, variants = VARIANTS[name]
    case = CASES[base]
    seeds = seeds or case.seeds
    results = {}
    for label, changes in variants.items():
        changed = case._replace(config=dataclasses.replace(case.config, **changes))
        results[label] = run_case(changed, seeds)
        print(label, results[label].figures, flush=True)
    draw(name, results, f"{base}: {seeds} seeds each, mean and 95 % interval")
    return {label: result.figures for label, result in results.items()}


VARIANTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "truncation": ("ppo_cartpole", {"bootstrapped": {}, "taken for a fall": {"env": "CartPole-conflated"}}),
    "trpo_bounds": ("trpo_cartpole", {f"δ = {bound:g}": {"max_kl": bound} for bound in (0.001, 0.01, 0.1)}),
}


def main() -> None:
    """Runs one of them, and records the figures."""
    config = tyro.cli(Config, description=__doc__)
    if config.case not in (*CASES, *VARIANTS):
        raise SystemExit(f"There is no case {config.case!r}; there are {', '.join((*CASES, *VARIANTS))}.")
    run: Callable[[str, int], dict[str, Any]] = run_several if config.case in VARIANTS else run_one
    figures = run(config.case, config.seeds)
    print(figures)
    print(record(f"control_{config.case}", figures, packages=("gymnax", "flax", "optax")))


if __name__ == "__main__":
    main()
