"""Takes an agent of a finished run: plays episodes, tells their returns, and draws one of them.

    jaxrl-llm control play --run-dir runs/control_ppo --agent best --render runs/control_ppo/episode.gif

In code, `load_agent` gives what acts, and `algorithm.policies(config)` the policies to act with.
"""

import dataclasses
import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxrl_llm.recipes.control.algorithm import Algorithm, split_run_key
from jaxrl_llm.recipes.control.runner import make_evaluation, make_lanes
from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.rollouts.environment import evaluate, reset, rollout
from jaxrl_llm.training import checkpoints

PLAY = 1_000_003
"""Folded into the seed: the keys of a run with the same seed are others."""
WITH_PYGAME = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0")
DRAWN = (
    *WITH_PYGAME,
    "Catch-bsuite",
    *(f"{game}-MinAtar" for game in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")),
    *("Pong-misc", "PointRobot-misc", "MetaMaze-misc", "FourRooms-misc"),
)
"""Environments that gymnax draws; of the others the observations are drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Whom to play, and how often."""

    run_dir: str
    """The output_dir of a run."""
    agent: str = "best"
    """Name of one of its agents, such as seed_0, or the one with the best returns."""
    policy: Literal["greedy", "sampled"] = "greedy"
    """How it acts in the episode that is drawn."""
    num_episodes: int = 100
    """Episodes to play with each policy."""
    seed: int = 0
    """Seed of the episodes."""
    render: str = ""
    """A .gif of an episode, or a .png with some of its moments; empty: none."""
    frames: int = 8
    """Moments in a .png."""


class Loaded(NamedTuple):
    """An agent of a run.

    Attributes:
        name: Of the agent.
        agent: The first argument of the policies.
        config: Settings of its run, with its own where there was a grid.
        algorithm: What trained it; `algorithm.policies(config)` makes the policies.
    """

    name: str
    agent: Any
    config: Any
    algorithm: Algorithm


def load_agent(run_dir: str | Path, agent: str = "best") -> Loaded:
    """Loads an agent from the newest checkpoint of a run.

    Args:
        run_dir: The output_dir of the run.
        agent: Its name, or `best`: the one with the highest mean return of the sampled policy.

    Raises:
        ValueError: If the run holds no such agent.
        FileNotFoundError: If there is no run.
    """
    folder = Path(run_dir)
    saved = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if "algorithm" not in saved:
        raise FileNotFoundError(f"run_dir must be the output_dir of a control run, got {str(run_dir)!r}.")
    module = importlib.import_module(f"jaxrl_llm.recipes.control.{saved['algorithm']}")
    known = {field.name for field in dataclasses.fields(module.Config)}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}
    config, algorithm = module.Config(**settings), module.ALGORITHM
    lanes = make_lanes(config)
    names = lanes.names
    require("agent", agent, f"best or one of {', '.join(names)}", lambda name: name in ("best", *names))
    # The evaluations' own keys: not those that the run started and updated with.
    keys = jax.vmap(lambda seed: split_run_key(jax.random.key(seed))[2])(lanes.seeds)
    init = jax.vmap(lambda key, values: algorithm.init(key, dataclasses.replace(config, **values)))
    like = jax.eval_shape(init, keys, lanes.settings)
    states = checkpoints.restore(folder / "checkpoints", like).state
    if agent == "best":
        returns = make_evaluation(config, algorithm, lanes)(states, keys)["eval/sampled_return"].mean(-1)
        agent = names[int(np.argmax(returns))]
    lane = names.index(agent)
    chosen = jax.tree.map(lambda x: x[lane], states)
    own = {name: float(values[lane]) for name, values in lanes.settings.items()}
    return Loaded(agent, algorithm.agent(chosen), dataclasses.replace(config, **own), algorithm)


