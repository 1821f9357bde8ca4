"""Settings that the recipes for environments share, with their checks."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float

from jaxrl_llm.distributions import PolicyOutput
from jaxrl_llm.models import ActorCritic
from jaxrl_llm.optimizers import make_optimizer
from jaxrl_llm.recipes.control.normalization import Moments, init_moments, normalize
from jaxrl_llm.recipes.options import RunOptions, require, require_at_least
from jaxrl_llm.rollouts.registry import make_environment
from jaxrl_llm.rollouts.spaces import actions_of, observation_encoder
from jaxrl_llm.types import Key, Numeric, Params


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

T = TypeVar("T")


def hyperparameters_of(config: Any) -> list[str]:
    """Lists the fields of a Config, or of its class, that may be traced."""
    return [
        field.name for field in dataclasses.fields(config) if field.type in (Hyperparameter, OptionalHyperparameter)
    ]


def traceable(config: type[T]) -> type[T]:
    """Makes a Config a pytree whose leaves are its hyperparameters; a class decorator.

    So `jax.jit(train)(key, config)` compiles once for all their values, and `jax.vmap` maps over them. The other fields are
    the tree's structure.
    """
    leaves = hyperparameters_of(config)
    structure = [field.name for field in dataclasses.fields(cast(Any, config)) if field.name not in leaves]

    def flatten(value: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        named = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in leaves]
        return named, tuple(getattr(value, name) for name in structure)

    def unflatten(static: tuple[Any, ...], values: Iterable[Any]) -> Any:
        value = object.__new__(config)  # jax also puts placeholders here, which no check should see
        for name, item in zip([*leaves, *structure], [*values, *static], strict=True):
            object.__setattr__(value, name, item)
        return value

    jax.tree_util.register_pytree_with_keys(config, flatten, unflatten)
    return config


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlOptions(RunOptions):
    """Where experience comes from, how a run is cut into steps, and the size of the networks."""

    env: str = "CartPole-v1"
    """A gymnax environment, or "package.module:Name" or "file.py:Name" of what makes one."""
    env_params: tuple[str, ...] = ()
    """Changes of the environment's parameters, such as max_steps_in_episode=200."""
    num_envs: int = 4
    """Environments that run side by side."""
    seed: int = 0
    """Seed of the run; of the first, if there are several."""
    num_seeds: int = 1
    """Independent runs at once, with seeds seed, seed + 1, and so on."""
    grid: tuple[str, ...] = ()
    """A sweep: values of settings that may be traced, such as learning_rate=1e-4,3e-4 gamma=0.98,0.99.
    Every combination is run with every seed, all as one program."""
    mesh: str = ""
    """Devices that share the runs, or else the environments of each (not of reinforce and grpo), such as data=4.
    Either way each run is the one that one device makes."""
    updates_per_step: int = 16
    """Updates in one compiled call. That is one step of progress, logging, evaluation and checkpoints."""
    logging_steps: int = 1
    """Always 1: each step writes a line of metrics, means over its updates."""
    eval_steps: int = 20
    """Steps between two evaluations."""
    save_steps: int = 20
    """Steps between two checkpoints; the last step and Ctrl-C save too."""
    eval_episodes: int = 100
    """Episodes of each evaluation, once greedy and once sampled."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Width of each hidden layer."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the hidden layers."""

    def environment(self) -> tuple[Any, Any]:
        """Makes the environment and its parameters."""
        return make_environment(self.env, self.env_params)

    def points(self) -> list[dict[str, float]]:
        """Reads the grid: the changed settings of each of its points; one point without any if there is no grid.

        Raises:
            ValueError: If a setting may not be traced, or a value is no number.
        """
        known = hyperparameters_of(self)
        axes: dict[str, list[float]] = {}
        for text in self.grid:
            name, _, values = text.partition("=")
            name = name.strip().replace("-", "_")
            meant = f"name=value,value,… of {', '.join(known)}"
            require("grid", text, meant, lambda _, name=name: name in known and name not in axes)
            try:
                axes[name] = [float(value) for value in values.split(",")]
            except ValueError as error:
                raise ValueError(f"grid must be {meant}, got {text!r}.") from error
            different = len(np.unique(np.array(axes[name], np.float32))) == len(axes[name])
            require("grid", text, "values that differ from one another", lambda _, different=different: different)
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]

    def validate_control(self) -> None:
        """Checks the values, those of `RunOptions` too."""
        self.validate_run()
        last = 2**31 - self.num_seeds
        require("seed", self.seed, f"at most {last}, which leaves seeds for all runs", lambda seed: seed <= last)
        names = ["num_envs", "num_seeds", "updates_per_step", "eval_episodes"]
        require_at_least(1, **{name: getattr(self, name) for name in names})
        meant = "1: updates_per_step says how many updates a line of metrics stands for"
        require("logging_steps", self.logging_steps, meant, lambda steps: steps == 1)
        require("hidden_sizes", self.hidden_sizes, "widths of at least 1", lambda sizes: all(s >= 1 for s in sizes))
        require("activation", self.activation, f"one of {tuple(ACTIVATIONS)}", lambda name: name in ACTIVATIONS)
        actions_of(*self.environment())
        observation_encoder(*self.environment())


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(ControlOptions):
    """Experience that is counted in steps, whether episodes end or not."""

    total_timesteps: int = 500_000
    """Environment steps of the run, over all environments. Rounded down to whole updates; the run says to how many."""
    num_steps: int = 128
    """Steps in each environment between two updates."""

    @property
    def steps_per_update(self) -> int:
        """Environment steps between two updates."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run; a last one that total_timesteps does not fill is left out."""
        return self.total_timesteps // self.steps_per_update

    def plan(self) -> dict[str, Any]:
        """Tells how many environment steps a run really takes."""
        steps = self.num_updates * self.steps_per_update
        left_out = self.total_timesteps - steps
        return {
            "environment steps": f"{steps:,} = {self.num_updates:,} updates × {self.num_envs} environments × "
            f"{self.num_steps} steps" + (f" ({left_out:,} of total_timesteps fill no update)" if left_out else "")
        }

    def validate_steps(self) -> None:
        """Checks the values, those of `ControlOptions` too."""
        self.validate_control()
        require_at_least(1, total_timesteps=self.total_timesteps, num_steps=self.num_steps)
        size = f"num_envs × num_steps = {self.num_envs} × {self.num_steps} = {self.steps_per_update}"
        meant = f"at least one update, {size}, and below 2³¹"
        require("total_timesteps", self.total_timesteps, meant, lambda n: self.steps_per_update <= n < 2**31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeOptions(ControlOptions):
    """Experience that is counted in whole episodes, all from fresh starts."""

    num_updates: int = 150
    """Updates of the run. How many environment steps they take depends on how long episodes last."""
    num_envs: int = 32
    """Episodes of an update."""
    updates_per_step: int = 5
    """Updates in one compiled call. That is one step of progress, logging, evaluation and checkpoints."""

    def plan(self) -> dict[str, Any]:
        """Tells how many episodes a run plays."""
        episodes = f"{self.num_updates * self.num_envs:,} = {self.num_updates:,} updates × {self.num_envs}"
        return {"episodes": f"{episodes} of at most {int(self.environment()[1].max_steps_in_episode)} steps"}

    def validate_episodes(self) -> None:
        """Checks the values, those of `ControlOptions` too."""
        self.validate_control()
        require_at_least(1, num_updates=self.num_updates)


RunConfig: TypeAlias = StepOptions | EpisodeOptions
"""Settings of a whole run: both tell `num_updates` and `plan()`."""


class Agent(NamedTuple):
    """What acts: parameters of the networks, and the moments that observations are normalised by, or None."""

    params: Params
    observations: Moments | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorCriticOptions(ControlOptions):
    """Policy and value networks, and what they are shown."""

    shared_trunk: bool = False
    """One set of hidden layers for policy and value."""
    normalize_observations: bool = False
    """Show the networks observations with mean 0 and deviation 1, within ±10, by the statistics of all rollouts before."""

    def network(self) -> ActorCritic:
        """Builds the policy and value networks that fit the environment."""
        actions = actions_of(*self.environment())
        return ActorCritic(
            num_actions=actions.size,
            hidden_sizes=self.hidden_sizes,
            activation=ACTIVATIONS[self.activation],
            shared_trunk=self.shared_trunk,
            continuous=actions.continuous,
        )

    def init_params(self, key: Key) -> Params:
        """Makes the parameters of the networks; the key is consumed."""
        _, size = observation_encoder(*self.environment())
        return self.network().init(key, jnp.zeros((1, size)))["params"]

    def init_moments(self) -> Moments | None:
        """Makes the moments of no observations yet, if these are normalised."""
        return init_moments(observation_encoder(*self.environment())[1]) if self.normalize_observations else None

    def features(self, observation: Any, moments: Moments | None = None) -> Float[Array, "*batch features"]:
        """Turns observations into what the networks read."""
        encode, _ = observation_encoder(*self.environment())
        return normalize(moments, encode(observation))

    def forward(self, params: Params, features: Float[Array, "*batch features"]) -> tuple[PolicyOutput, Array]:
        """Runs the networks: the policy's output, and the value."""
        return self.network().apply({"params": params}, features)  # pyright: ignore[reportReturnType]

    def apply(self) -> Callable[[Agent, Any], tuple[PolicyOutput, Array]]:
        """Makes `apply(agent, observation) -> (policy's output, value)`."""
        return lambda agent, observation: self.forward(agent.params, self.features(observation, agent.observations))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstOrderOptions(ActorCriticOptions):
    """How a gradient moves the networks."""

    optim: Literal["adam", "rmsprop", "sgd"] = "adam"
    """Adam, RMSprop (as torch has it) or plain steps."""
    learning_rate: Hyperparameter = 2.5e-4
    """Step size."""
    vf_learning_rate: OptionalHyperparameter = None
    """Step size of the value network; None: learning_rate. Not with a shared trunk."""
    anneal_lr: bool = True
    """Lower the learning rates linearly, from update to update, towards zero."""
    adam_epsilon: Hyperparameter = 1e-5
    """Added to the root of the second moment, by RMSprop too."""
    max_grad_norm: Hyperparameter = 0.5
    """Bound on the global norm of the gradient."""

    def validate_optimizer(self) -> None:
        """Checks the values."""
        positive = dict.fromkeys(("learning_rate", "adam_epsilon", "max_grad_norm"), POSITIVE)
        require_hyperparameters(self, positive | {"vf_learning_rate": POSITIVE_OR_NONE})
        meant = "None with shared_trunk, whose layers serve both"
        require("vf_learning_rate", self.vf_learning_rate, meant, lambda rate: rate is None or not self.shared_trunk)
        require("optim", self.optim, "adam, rmsprop or sgd", lambda name: name in ("adam", "rmsprop", "sgd"))
        unused, default = self.optim == "sgd", FirstOrderOptions.adam_epsilon
        meant = "as it is by default, for plain steps divide by no second moment"
        require("adam_epsilon", self.adam_epsilon, meant, lambda epsilon: not unused or epsilon == default)

    def rate(self, remaining: Numeric = 1.0) -> Numeric:
        """Gives the learning rate of the policy where this share of the run is left."""
        return annealed(self.learning_rate, remaining, self.anneal_lr)

    def optimizer(self, remaining: Numeric = 1.0) -> optax.GradientTransformation:
        """Makes the optimizer of one update. Its state does not depend on the learning rates, new ones each update."""

        def rule(rate: Numeric, norm: Numeric | None = None) -> optax.GradientTransformation:
            rate = annealed(rate, remaining, self.anneal_lr)
            return make_optimizer(self.optim, learning_rate=rate, max_grad_norm=norm, adam_epsilon=self.adam_epsilon)

        if self.vf_learning_rate is None:
            return rule(self.learning_rate, self.max_grad_norm)
        rules: dict[Hashable, optax.GradientTransformation] = {
            "policy": rule(self.learning_rate),
            "value": rule(self.vf_learning_rate),
        }
        apart = optax.partition(rules, lambda params: {k: "value" if k == "value" else "policy" for k in params})
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), apart)  # pyright: ignore[reportArgumentType]


def annealed(value: Numeric, remaining: Numeric, anneal: bool) -> Numeric:
    """Gives a setting where this share of the run is left: fallen linearly towards 0, or as it is."""
    return value * remaining if anneal else value


def require_hyperparameters(config: Any, names: dict[str, tuple[str, Callable[[Any], bool]]]) -> None:
    """Checks several settings: {name: (what was meant, test)}."""
    for name, (meant, holds) in names.items():
        require(name, getattr(config, name), meant, holds)


POSITIVE: tuple[str, Callable[[Any], bool]] = ("positive", lambda value: value > 0)
NOT_NEGATIVE: tuple[str, Callable[[Any], bool]] = ("at least 0", lambda value: value >= 0)
SHARE: tuple[str, Callable[[Any], bool]] = ("in [0, 1]", lambda value: 0 <= value <= 1)
POSITIVE_OR_NONE: tuple[str, Callable[[Any], bool]] = ("positive or None", lambda value: value is None or value > 0)
