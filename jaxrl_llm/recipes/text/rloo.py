"""REINFORCE leave-one-out (RLOO): the baseline of a completion is the mean reward of the others of its prompt.

    jaxrl-llm rloo --model my/gpt2 --dataset prompts.jsonl --reward-funcs my_rewards.py:helpful

The whole completion is one action: its probability is the product over its tokens, and a penalty of `beta` × KL to the
starting model is part of its reward.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxrl_llm.advantages import leave_one_out_advantages
from jaxrl_llm.losses import rloo_loss, rloo_weights
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
from jaxrl_llm.reductions import masked_standardize
from jaxrl_llm.types import Key, Mask, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FirstOrderOptions):
    """Settings of RLOO."""

    output_dir: str = "runs/rloo"
    """Folder for metrics, checkpoints and the trained model."""
    beta: float = 0.05
    """Strength of the KL penalty to the starting model, in the reward; 0: no reference model."""
    epsilon: float = 0.2
    """Half-width of the clip of the ratio."""
    normalize_advantages: bool = False
    """Standardize the advantages over the batch."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_optimizer()
    config.validate_online()
    require_at_least(2, num_generations=config.num_generations)
    require("epsilon", config.epsilon, "in (0, 1)", lambda e: 0 < e < 1)
    require("beta", config.beta, "at least 0", lambda beta: beta >= 0)


def make_method(config: Config) -> Method:
    """Makes what RLOO learns from completions and rewards."""

    def gather(
        policy: Policy, params: Params, ref_params: Params | None, rollout: Rollout, loss_mask: Mask, carry: Any
    ) -> tuple[Experience, Metrics]:
        score_old = config.updates_per_step > 1 or ref_params is not None
        parts = config.scoring_parts
        experience = gather_experience(policy, params, ref_params, rollout, loss_mask, score_old=score_old, parts=parts)
        rewards, metrics = rollout.total_rewards(config.reward_weights), {}
        if ref_params is not None:
            kl = completion_kl(experience)
            rewards, metrics = rewards - config.beta * kl, {"kl": kl.mean()}
        advantages = leave_one_out_advantages(rewards, config.num_generations)
        if config.normalize_advantages:
            advantages = masked_standardize(advantages, ~jnp.isnan(rewards))
        return experience._replace(advantages=advantages), metrics

    def loss(policy: Policy, params: Params, batch: Experience, key: Key) -> tuple[Scalar, Metrics]:
        statistics = policy.score(params, batch)
        result, metrics = rloo_loss(
            statistics.log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.loss_mask,
            entropy=statistics.entropy,
            epsilon=config.epsilon,
            weights=batch.weights,
        )
        return result, metrics | sampling_metrics(batch, statistics.log_probs, batch.weights.tokens)

    return Method("rloo", gather, loss, lambda batch, axis_name: rloo_weights(batch.loss_mask, axis_name=axis_name))


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run, as `online.run_online` does.

    Raises:
        ValueError: If a setting, a row of the data or a reward function is wrong.
    """
    validate(config)
    return run_first_order(config, lambda model, config: make_method(config), needs_reference=config.beta > 0)
