"""GRPO, RLOO, REINFORCE, PPO and TRPO on the same sums, from the same model, with equally many completions.

    python -m benchmarks.online_methods tune               # three step sizes for each method, on a seed of its own
    python -m benchmarks.online_methods compare            # accuracy, KL, time and memory of each; 5 seeds in one launch
    python -m benchmarks.online_methods seeds              # GRPO: 8 seeds as one program, with their confidence band
    python -m benchmarks.online_methods sweep              # GRPO: 4 learning rates × 3 values of beta as one program

Task: sums of three one-digit numbers with plus and minus (4,000 of them, 512 held out), a two-layer GPT-2 of width 64 that
SFT has taught a little. The reward is 1 for the right answer, else 0, and is computed in the program, so a whole
iteration is one pure function: here it is scanned over iterations and vmapped over seeds, or over step sizes.

What each method gave is kept in `--runs`: one that was stopped, or has other settings now, is run alone. Time and memory
are measured anew, one run of each method after the other.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.plots import band_curves
from benchmarks.results import FOLDER, record
from jaxrl_llm.data import batch_indices
from jaxrl_llm.recipes.quickstart import HELD_OUT, sft_config
from jaxrl_llm.recipes.quickstart import Config as QuickstartConfig
from jaxrl_llm.recipes.text import grpo, ppo, reinforce, rloo, sft, trpo
from jaxrl_llm.recipes.text.experience import Policy
from jaxrl_llm.recipes.text.iteration import (
    Method,
    OnlineOptions,
    OnlineState,
    make_iteration,
    make_sampler,
    start_state,
)
from jaxrl_llm.recipes.text.language_model import LanguageModel
from jaxrl_llm.recipes.text.online import Parts, load_parts
from jaxrl_llm.rollouts import score_completions
from jaxrl_llm.types import Key, Params

COMMON: dict[str, Any] = {
    "dataset": "sums",
    "eval_fraction": HELD_OUT,
    "reward_funcs": ("jaxrl_llm.rewards:exact_match_tokens",),
    "traceable_rewards": True,
    "num_prompts": 64,
    "num_generations": 8,
    "max_completion_length": 4,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    run: tyro.conf.Positional[str]
    """`tune`, `compare`, `seeds` or `sweep`."""
    runs: Path = Path("runs")
    """Folder for the model of the start."""
    iterations: int = 200
    """Iterations of 64 prompts × 8 completions."""
    seeds: int = 5
    """Runs of each method, in one program; they differ in sampling and in the order of prompts."""
    methods: tuple[str, ...] = ("grpo", "rloo", "reinforce", "ppo", "trpo")
    """Methods to compare."""


STEP_SIZES = {"grpo": 1e-4, "rloo": 1e-4, "reinforce": 1e-4, "ppo": 3e-5, "trpo": 0.03}
"""One of each method's `GRIDS`, not tuned yet: the peak of its learning rate, or TRPO's constant `max_kl`."""
GRIDS = {
    "grpo": (3e-5, 1e-4, 3e-4, 1e-3),
    "rloo": (3e-5, 1e-4, 3e-4, 1e-3),
    "reinforce": (3e-5, 1e-4, 3e-4, 1e-3),
    "ppo": (1e-5, 3e-5, 1e-4, 3e-4),
    "trpo": (0.003, 0.01, 0.03, 0.1),
}
TUNING_SEED = 100


class Contender(NamedTuple):
    """A method with its settings.

    Attributes:
        config: Settings of the recipe.
        make_method: `make_method(model, config)`.
        make_optimizer: `make_optimizer(config)`: what makes the updates.
        step_size: Name of the setting that says how far an update goes.
    """

    config: Any
    make_method: Callable[[LanguageModel, Any], Method]
    make_optimizer: Callable[[Any], optax.GradientTransformation]
    step_size: str = "learning_rate"


def contender(name: str, model: str, iterations: int) -> Contender:
    """Makes a contender: one update for each iteration, but four of PPO, two passes over two mini-batches."""
    common = COMMON | {"model": model, "max_steps": iterations}
    if name == "trpo":
        config = trpo.Config(**common, max_kl=STEP_SIZES[name], fisher_every=5)
        return Contender(config, lambda model, config: trpo.make_method(config), trpo.make_optimizer, "max_kl")
    common |= {
        "learning_rate": STEP_SIZES[name],
        "lr_scheduler_type": "linear",
        "warmup_steps": min(30, iterations // 4),
    }
    recipe, own = {
        "grpo": (grpo, {}),
        "rloo": (rloo, {"beta": 0.0}),
        "reinforce": (reinforce, {}),
        "ppo": (ppo, {"kl_coef": 0.0, "num_iterations": 2, "num_minibatches": 2, "vf_coef": 0.5}),
    }[name]
    config = recipe.Config(**common, **own)
    make = recipe.make_method if name == "ppo" else lambda model, config: recipe.make_method(config)
    return Contender(config, make, lambda config: config.optimizer(iterations * config.updates_per_step))


def teach(config: Config) -> str:
    """Trains the model of the start, the quickstart's first stage; returns its folder."""
    folder = config.runs / "sums_sft"
    if not (folder / "model/config.json").is_file():
        quickstart = sft_config(QuickstartConfig(output_dir=str(config.runs)))
        sft.run(dataclasses.replace(quickstart, output_dir=str(folder)))
    return str(folder / "model")


