r"""TRPO on a gymnax environment: the largest step along the natural gradient that a bound on the KL divergence allows.

    jaxrl-llm control trpo --env CartPole-v1 --max-kl 0.01

Each update collects a large batch. The policy takes one step (`optimizers.natural_gradient`: conjugate gradients with the
exact Fisher matrix of the batch, then a line search on the exact mean KL and the surrogate), and the value network, which is
a network of its own, follows with `vf_iters` steps of Adam. A line search that fails leaves the policy as it was, to the bit.

References:
    Schulman et al., 2015. https://arxiv.org/abs/1502.05477; the settings are those of OpenAI's Spinning Up.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxrl_llm.distributions import DiagonalGaussian, PolicyOutput, make_distribution
from jaxrl_llm.losses import policy_gradient_loss, value_loss
from jaxrl_llm.optimizers import (
    categorical_fisher,
    gaussian_fisher,
    make_optimizer,
    natural_gradient,
    natural_gradient_metrics,
)
from jaxrl_llm.recipes.control import algorithm, runner
from jaxrl_llm.recipes.control.algorithm import Curves, RunnerState
from jaxrl_llm.recipes.control.on_policy import Batch, OnPolicyOptions, make_algorithm
from jaxrl_llm.recipes.control.options import (
    NOT_NEGATIVE,
    POSITIVE,
    Hyperparameter,
    require_hyperparameters,
    traceable,
)
from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.reductions import masked_standardize
from jaxrl_llm.training import TrainState, init_train_state, make_train_step
from jaxrl_llm.types import Key, Metrics, Numeric, Params, Scalar


@traceable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyOptions):
    """Settings of TRPO. A `Hyperparameter` may be traced; the others shape the program."""

    output_dir: str = "runs/control_trpo"
    """Folder for metrics, checkpoints and the learning curve."""
    total_timesteps: int = 200_000
    """Environment steps of the run, over all environments. Rounded down to whole updates; the run says to how many."""
    num_steps: int = 1000
    """Steps in each environment between two updates."""
    updates_per_step: int = 2
    """Updates in one compiled call. That is one step of progress, logging, evaluation and checkpoints."""
    gae_lambda: Hyperparameter = 0.97
    """λ of the advantage estimates, in [0, 1]: 0 trusts the value function, 1 the observed returns."""
    max_kl: Hyperparameter = 0.01
    """Largest mean KL divergence of a step, in nats."""
    cg_iters: int = 10
    """Iterations of conjugate gradients."""
    cg_damping: Hyperparameter = 0.1
    """Added to the diagonal of the Fisher matrix."""
    backtrack_coef: Hyperparameter = 0.8
    """Factor between two lengths of the step that are tried, in (0, 1)."""
    backtrack_iters: int = 10
    """Lengths that are tried at most."""
    accept_ratio: Hyperparameter = 0.0
    """Least improvement of the surrogate, as a share of what its gradient promises."""
    vf_lr: Hyperparameter = 1e-3
    """Step size of Adam for the value network."""
    vf_iters: int = 80
    """Steps of Adam for the value network in each update, each on the whole batch."""
    normalize_advantage: bool = True
    """Standardise the advantages of an update."""


PRESETS = {"guide": Config(activation="relu", backtrack_coef=0.5, accept_ratio=0.1)}
"""`--preset NAME`: what a widespread tutorial says of TRPO; it is silent about the value network and the size of a batch."""


class Networks(NamedTuple):
    """What TRPO learns: the two networks are optimized apart.

    Attributes:
        policy: All parameters but those of the value network.
        value: Those of the value network.
    """

    policy: TrainState
    value: TrainState

    @property
    def params(self) -> Params:
        """The parameters of both."""
        return self.policy.params | self.value.params


def validate(config: Config) -> None:
    """Checks the values of the settings, which must be plain numbers here.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_on_policy(standardized=config.normalize_advantage)
    require_at_least(1, cg_iters=config.cg_iters, backtrack_iters=config.backtrack_iters, vf_iters=config.vf_iters)
    names = {"max_kl": POSITIVE, "cg_damping": NOT_NEGATIVE, "accept_ratio": NOT_NEGATIVE, "vf_lr": POSITIVE}
    require_hyperparameters(config, names)
    require("backtrack_coef", config.backtrack_coef, "in (0, 1)", lambda factor: 0 < factor < 1)
    meant = "false: the value network would move the policy out of its trust region"
    require("shared_trunk", config.shared_trunk, meant, lambda shared: not shared)


