"""REINFORCE on text: each token of a completion becomes more likely by how much better it did than a baseline.

    jaxrl-llm reinforce --model my/gpt2 --dataset prompts.jsonl --reward-funcs my_rewards.py:helpful
    jaxrl-llm reinforce --baseline none --normalize-advantages --kl-coef 0.01          # REINFORCE++

There is no critic and no clip, so every completion serves one update. With `kl_coef` each token pays for its KL to the
starting model out of its own reward.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages import leave_one_out_advantages, token_returns
from jaxrl_llm.divergences import KLEstimator
from jaxrl_llm.losses import policy_gradient_loss
from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.recipes.text.experience import (
    Experience,
    Policy,
    Rollout,
    completion_kl,
    gather_experience,
    sampling_metrics,
)
from jaxrl_llm.recipes.text.iteration import Method
from jaxrl_llm.recipes.text.online import FirstOrderOptions, run_first_order
from jaxrl_llm.reductions import LossWeights, Reduction, loss_weights, masked_mean, masked_standardize
from jaxrl_llm.rewards.credit import token_rewards
from jaxrl_llm.types import Key, Mask, Metrics, Params, Scalar

Baseline: TypeAlias = Literal["batch", "group", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FirstOrderOptions):
    """Settings of REINFORCE."""

    output_dir: str = "runs/reinforce"
    """Folder for metrics, checkpoints and the trained model."""
    baseline: Baseline = "batch"
    """What is taken off a reward: the mean of all rewards, of the other completions of the prompt (`group`), or nothing."""
    normalize_advantages: bool = False
    """Standardize the advantages of all tokens over the batch (REINFORCE++)."""
    kl_coef: float = 0.0
    """Strength of the KL penalty to the starting model, in the reward of each token; 0: no reference model."""
    kl_estimator: KLEstimator = "k1"
    """Estimator of that KL: k1 (unbiased) or k3."""
    gamma: float = 1.0
    """Discount of a token."""
    reduction: Reduction = "sequence_sum"
    """How the loss is averaged: `sequence_sum` is REINFORCE, the mean over completions of their whole log-probability."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_optimizer()
    config.validate_online()
    once = "1: without a ratio every completion serves one update"
    for name in ("num_iterations", "num_minibatches"):
        require(name, getattr(config, name), once, lambda count: count == 1)
    require("gamma", config.gamma, "in [0, 1]", lambda value: 0 <= value <= 1)
    for name in ("kl_coef", "entropy_coef"):
        require(name, getattr(config, name), "at least 0", lambda value: value >= 0)
    require("kl_estimator", config.kl_estimator, "k1 or k3 in a reward", lambda name: name in ("k1", "k3"))
    if config.baseline == "group":
        require_at_least(2, num_generations=config.num_generations)


def make_method(config: Config) -> Method:
    """Makes what REINFORCE learns from completions and rewards."""

    def gather(
        policy: Policy, params: Params, ref_params: Params | None, rollout: Rollout, loss_mask: Mask, carry: Any
    ) -> tuple[Experience, Metrics]:
        scores = rollout.total_rewards(config.reward_weights)
        valid = ~jnp.isnan(scores)
        loss_mask = loss_mask & valid[:, None]
        penalized = ref_params is not None
        options = {"score_old": penalized, "parts": config.scoring_parts}
        experience = gather_experience(policy, params, ref_params, rollout, loss_mask, **options)
        rewards = token_rewards(
            take_baseline(jnp.where(valid, scores, 0), valid, config),
            rollout.completions.mask,
            log_probs=experience.old_log_probs,
            ref_log_probs=experience.ref_log_probs,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
        )
        advantages = token_returns(rewards, loss_mask, gamma=config.gamma)
        if config.normalize_advantages:
            advantages = masked_standardize(advantages, loss_mask)
        metrics = {"kl": completion_kl(experience).mean()} if penalized else {}
        # There is no ratio: the policy that is trained is the one that sampled.
        return experience._replace(advantages=advantages, old_log_probs=None), metrics

    def loss(policy: Policy, params: Params, batch: Experience, key: Key) -> tuple[Scalar, Metrics]:
        statistics = policy.score(params, batch)
        result, metrics = policy_gradient_loss(
            statistics.log_probs,
            batch.advantages,
            batch.loss_mask,
            entropy=statistics.entropy,
            entropy_coef=config.entropy_coef,
            weights=batch.weights,
        )
        return result, metrics | sampling_metrics(batch, statistics.log_probs, batch.weights.tokens)

    def weights(batch: Experience, axis_name: str | None) -> LossWeights:
        length = config.max_completion_length
        return loss_weights(batch.loss_mask, config.reduction, max_length=length, axis_name=axis_name)

    show = ("reward", "eval_reward", "completions/mean_length", "policy/entropy_avg")
    return Method("reinforce", gather, loss, weights, show=show)


def take_baseline(scores: Float[Array, " rows"], valid: Bool[Array, " rows"], config: Config) -> Float[Array, " rows"]:
    """Subtracts the baseline from the scores of completions."""
    if config.baseline == "batch":
        # From the lowest up, so that equal scores are exactly 0 from their mean, which may be rounded.
        above = jnp.where(valid, scores - jnp.min(jnp.where(valid, scores, jnp.inf)), 0)
        return above - masked_mean(above, valid)
    if config.baseline == "group":
        return leave_one_out_advantages(jnp.where(valid, scores, jnp.nan), config.num_generations)
    return scores


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run, as `online.run_online` does.

    Raises:
        ValueError: If a setting, a row of the data or a reward function is wrong.
    """
    validate(config)
    return run_first_order(config, lambda model, config: make_method(config), needs_reference=config.kl_coef > 0)