class Program(NamedTuple):
    """Functions of one run, to be vmapped over seeds.

    Attributes:
        start: The state before the first iteration.
        train: `train(state, indices, key) -> (state, metrics)`, over [iterations, prompts] indices.
        measure: `measure(params, key) -> (accuracy, kl)`: greedy share right, and nats a completion from the start.
        iteration: `iteration(state, indices, key) -> (state, metrics)`.
    """

    start: OnlineState
    train: Callable[..., Any]
    measure: Callable[..., Any]
    iteration: Callable[..., Any]


def make_program(parts: Parts, one: Contender, *, compares: bool = False) -> Program:
    """Puts a run together; numbers of its config may be traced. `compares`: with the model of the start, for beta."""
    config, optimizer = one.config, one.make_optimizer(one.config)
    model, method = parts.model, one.make_method(parts.model, config)
    policy = Policy(model.apply, model.head_kernel)
    ids = {"eos_ids": model.eos_ids, "pad_id": model.pad_id}
    everything = parts.train.batch(np.arange(len(parts.train.tokens)), model.pad_id)
    held_out = parts.held_out.batch(np.arange(len(parts.held_out.tokens)), model.pad_id)
    whole = make_iteration(policy, optimizer, method, parts.rewards.reward, config, **ids)
    reference = model.params

    def iteration(state: OnlineState, indices: jax.Array, key: Key):
        prompts = jax.tree.map(lambda x: x[indices], everything)
        state, metrics, _ = whole(state, prompts, key, reference if compares else None)
        return state, metrics

    def train(state: OnlineState, indices: jax.Array, key: Key):
        return jax.lax.scan(lambda state, chosen: iteration(state, chosen, key), state, indices)

    def completed(params: Params, key: Key, settings: OnlineOptions):
        sample = make_sampler(policy, settings, **ids)
        return sample(method.policy_params(params), key, held_out)

    def measure(params: Params, key: Key):
        greedy = dataclasses.replace(config, num_generations=1, temperature=0.0)
        answers = completed(params, key, greedy)
        accuracy = jnp.mean(parts.rewards.reward(answers, held_out.columns))
        said = completed(params, key, dataclasses.replace(config, num_generations=1))
        text = held_out.ids, held_out.mask, said.ids, said.mask
        scored = [
            score_completions(model.apply, model.head_kernel, p, *text).log_probs
            for p in (method.policy_params(params), reference)
        ]
        return accuracy, jnp.sum(jnp.where(said.mask, scored[0] - scored[1], 0), axis=1).mean()

    start = start_state(method, method.start(jax.random.key(0), jax.tree.map(jnp.copy, model.params)), optimizer)
    return Program(start, train, measure, iteration)


def orders(parts: Parts, iterations: int, seeds: Sequence[int]) -> np.ndarray:
    """Makes the indices of prompts, [iterations, seeds, prompts]: every seed has an order of its own."""
    count, size = len(parts.train.tokens), COMMON["num_prompts"]
    return np.array([[batch_indices(count, size, seed=s, step=i) for s in seeds] for i in range(iterations)])


