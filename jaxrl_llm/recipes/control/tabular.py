"""A frozen lake in tables: what dynamic programming knows exactly, and what Q-learning finds out by walking.

    jaxrl-llm control tabular --num-steps 200000

The basics without a network: value iteration reads the transitions and gives the best values there are; Q-learning sees only
the steps that it takes. Both end in a policy, drawn as arrows, whose exact value is shown beside that of a random walk.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.recipes.progress import facts, table
from jaxrl_llm.tabular import (
    FROZEN_LAKE,
    expected_return,
    frozen_lake,
    greedy,
    policy_values,
    q_learning,
    value_iteration,
)

ARROWS = "←↓→↑"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the lake and of Q-learning."""

    lake: tuple[str, ...] = FROZEN_LAKE
    """Rows of the lake, in letters: start S, frozen F, hole H, goal G."""
    is_slippery: bool = True
    """Whether the walker slides to one of the two sides in two of three steps."""
    gamma: float = 0.99
    """Discount, in [0, 1)."""
    num_steps: int = 200_000
    """Steps that Q-learning takes."""
    learning_rate: float = 0.5
    """Step size at the first visit of a state and action, in (0, 1]."""
    decay: float = 0.01
    """How fast the step size falls with visits: learning_rate / (1 + decay × visits)."""
    epsilon: float = 0.3
    """Share of random actions, in [0, 1]."""
    seed: int = 0
    """Seed of the walk."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    require_at_least(1, num_steps=config.num_steps)
    require("gamma", config.gamma, "in [0, 1)", lambda gamma: 0 <= gamma < 1)
    require("learning_rate", config.learning_rate, "in (0, 1]", lambda rate: 0 < rate <= 1)
    require("epsilon", config.epsilon, "in [0, 1]", lambda share: 0 <= share <= 1)
    require("decay", config.decay, "at least 0", lambda decay: decay >= 0)


def run(config: Config) -> dict[str, Any]:
    """Solves the lake, learns it, and prints both.

    Returns:
        Figures: the exact value of the start under the best policy (`optimal`), under the one that Q-learning found
        (`q_learning`), and under a random walk (`random`); `iterations` of value iteration.

    Raises:
        ValueError: If a setting is wrong.
    """
    validate(config)
    lake = frozen_lake(config.lake, is_slippery=config.is_slippery, gamma=config.gamma)
    best = jax.jit(value_iteration)(lake)
    learn = jax.jit(q_learning, static_argnames="num_steps")
    options = {name: getattr(config, name) for name in ("num_steps", "learning_rate", "epsilon", "decay")}
    q = learn(jax.random.key(config.seed), lake, **options)
    policies = {"optimal": best.policy, "q_learning": greedy(q), "random": jnp.full(q.shape, 0.25)}
    for name in ("optimal", "q_learning"):
        _draw(f"{name}: policy and values", config.lake, policies[name], policy_values(lake, policies[name]))
    figures = {name: float(expected_return(lake, policy)) for name, policy in policies.items()}
    figures["iterations"] = int(best.iterations)
    facts("Value of the start", figures)
    return figures


def _draw(title: str, rows: tuple[str, ...], policy: jax.Array, values: jax.Array) -> None:
    """Prints the lake with an arrow and the value of each field; holes and goals as they are."""
    letters = np.array([list(row) for row in rows])
    arrows = np.array(list(ARROWS))[np.argmax(policy, axis=1)].reshape(letters.shape)
    shown = np.asarray(values).reshape(letters.shape)
    cells = [
        [letter if letter in "HG" else f"{arrow} {value:.2f}" for letter, arrow, value in zip(*row, strict=True)]
        for row in zip(letters, arrows, shown, strict=True)
    ]
    table(title, [str(column) for column in range(letters.shape[1])], cells)
