r"""DQN on a gymnax environment with discrete actions: Q-learning with a network, a replay buffer and a target network.

    jaxrl-llm control dqn --env CartPole-v1

The hyperparameters are CleanRL's, but for a buffer ten times as large, sums of three rewards and double DQN: with a small
buffer of good episodes alone the network forgets, from time to time, how the pole falls.

Steps are taken epsilon-greedily and kept; after every `num_steps` of them the network takes `gradient_steps` steps on rows
drawn from all that is kept. The target is $r + \gamma \max Q_{target}$ of the state that a step led to: a time limit does not
end the sum, only termination does. Double DQN (on by default), dueling heads and n-step returns are options. The buffer is
filled by a random policy first (`learning_starts`), so no branch is ever compiled in vain.

References:
    Mnih et al., 2015. https://doi.org/10.1038/nature14236; van Hasselt et al., 2016. https://arxiv.org/abs/1509.06461;
    Wang et al., 2016. https://arxiv.org/abs/1511.06581; Sutton and Barto, 2018, section 7.1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.losses import q_learning_loss
from jaxrl_llm.models import QNetwork
from jaxrl_llm.optimizers import make_optimizer
from jaxrl_llm.recipes.control import algorithm, runner
from jaxrl_llm.recipes.control.algorithm import Algorithm, Curves, RunnerState, count_update
from jaxrl_llm.recipes.control.normalization import Normalizers
from jaxrl_llm.recipes.control.options import (
    ACTIVATIONS,
    POSITIVE,
    POSITIVE_OR_NONE,
    SHARE,
    Hyperparameter,
    OptionalHyperparameter,
    StepOptions,
    annealed,
    require_hyperparameters,
    traceable,
)
from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.rollouts.environment import Policy, episode_metrics, greedy_policy, random_policy, reset, rollout
from jaxrl_llm.rollouts.replay import Experience, ReplayBuffer, add, init_buffer, n_step_experience, sample
from jaxrl_llm.rollouts.spaces import actions_of, observation_encoder
from jaxrl_llm.training import TrainState, init_train_state, make_train_step
from jaxrl_llm.types import Key, Metrics, Numeric, Params, Scalar


@traceable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StepOptions):
    """Settings of DQN. A `Hyperparameter` may be traced; the others shape the program."""

    output_dir: str = "runs/control_dqn"
    """Folder for metrics, checkpoints and the learning curve."""
    total_timesteps: int = 500_000
    """Environment steps of the run, over all environments, with those of `learning_starts`."""
    num_envs: int = 1
    """Environments that run side by side."""
    num_steps: int = 10
    """Steps in each environment between two updates."""
    gradient_steps: int = 1
    """Steps of the optimizer in each update."""
    updates_per_step: int = 1000
    """Updates in one compiled call. That is one step of progress, logging, evaluation and checkpoints."""
    hidden_sizes: tuple[int, ...] = (120, 84)
    """Width of each hidden layer."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation of the hidden layers."""
    learning_rate: Hyperparameter = 2.5e-4
    """Step size of Adam."""
    anneal_lr: bool = False
    """Lower the learning rate linearly, from update to update, towards zero."""
    max_grad_norm: Hyperparameter = 10.0
    """Bound on the global norm of the gradient."""
    gamma: Hyperparameter = 0.99
    """Discount, in [0, 1]."""
    batch_size: int = 128
    """Rows of the buffer that a step of the optimizer learns from."""
    buffer_size: int = 100_000
    """Rows that are kept, the newest."""
    learning_starts: int = 10_000
    """Steps of a random policy before the first update."""
    target_network_frequency: int = 50
    """Updates between two moves of the target network."""
    tau: Hyperparameter = 1.0
    """Share of the network in the target network at each of its moves, in (0, 1]."""
    start_e: Hyperparameter = 1.0
    """Share of random actions at the start."""
    end_e: Hyperparameter = 0.05
    """Share of random actions at the end."""
    exploration_fraction: Hyperparameter = 0.5
    """Share of the updates in which the first falls to the second."""
    double: bool = True
    """Let the network choose the action whose value the target network gives (double DQN)."""
    dueling: bool = False
    """Split the network into a value and advantages."""
    n_step: int = 3
    """Rewards that are summed before the value of the state reached, at most num_steps.
    The end of an episode, or of the steps between two updates, ends the sum earlier."""
    huber_delta: OptionalHyperparameter = None
    """Error beyond which the loss grows linearly; None: squares all the way."""

    @property
    def warmup_steps(self) -> int:
        """Steps in each environment before the first update."""
        return -(-self.learning_starts // self.num_envs)

    @property
    def num_updates(self) -> int:
        """Updates of the run; a last one that total_timesteps does not fill is left out."""
        return (self.total_timesteps - self.warmup_steps * self.num_envs) // self.steps_per_update

    def plan(self) -> dict[str, Any]:
        """Tells how many environment steps a run really takes."""
        first = self.warmup_steps * self.num_envs
        steps = first + self.num_updates * self.steps_per_update
        left_out = self.total_timesteps - steps
        return {
            "environment steps": f"{steps:,} = {first:,} at random + {self.num_updates:,} updates × {self.num_envs} "
            f"environments × {self.num_steps} steps"
            + (f" ({left_out:,} of total_timesteps fill no update)" if left_out else ""),
            "steps of the optimizer": f"{self.num_updates * self.gradient_steps:,}",
        }

    def network(self) -> QNetwork:
        """Builds the network that fits the environment."""
        actions = actions_of(*self.environment())
        return QNetwork(actions.size, self.hidden_sizes, ACTIVATIONS[self.activation], self.dueling)

    def q_values(self, params: Params, observation: Any) -> Float[Array, "*batch actions"]:
        """Computes the value of each action."""
        encode, _ = observation_encoder(*self.environment())
        return self.network().apply({"params": params}, encode(observation))  # pyright: ignore[reportReturnType]

    def optimizer(self, remaining: Numeric = 1.0) -> optax.GradientTransformation:
        """Makes the optimizer of one update. Its state does not depend on the learning rate, a new one each update."""
        rate = annealed(self.learning_rate, remaining, self.anneal_lr)
        return make_optimizer("adam", learning_rate=rate, max_grad_norm=self.max_grad_norm)


class Learner(NamedTuple):
    """What DQN carries.

    Attributes:
        online: The network and its optimizer.
        target: Parameters of the target network.
        buffer: What was experienced.
    """

    online: TrainState
    target: Params
    buffer: ReplayBuffer


class Explorer(NamedTuple):
    """What acts: parameters of the network, and the share of random actions."""

    params: Params
    epsilon: Numeric


def validate(config: Config) -> None:
    """Checks the values of the settings, which must be plain numbers here.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_steps()
    steps = config.num_steps
    require("n_step", config.n_step, f"at most num_steps={steps}", lambda n: n <= steps)
    names = ("gradient_steps", "batch_size", "learning_starts", "target_network_frequency", "n_step")
    require_at_least(1, **{name: getattr(config, name) for name in names})
    env, env_params = config.environment()
    meant = "an environment with discrete actions, for DQN compares them one by one; PPO and TRPO take continuous ones"
    require("env", config.env, meant, lambda _: not actions_of(env, env_params).continuous)
    rows = max(config.steps_per_update, config.warmup_steps * config.num_envs)
    require("buffer_size", config.buffer_size, f"at least the {rows} steps put in at once", lambda size: size >= rows)
    first = config.warmup_steps * config.num_envs
    least = first + config.steps_per_update
    meant = f"at least one update after learning_starts, {first} + {config.steps_per_update}"
    require("total_timesteps", config.total_timesteps, meant, lambda steps: steps >= least)
    require_hyperparameters(config, dict.fromkeys(("learning_rate", "max_grad_norm"), POSITIVE))
    require_hyperparameters(config, dict.fromkeys(("gamma", "start_e", "end_e", "exploration_fraction"), SHARE))
    require_hyperparameters(config, {"huber_delta": POSITIVE_OR_NONE})
    require("tau", config.tau, "in (0, 1]", lambda share: 0 < share <= 1)


def epsilon_greedy(config: Config) -> Policy:
    """Makes the policy that takes a random action with probability epsilon, and else the one with the highest value."""

    def policy(explorer: Explorer, observation: Any, key: Key) -> tuple[Array, Array]:
        random_key, choice_key = jax.random.split(key)
        best = jnp.argmax(config.q_values(explorer.params, observation), axis=-1)
        random, _ = random_policy(*config.environment())(None, observation, random_key)
        explores = jax.random.uniform(choice_key, best.shape) < explorer.epsilon
        return jnp.where(explores, random, best), jnp.zeros(best.shape)

    return policy


def init(key: Key, config: Config) -> RunnerState:
    """Makes the state before the first update, and fills the buffer with steps of a random policy.

    Args:
        key: Consumed.
        config: Settings.
    """
    params_key, reset_key, warmup_key = jax.random.split(key, 3)
    env, env_params = config.environment()
    _, size = observation_encoder(env, env_params)
    params = config.network().init(params_key, jnp.zeros((1, size)))["params"]
    start = reset(reset_key, env, env_params, config.num_envs)
    policy = random_policy(env, env_params)
    environments, steps = rollout(policy, None, warmup_key, env, env_params, start, config.warmup_steps)
    rows = n_step_experience(steps, gamma=config.gamma, n=config.n_step)
    learner = Learner(
        online=init_train_state(params, config.optimizer()),
        target=jax.tree.map(jnp.copy, params),
        buffer=add(init_buffer(rows, config.buffer_size), rows),
    )
    taken = jnp.array(config.warmup_steps * config.num_envs, jnp.int32)
    return RunnerState(learner, environments, Normalizers(), jnp.zeros((), jnp.int32), taken)


def loss_fn(params: Params, rows: Experience, key: Key, *, target: Params, config: Config) -> tuple[Scalar, Metrics]:
    """Computes the loss of some rows; see `losses.q_learning_loss` for the metrics."""
    del key  # nothing is random here
    online = config.q_values(params, rows.next_observation) if config.double else None
    return q_learning_loss(
        config.q_values(params, rows.observation),
        rows.action,
        rows.reward,
        rows.discount,
        config.q_values(target, rows.next_observation),
        next_q_online=online,
        huber_delta=config.huber_delta,
    )


def exploration(state: RunnerState, config: Config) -> Scalar:
    """Computes the share of random actions at this point of the run."""
    share = state.update / config.num_updates
    done = jnp.where(config.exploration_fraction > 0, share / jnp.maximum(config.exploration_fraction, 1e-9), 1.0)
    return config.start_e + (config.end_e - config.start_e) * jnp.clip(done, 0, 1)


def update(state: RunnerState, config: Config, key: Key) -> tuple[RunnerState, Metrics]:
    """Takes num_envs × num_steps steps, and learns from what is kept.

    Args:
        state: From `init`, or the update before.
        config: Settings.
        key: Of this update; consumed.

    Returns:
        The new state, and metrics: means over the steps of the optimizer, those of `episode_metrics`, and
        `exploration/epsilon`.
    """
    env, env_params = config.environment()
    rollout_key, learn_key = jax.random.split(key)
    learner, epsilon = state.train, exploration(state, config)
    assert state.environments is not None
    explorer = Explorer(learner.online.params, epsilon)
    environments, steps = rollout(
        epsilon_greedy(config), explorer, rollout_key, env, env_params, state.environments, config.num_steps
    )
    buffer = add(learner.buffer, n_step_experience(steps, gamma=config.gamma, n=config.n_step))
    target = optax.incremental_update(learner.online.params, learner.target, config.tau)  # pyright: ignore[reportArgumentType]
    moves = state.update % config.target_network_frequency == 0
    target = jax.tree.map(lambda new, old: jnp.where(moves, new, old), target, learner.target)
    remaining = 1 - state.update / config.num_updates

    def objective(params: Params, rows: Experience, key: Key) -> tuple[Scalar, Metrics]:
        return loss_fn(params, rows, key, target=target, config=config)

    step = make_train_step(objective, config.optimizer(remaining))

    def learn(online: TrainState, _: None) -> tuple[TrainState, Metrics]:
        rows = sample(buffer, jax.random.fold_in(learn_key, online.step), config.batch_size)
        return step(online, rows, learn_key)

    online, metrics = jax.lax.scan(learn, learner.online, length=config.gradient_steps)
    metrics = jax.tree.map(lambda x: x.mean(0), metrics) | episode_metrics(steps) | {"exploration/epsilon": epsilon}
    new = state._replace(train=Learner(online, target, buffer), environments=environments)
    return count_update(new, config.steps_per_update), metrics


ALGORITHM = Algorithm(
    "dqn",
    validate,
    init,
    update,
    agent=lambda state: Explorer(state.train.online.params, 0.0),
    policies=lambda config: {"greedy": greedy_policy(_apply(config)), "sampled": _at_the_end(config)},
    show={"Mean value of the actions learned from": ["val/q_avg"]},
)


def _apply(config: Config) -> Callable[[Explorer, Any], tuple[Array, None]]:
    """Makes what `greedy_policy` takes the best action of."""
    return lambda explorer, observation: (config.q_values(explorer.params, observation), None)


def _at_the_end(config: Config) -> Policy:
    """Makes the policy that explores as it does at the end of the run."""
    policy = epsilon_greedy(config)
    return lambda explorer, observation, key: policy(explorer._replace(epsilon=config.end_e), observation, key)


def train(key: Key, config: Config) -> tuple[RunnerState, Curves]:
    """Trains from scratch, a pure function: see `ppo.train`."""
    return algorithm.train(ALGORITHM, key, config)


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates, and saves everything to `config.output_dir`; see `runner.run_control` for the figures.

    Raises:
        ValueError: If a setting is wrong.
    """
    return runner.run_control(config, ALGORITHM)