def learn(parts: Parts, program: Program, config: Config, *, every: int = 10) -> dict[str, Any]:
    """Runs all seeds as one program; returns accuracy and KL [seeds, points], and how long it took."""
    if config.iterations % every:
        raise SystemExit(f"--iterations must be a multiple of {every}, got {config.iterations}.")
    states = jax.tree.map(lambda x: jnp.stack([x] * config.seeds), program.start)
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    indices = orders(parts, config.iterations, range(config.seeds))
    train = jax.jit(jax.vmap(program.train, in_axes=(0, 1, 0)), donate_argnums=0)
    measure = jax.jit(jax.vmap(program.measure, in_axes=(0, None)))
    measured, logs, seconds = [measure(states.train.params, jax.random.key(7))], [], []
    for begin in range(0, config.iterations, every):
        started = time.perf_counter()
        states, metrics = jax.block_until_ready(train(states, indices[begin : begin + every], keys))
        seconds.append(time.perf_counter() - started)
        logs.append(jax.device_get(metrics))
        measured.append(measure(states.train.params, jax.random.key(7)))
        print(f"  {begin + every} iterations, greedy share right {np.asarray(measured[-1][0]).round(3)}", flush=True)
    accuracy, kl = (np.stack([np.asarray(point[i]) for point in measured], axis=1) for i in (0, 1))
    metrics = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *logs)
    return {
        "accuracy": accuracy,
        "kl": kl,
        "metrics": metrics,
        "seconds": float(np.median(seconds[1:] or seconds)) / every,
    }