def run(config: Config) -> dict[str, Any]:
    """Plays and draws.

    Returns:
        Figures: `agent`, and mean and standard deviation of the returns of each policy; `render` (a file).

    Raises:
        ValueError: If a setting is wrong.
        FileNotFoundError: If there is no run.
    """
    require_at_least(1, num_episodes=config.num_episodes, frames=config.frames)
    require("policy", config.policy, "greedy or sampled", lambda name: name in ("greedy", "sampled"))
    require("render", config.render, "a .gif or .png file", lambda n: not n or Path(n).suffix in (".gif", ".png"))
    loaded = load_agent(config.run_dir, config.agent)
    env, env_params = loaded.config.environment()
    policies = loaded.algorithm.policies(loaded.config)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), PLAY), len(policies))
    figures: dict[str, Any] = {"agent": loaded.name}
    for (name, policy), key in zip(policies.items(), keys, strict=True):
        play = jax.jit(partial(evaluate, policy, env=env, env_params=env_params, num_episodes=config.num_episodes))
        returns, lengths = play(loaded.agent, key)
        figures |= {f"{name}/return_mean": float(returns.mean()), f"{name}/return_std": float(returns.std())}
        figures |= {f"{name}/length_mean": float(lengths.mean())}
    if config.render:
        draw_episode(loaded, config)
        figures["render"] = config.render
    facts(f"{loaded.algorithm.name} on {loaded.config.env}", figures)
    return figures


def draw_episode(loaded: Loaded, config: Config) -> None:
    """Plays one episode and draws it into `config.render`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    states, observations, returns = one_episode(loaded, config)
    Path(config.render).parent.mkdir(parents=True, exist_ok=True)
    env, env_params = loaded.config.environment()
    if env.name not in DRAWN:
        _draw_observations(config.render, observations, env.name)
        return
    if env.name in WITH_PYGAME:
        _require_pygame(env.name)
    from gymnax.visualize import Visualizer

    visualizer = Visualizer(env, env_params, states, np.array(returns))
    if config.render.endswith(".gif"):
        visualizer.animate(config.render)
        return
    visualizer.init()
    moments = np.unique(np.linspace(0, len(states) - 1, config.frames).round().astype(int)).tolist()
    _draw_strip(config.render, [_frame(visualizer, moment) for moment in moments])
    plt.close(visualizer.fig)


def _require_pygame(env: str) -> None:
    try:
        importlib.import_module("pygame")
    except ImportError as error:
        raise ValueError(
            f"render needs pygame for {env}, and it is missing: pip install 'jaxrl-llm[render]'."
        ) from error


def one_episode(loaded: Loaded, config: Config) -> tuple[list[Any], list[np.ndarray], list[float]]:
    """Plays one episode; returns the states of the environment, what the agent read, and the return so far."""
    env, env_params = loaded.config.environment()
    policy = loaded.algorithm.policies(loaded.config)[config.policy]
    reset_key, key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), PLAY + 1))
    step = jax.jit(lambda agent, now, key: rollout(policy, agent, key, env, env_params, now, 1))
    now = reset(reset_key, env, env_params, 1)
    states, observations, returns = [], [], []
    for number in range(int(env_params.max_steps_in_episode)):
        states.append(jax.tree.map(lambda x: x[0], now.state))
        observations.append(np.concatenate([np.ravel(x[0]) for x in jax.tree.leaves(now.observation)]))
        now, steps = step(loaded.agent, now, jax.random.fold_in(key, number))
        returns.append(float(steps.episode_return[0, 0]))
        if steps.terminated[0, 0] or steps.truncated[0, 0]:
            break
    return states, observations, returns


def _frame(visualizer: Any, moment: int) -> np.ndarray:
    visualizer.update(moment)
    visualizer.fig.canvas.draw()
    return np.asarray(visualizer.fig.canvas.buffer_rgba()).copy()


def _draw_strip(path: str, frames: list[np.ndarray]) -> None:
    from matplotlib.figure import Figure

    columns = min(4, len(frames))
    rows = -(-len(frames) // columns)
    figure = Figure(figsize=(3 * columns, 2.5 * rows), dpi=100, layout="constrained")
    for index, frame in enumerate(frames, start=1):
        axes = figure.add_subplot(rows, columns, index)
        axes.imshow(frame)
        axes.axis("off")
    figure.savefig(path)


def _draw_observations(path: str, observations: list[np.ndarray], name: str) -> None:
    """Draws what was observed over time, for an environment without a picture; a .gif has one frame then."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.array(observations).T, aspect="auto", interpolation="nearest")
    axes.set(xlabel="step", ylabel="feature", title=f"{name}: what the agent observes")
    figure.colorbar(image)
    figure.savefig(path)
