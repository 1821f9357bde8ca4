"""Settings that the recipes for environments share, with their checks."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array

from jaxrl_llm.models import ActorCritic
from jaxrl_llm.recipes.options import RunOptions, require, require_at_least
from jaxrl_llm.rollouts.environment import make_environment, num_discrete_actions, observation_shape
from jaxrl_llm.types import Numeric, Params


def _number_on_the_command_line(metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """Tells tyro how to read a field that may also hold a traced number."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda strings: None if strings == ["None"] and "None" in metavar else float(strings[0]),
        is_instance=lambda value: isinstance(value, int | float | None),
        str_from_instance=lambda value: [str(value)],
    )


Hyperparameter: TypeAlias = Annotated[Numeric, _number_on_the_command_line("FLOAT")]
"""A field of a Config that may be traced: a number on the command line, a `vmap`ped scalar in a sweep."""

OptionalHyperparameter: TypeAlias = Annotated[Numeric | None, _number_on_the_command_line("FLOAT|None")]
"""The same, or None: then what it governs is left out of the program."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlOptions(RunOptions):
    """Where experience comes from, how it is cut into updates, and which networks learn from it."""

    env: str = "CartPole-v1"
    """A gymnax environment with discrete actions."""
    total_timesteps: int = 500_000
    """Environment steps of the run, over all environments. Rounded down to whole updates; the run says to how many."""
    num_envs: int = 4
    """Environments that run side by side."""
    num_steps: int = 128
    """Steps in each environment between two updates."""
    seed: int = 0
    """Seed of the run; of the first, if there are several."""
    num_seeds: int = 1
    """Independent runs at once, with seeds seed, seed + 1, and so on."""
    updates_per_step: int = 16
    """Updates in one compiled call. That is one step of progress, logging, evaluation and checkpoints."""
    logging_steps: int = 1
    """Steps between two lines of metrics."""
    eval_steps: int = 20
    """Steps between two evaluations."""
    save_steps: int = 20
    """Steps between two checkpoints; the last step and Ctrl-C save too."""
    eval_episodes: int = 100
    """Episodes of each evaluation, once greedy and once sampled."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Width of each hidden layer of the policy and value networks."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the hidden layers."""
    shared_trunk: bool = False
    """One set of hidden layers for policy and value."""

    @property
    def batch_size(self) -> int:
        """Environment steps that one update learns from."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run; a last one that total_timesteps does not fill is left out."""
        return self.total_timesteps // self.batch_size

    def validate_control(self) -> None:
        """Checks the values, those of `RunOptions` too."""
        self.validate_run()
        names = ["total_timesteps", "num_envs", "num_steps", "num_seeds", "updates_per_step", "eval_episodes"]
        require_at_least(1, **{name: getattr(self, name) for name in names})
        require(
            "total_timesteps",
            self.total_timesteps,
            f"at least one update: num_envs × num_steps = {self.num_envs} × {self.num_steps} = {self.batch_size}",
            lambda steps: steps >= self.batch_size,
        )
        require("hidden_sizes", self.hidden_sizes, "widths of at least 1", lambda sizes: all(s >= 1 for s in sizes))
        require("activation", self.activation, f"one of {tuple(ACTIVATIONS)}", lambda name: name in ACTIVATIONS)
        self.network()

    def network(self) -> ActorCritic:
        """Builds the policy and value networks that fit the environment."""
        env, env_params = make_environment(self.env)
        return ActorCritic(
            num_actions=num_discrete_actions(env, env_params),
            hidden_sizes=self.hidden_sizes,
            activation=ACTIVATIONS[self.activation],
            shared_trunk=self.shared_trunk,
            observation_rank=len(observation_shape(env, env_params)),
        )

    def apply(self) -> Callable[[Params, Array], Any]:
        """Makes `apply(params, observation) -> (logits, value)` of these networks."""
        network = self.network()
        return lambda params, observation: network.apply({"params": params}, observation)