def single_run_cost(parts: Parts, program: Program) -> dict[str, float]:
    """Measures one run alone: seconds of an iteration (median of 9), and the bytes that its program needs."""
    indices, key = orders(parts, 1, [0])[0, 0], jax.random.key(0)
    compiled = jax.jit(program.iteration, donate_argnums=0).lower(program.start, indices, key).compile()
    memory = compiled.memory_analysis()
    state, times = jax.tree.map(jnp.copy, program.start), []
    for _ in range(10):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, indices, key))
        times.append(time.perf_counter() - started)
    size = sum(x.nbytes for x in jax.tree.leaves(program.start))
    return {
        "seconds_per_iteration": float(np.median(times[1:])),
        "state_megabytes": size / 1e6,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6,
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean over seeds, half of a 95 % interval (Student's t), least and largest."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return {"mean": values.mean(), "half_interval": half, "min": values.min(), "max": values.max()}


def falls(accuracy: np.ndarray) -> dict[str, float]:
    """Tells how far from monotone runs [seeds, points] were: share of intervals in which one fell, and the deepest fall."""
    below_best = np.maximum.accumulate(accuracy, axis=1) - accuracy
    return {"share_of_intervals_that_fell": (np.diff(accuracy) < 0).mean(), "deepest_fall": below_best.max()}


def run_tune(config: Config) -> dict[str, Any]:
    """Runs every method with each of its step sizes, on one seed; returns the greedy share right."""
    model = teach(config)
    figures: dict[str, Any] = {}
    for name in config.methods:
        one = contender(name, model, config.iterations)
        untuned, figures[name] = str(dataclasses.replace(one.config, **{one.step_size: 0.0})), {}
        for size in GRIDS[name]:
            kept = config.runs / f"online_tune/{name}_{size:g}.json"
            result = keep(kept, untuned, functools.partial(try_size, one, config, size))
            figures[name][f"{one.step_size}={size:g}"] = result["accuracy"]
        print(name, figures[name], flush=True)
    return {"iterations": config.iterations} | figures


def try_size(one: Contender, config: Config, size: float) -> dict[str, float]:
    """Trains with one step size on the seed for tuning; returns the greedy share right."""
    ((accuracy, _),) = train_each(one, config, TUNING_SEED, **{one.step_size: (size,)}).values()
    return {"accuracy": accuracy}


def keep(file: Path, settings: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what `file` holds of a run with these settings; runs it, and keeps what it gave, if there is none."""
    held = json.loads(file.read_text()) if file.is_file() else {}
    if held.get("settings") != settings:
        held = {"settings": settings, "result": run()}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(held, default=lambda x: x.tolist()))
    return held["result"]


def train_each(one: Contender, config: Config, seed: int, **grid: Sequence[float]) -> dict[Any, tuple[float, float]]:
    """Trains with each value of some settings, all in one program; returns {value: (greedy share right, KL)}.

    A value is a number, or a tuple where there are several settings.
    """
    parts = load_parts(one.config, jax.random.key(0))
    indices, key = jnp.asarray(orders(parts, config.iterations, [seed])[:, 0]), jax.random.key(seed)

    def trained(*values: jax.Array):
        settings = dataclasses.replace(one.config, **dict(zip(grid, values, strict=True)))
        program = make_program(parts, one._replace(config=settings), compares="beta" in grid)
        state, _ = program.train(program.start, indices, key)
        return program.measure(state.train.params, jax.random.key(7))

    accuracy, kl = jax.jit(jax.vmap(trained))(*map(jnp.array, grid.values()))
    values = zip(*grid.values(), strict=True) if len(grid) > 1 else next(iter(grid.values()))
    return dict(zip(values, zip(accuracy.tolist(), kl.tolist(), strict=True), strict=True))


def run_method(name: str, model: str, config: Config) -> dict[str, Any]:
    """Runs one method with all seeds; returns its figures, and its curves by name."""
    one = contender(name, model, config.iterations)
    parts = load_parts(one.config, jax.random.key(0))
    result = learn(parts, make_program(parts, one), config)
    figures = {
        one.step_size: getattr(one.config, one.step_size),
        "accuracy_before": result["accuracy"][:, 0].mean(),
        "accuracy": spread(result["accuracy"][:, -1]),
        "kl": spread(result["kl"][:, -1]),
        **falls(result["accuracy"]),
    }
    curves = {"accuracy": result["accuracy"], "kl": result["kl"]}
    if name == "trpo":
        steps = result["metrics"]
        figures |= {"largest_kl_of_a_step": steps["trpo/kl"].max(), "steps_accepted": steps["trpo/accepted"].mean()}
        curves["kl_of_steps"] = steps["trpo/kl"]
    return {"figures": figures, "curves": curves}


def run_compare(config: Config) -> dict[str, Any]:
    """Runs every method that has not been run with these settings; then measures what each costs."""
    model, results, costs = teach(config), {}, {}
    for name in config.methods:
        print(name, flush=True)
        settings = f"{contender(name, model, config.iterations).config}, {config.seeds} seeds"
        run = functools.partial(run_method, name, model, config)
        results[name] = keep(config.runs / f"online_methods/{name}.json", settings, run)
        print(name, results[name]["figures"], flush=True)
    for name in config.methods:
        one = contender(name, model, config.iterations)
        parts = load_parts(one.config, jax.random.key(0))
        costs[name] = single_run_cost(parts, make_program(parts, one))
        print(name, costs[name], flush=True)
    lines = {name.upper(): np.array(result["curves"]["accuracy"]) for name, result in results.items()}
    points = np.linspace(0, config.iterations, next(iter(lines.values())).shape[1])
    title, iteration = f"Sums: {config.seeds} seeds each, mean and 95 % interval", "iteration (512 completions)"
    band_curves(FOLDER / "online_methods.png", lines, points, iteration, "held-out sums right", title)
    if "trpo" in results:
        steps, bound = np.array(results["trpo"]["curves"]["kl_of_steps"]), results["trpo"]["figures"]["max_kl"]
        x, title = np.arange(1, config.iterations + 1), f"TRPO: KL of each step, at most {bound:g}"
        band_curves(FOLDER / "online_trpo_kl.png", {"TRPO": steps}, x, iteration, "KL of a token, nats", title)
    completions = config.iterations * COMMON["num_prompts"] * COMMON["num_generations"]
    return {"completions": completions} | {name: results[name]["figures"] | costs[name] for name in results}


def run_seeds(config: Config) -> dict[str, Any]:
    """GRPO with 8 seeds as one program."""
    config = dataclasses.replace(config, seeds=8)
    one = contender("grpo", teach(config), config.iterations)
    parts = load_parts(one.config, jax.random.key(0))
    result = learn(parts, make_program(parts, one), config)
    points = np.linspace(0, config.iterations, result["accuracy"].shape[1])
    title = "GRPO: 8 seeds as one program, mean and 95 % interval"
    lines = {"GRPO": result["accuracy"]}
    band_curves(FOLDER / "online_seeds.png", lines, points, "iteration (512 completions)", "held-out sums right", title)
    return {
        "accuracy_before": result["accuracy"][:, 0].mean(),
        "accuracy": spread(result["accuracy"][:, -1]),
        "seconds_per_iteration_of_all": result["seconds"],
    }


def run_sweep(config: Config) -> dict[str, Any]:
    """GRPO over learning rates and values of beta as one program."""
    one = contender("grpo", teach(config), config.iterations)
    rates, betas = (1e-4, 3e-4, 1e-3, 2e-3), (0.0, 0.04, 0.2)
    grid = {"learning_rate": [r for r in rates for _ in betas], "beta": [b for _ in rates for b in betas]}
    measured = train_each(one, config, 0, **grid)
    return {f"lr={lr:g} beta={beta:g}": {"accuracy": a, "kl": kl} for (lr, beta), (a, kl) in measured.items()}


RUNS = {"tune": run_tune, "compare": run_compare, "seeds": run_seeds, "sweep": run_sweep}


def main() -> None:
    """Runs one of them, and records the figures."""
    config = tyro.cli(Config, description=__doc__)
    if config.run not in RUNS:
        raise SystemExit(f"There is no run {config.run!r}; there are {', '.join(RUNS)}.")
    print(record(f"online_{config.run}", RUNS[config.run](config), packages=("flax", "optax")))


if __name__ == "__main__":
    main()
