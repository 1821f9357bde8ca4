"""Trust region policy optimization (TRPO) on text: the natural gradient, with a bound on how far a step moves the policy.

    jaxrl-llm trpo --model my/gpt2 --dataset prompts.jsonl --reward-funcs my_rewards.py:helpful --max-kl 0.01

Completions and advantages are GRPO's (no critic). The step goes along the natural gradient, found by conjugate gradients
with the Fisher matrix of the distribution over the vocabulary, and is shortened until the exact mean KL of a token from
the policy before it is at most `max_kl` and the surrogate has improved; if no length will do, nothing moves. There is no
learning rate.
"""

import dataclasses
from typing import Any

import optax

from jaxrl_llm.advantages import ScaleRewards, group_relative_advantages
from jaxrl_llm.losses import grpo_loss, grpo_weights
from jaxrl_llm.losses.group_relative import GRPOLossType
from jaxrl_llm.optimizers import natural_gradient, natural_gradient_metrics
from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.recipes.text.experience import Experience, Policy, Rollout, gather_experience, sampling_metrics
from jaxrl_llm.recipes.text.iteration import Method, OnlineOptions
from jaxrl_llm.recipes.text.online import run_online
from jaxrl_llm.reductions import LossWeights
from jaxrl_llm.rollouts import policy_functions
from jaxrl_llm.types import Key, Mask, Metrics, Params, Scalar

LOSS_TYPES: tuple[GRPOLossType, ...] = ("grpo", "bnpo", "dapo", "dr_grpo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnlineOptions):
    """Settings of TRPO."""

    output_dir: str = "runs/trpo"
    """Folder for metrics, checkpoints and the trained model."""
    max_kl: float = 0.01
    """Largest mean KL of a token from the policy before the step, in nats."""
    cg_iters: int = 10
    """Iterations of conjugate gradients."""
    cg_damping: float = 0.1
    """Added to the diagonal of the Fisher matrix."""
    fisher_every: int = 1
    """The Fisher matrix is estimated from every how many-th completion: conjugate gradients take that much less time.
    The KL of the step is that of all completions. Best without a common divisor with `num_generations`."""
    backtrack_coef: float = 0.8
    """Factor between two lengths of the step that are tried."""
    backtrack_iters: int = 10
    """Lengths that are tried at most."""
    accept_ratio: float = 0.0
    """Least improvement of the surrogate, as a share of what its gradient promises."""
    scale_rewards: ScaleRewards = "group"
    """Standard deviation that divides the advantages: of the group, of the batch, or none (Dr. GRPO)."""
    loss_type: GRPOLossType = "dapo"
    """How the surrogate is averaged over tokens: grpo, bnpo, dapo or dr_grpo."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_online()
    require_at_least(2, num_generations=config.num_generations)
    require_at_least(1, cg_iters=config.cg_iters, backtrack_iters=config.backtrack_iters)
    for name in ("num_iterations", "num_minibatches"):
        meant = "1: the trust region is around the policy that sampled, over all it sampled"
        require(name, getattr(config, name), meant, lambda count: count == 1)
    require("max_kl", config.max_kl, "positive", lambda kl: kl > 0)
    require("cg_damping", config.cg_damping, "at least 0", lambda damping: damping >= 0)
    rows = config.num_prompts * config.num_generations
    require("fisher_every", config.fisher_every, f"from 1 to the {rows} completions", lambda every: 1 <= every <= rows)
    require("backtrack_coef", config.backtrack_coef, "in (0, 1)", lambda factor: 0 < factor < 1)
    require("accept_ratio", config.accept_ratio, "in [0, 1)", lambda share: 0 <= share < 1)
    require("loss_type", config.loss_type, f"one of {LOSS_TYPES}", lambda name: name in LOSS_TYPES)


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer that the settings describe."""
    return natural_gradient(
        max_kl=config.max_kl,
        cg_iters=config.cg_iters,
        cg_damping=config.cg_damping,
        backtrack_coef=config.backtrack_coef,
        backtrack_iters=config.backtrack_iters,
        accept_ratio=config.accept_ratio,
    )


def make_method(config: Config) -> Method:
    """Makes what TRPO learns from completions and rewards."""

    def gather(
        policy: Policy, params: Params, ref_params: Params | None, rollout: Rollout, loss_mask: Mask, carry: Any
    ) -> tuple[Experience, Metrics]:
        experience = gather_experience(policy, params, None, rollout, loss_mask, score_old=False)
        rewards = rollout.total_rewards(config.reward_weights)
        advantages = group_relative_advantages(rewards, config.num_generations, scale_rewards=config.scale_rewards)
        return experience._replace(advantages=advantages), {}

    def loss(policy: Policy, params: Params, batch: Experience, key: Key) -> tuple[Scalar, Metrics]:
        statistics = policy.score(params, batch)
        result, metrics = grpo_loss(
            statistics.log_probs,
            None,
            batch.advantages,
            batch.loss_mask,
            entropy=statistics.entropy,
            loss_type=config.loss_type,
            weights=batch.weights,
        )
        return result, metrics | sampling_metrics(batch, statistics.log_probs, batch.weights.tokens)

    def weights(batch: Experience, axis_name: str | None) -> LossWeights:
        length = config.max_completion_length
        return grpo_weights(batch.loss_mask, config.loss_type, max_completion_length=length, axis_name=axis_name)

    def extra_args(policy: Policy, params: Params, batch: Experience, key: Key) -> dict[str, Any]:
        return policy_functions(
            policy.apply,
            policy.head_kernel,
            params,
            *batch.text,
            batch.advantages,
            weights=batch.weights,
            temperature=policy.temperature,
            chunk_size=policy.chunk_size,
            fisher_every=config.fisher_every,
        )

    return Method(
        "trpo",
        gather,
        loss,
        weights,
        extra_args=extra_args,
        optimizer_metrics=natural_gradient_metrics,
        show=("reward", "eval_reward", "trpo/kl", "entropy"),
    )


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run, as `online.run_online` does.

    Raises:
        ValueError: If a setting, a row of the data or a reward function is wrong.
    """
    validate(config)
    return run_online(config, lambda model, config: make_method(config), make_optimizer(config), needs_reference=False)