def make_trust_region(config: Config) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer of the policy."""
    return natural_gradient(
        max_kl=config.max_kl,
        cg_iters=config.cg_iters,
        cg_damping=config.cg_damping,
        backtrack_coef=config.backtrack_coef,
        backtrack_iters=config.backtrack_iters,
        accept_ratio=config.accept_ratio,
    )


def _make_networks(params: Params, config: Config) -> Networks:
    policy = {name: tree for name, tree in params.items() if name != "value"}
    value = {"value": params["value"]}
    adam = make_optimizer("adam", learning_rate=config.vf_lr)
    return Networks(init_train_state(policy, make_trust_region(config)), init_train_state(value, adam))


def learn(
    networks: Networks, batch: Batch, config: Config, key: Key, remaining: Numeric = 1.0
) -> tuple[Networks, Metrics]:
    """Takes one step of the policy, and many of the value network.

    Returns:
        The networks, and metrics: `loss/value_avg` of the last value step, `policy/entropy_avg`, `loss/policy_avg` and
        the `trpo/…` of `natural_gradient_metrics`.
    """
    del remaining  # nothing is annealed
    advantage = batch.advantage
    if config.normalize_advantage:
        advantage = masked_standardize(advantage, jnp.ones_like(advantage))
    batch = batch._replace(advantage=advantage)

    def policy_of(params: Params) -> PolicyOutput:
        return config.forward(params | networks.value.params, batch.features)[0]

    def policy_loss(params: Params, batch: Batch, key: Key) -> tuple[Scalar, Metrics]:
        policy = make_distribution(policy_of(params))
        return policy_gradient_loss(policy.log_prob(batch.action), batch.advantage, entropy=policy.entropy())

    def values_loss(params: Params, batch: Batch, key: Key) -> tuple[Scalar, Metrics]:
        _, values = config.forward(networks.policy.params | params, batch.features)
        return value_loss(values, batch.returns)

    policy_step = make_train_step(
        policy_loss,
        make_trust_region(config),
        extra_args_fn=lambda params, batch, key: trust_region_functions(policy_of, params, batch),
        optimizer_metrics_fn=natural_gradient_metrics,
    )
    policy, metrics = policy_step(networks.policy, batch, key)
    value_step = make_train_step(values_loss, make_optimizer("adam", learning_rate=config.vf_lr))

    def fit(value: TrainState, _: None) -> tuple[TrainState, Metrics]:
        return value_step(value, batch, key)

    value, fitted = jax.lax.scan(fit, networks.value, length=config.vf_iters)
    return Networks(policy, value), metrics | {"loss/value_avg": fitted["loss"][-1]}


def trust_region_functions(policy_of: Any, params: Params, batch: Batch) -> dict[str, Any]:
    """Makes what `natural_gradient` needs of a policy: its outputs, their Fisher matrix, the surrogate and the exact KL.

    Args:
        policy_of: `policy_of(params) -> output` of the whole batch.
        params: Before the step.
        batch: What is learned from.
    """
    old = make_distribution(policy_of(params))
    old_log_prob = old.log_prob(batch.action)
    weights = jnp.full(batch.log_prob.shape, 1 / batch.log_prob.size)
    fisher = gaussian_fisher if isinstance(old, DiagonalGaussian) else categorical_fisher

    def evaluate(params: Params) -> tuple[Array, Array]:
        new = make_distribution(policy_of(params))
        ratio = jnp.exp(new.log_prob(batch.action) - old_log_prob)
        return jnp.mean(ratio * batch.advantage), jnp.mean(old.kl(new))  # pyright: ignore[reportArgumentType]

    return {
        "distribution_fn": policy_of,
        "fisher_fn": partial(fisher, weights=weights),
        "surrogate_fn": lambda params: evaluate(params)[0],
        "kl_fn": lambda params: evaluate(params)[1],
        "evaluate_fn": evaluate,
    }


ALGORITHM = make_algorithm(
    "trpo",
    validate,
    learn,
    _make_networks,
    show={
        "Entropy of the policy (nats)": ["policy/entropy_avg"],
        "KL divergence of an update (nats)": ["trpo/kl"],
    },
)


def train(key: Key, config: Config) -> tuple[RunnerState, Curves]:
    """Trains from scratch, a pure function: see `ppo.train`."""
    return algorithm.train(ALGORITHM, key, config)


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates, and saves everything to `config.output_dir`; see `runner.run_control` for the figures.

    Raises:
        ValueError: If a setting is wrong.
    """
    return runner.run_control(config, ALGORITHM)
