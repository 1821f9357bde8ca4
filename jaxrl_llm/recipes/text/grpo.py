"""Group relative policy optimization (GRPO): sample several completions of each prompt, learn from the better ones.

    jaxrl-llm grpo --model runs/sums/model --reward-funcs exact_match_tokens --traceable-rewards
    jaxrl-llm grpo --model my/gpt2 --dataset prompts.jsonl --reward-funcs my_rewards.py:helpful

One iteration: sample `num_generations` completions of each prompt, reward them, subtract the mean reward of each group
as there is no critic, and update with the clipped surrogate. A reward is any Python function in TRL's signature,
`reward(prompts, completions, **columns) -> list[float | None]`. With `traceable_rewards` it is a JAX function of token
ids, and the whole iteration is one compiled program, which can be vmapped over seeds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from jaxrl_llm.advantages import (
    MultiObjectiveAggregation,
    ScaleRewards,
    drop_zero_std_groups,
    multi_objective_advantages,
)
from jaxrl_llm.divergences import KLEstimator
from jaxrl_llm.losses import grpo_loss, grpo_weights, importance_correction, top_entropy_mask, update_entropy_coef
from jaxrl_llm.losses.coefficients import EntropyCoefState, applied_entropy_coef, init_entropy_coef
from jaxrl_llm.losses.group_relative import GRPOLossType
from jaxrl_llm.losses.ratios import ImportanceSamplingLevel
from jaxrl_llm.losses.selection import CorrectionMode
from jaxrl_llm.recipes.options import require, require_at_least
from jaxrl_llm.recipes.text.experience import Experience, Policy, Rollout, gather_experience, sampling_metrics
from jaxrl_llm.recipes.text.iteration import Method, make_iteration
from jaxrl_llm.recipes.text.online import FirstOrderOptions, run_first_order
from jaxrl_llm.recipes.text.prompts import TraceableReward
from jaxrl_llm.reductions import LossWeights
from jaxrl_llm.types import Key, Mask, Metrics, Params, Scalar

TOKEN_MEANS = ("dapo", "bnpo", "cispo", "vespo")
"""Loss types whose loss is a mean over tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FirstOrderOptions):
    """Settings of GRPO."""

    output_dir: str = "runs/grpo"
    """Folder for metrics, checkpoints and the trained model."""
    scale_rewards: ScaleRewards = "group"
    """Standard deviation that divides the advantages: of the group, of the batch, or none (Dr. GRPO)."""
    multi_objective_aggregation: MultiObjectiveAggregation = "sum_then_normalize"
    """With several rewards: normalize their sum, or each of them, and then sum up (GDPO)."""
    drop_zero_std_groups: bool = False
    """Leave groups whose rewards are all equal out of the means, as DAPO's dynamic sampling does (which draws others)."""
    loss_type: GRPOLossType = "dapo"
    """What is made of ratio and advantage, and how it is averaged over tokens."""
    importance_sampling_level: ImportanceSamplingLevel = "token"
    """Ratio of each token, of the sequence (GSPO), or of the sequence with a gradient for each token (sequence_token)."""
    epsilon: float = 0.2
    """Lower clip of the ratio."""
    epsilon_high: float | None = None
    """Upper clip of the ratio; epsilon if not given. In cispo the largest ratio itself, such as 5."""
    delta: float | None = None
    """Upper bound of the ratio where the advantage is negative."""
    sapo_temperature_pos: float = 1.0
    """Temperature of sapo's gate where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """Temperature of sapo's gate elsewhere."""
    vespo_k_pos: float = 2.0
    """Power of the ratio in vespo where the advantage is not negative."""
    vespo_lambda_pos: float = 3.0
    """How fast large ratios fade in vespo where the advantage is not negative."""
    vespo_k_neg: float = 3.0
    """Power of the ratio in vespo elsewhere."""
    vespo_lambda_neg: float = 2.0
    """How fast large ratios fade in vespo elsewhere."""
    beta: float = 0.0
    """Strength of the KL penalty to the starting model."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of that KL: k2 or k3 (k1 as a penalty does nothing)."""
    use_bias_correction_kl: bool = False
    """Multiply the KL by the ratio."""
    top_entropy_quantile: float = 1.0
    """Learn from this share of the tokens, those of highest entropy."""
    off_policy_mask_threshold: float | None = None
    """Do not learn from bad completions that have become less likely by more than so many nats a token."""
    importance_sampling_mode: CorrectionMode | None = None
    """Correct for filters (top_p …), which let the sampler differ from the policy: truncate or mask the ratio of both."""
    importance_sampling_clip_max: float = 3.0
    """Largest such ratio."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; with use_adaptive_entropy that of the start."""
    use_adaptive_entropy: bool = False
    """Raise or lower the weight of the bonus by entropy_coef_delta, according to entropy_target."""
    entropy_target: float = 0.2
    """Entropy of a token, in nats, that an adaptive bonus holds."""
    entropy_coef_delta: float = 0.005
    """Step of an adaptive weight."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_optimizer()
    config.validate_online()
    require_at_least(2, num_generations=config.num_generations)
    require("epsilon", config.epsilon, "in (0, 1)", lambda e: 0 < e < 1)
    for name in ("epsilon_high", "delta"):
        require(name, getattr(config, name), "positive or None", lambda value: value is None or value > 0)
    for name in ("beta", "entropy_coef", "entropy_coef_delta", "entropy_target"):
        require(name, getattr(config, name), "at least 0", lambda value: value >= 0)
    estimator, corrected = config.kl_estimator, config.use_bias_correction_kl
    meant = "k2 or k3: k1 as a penalty does nothing (but with use_bias_correction_kl)"
    require("kl_estimator", estimator, meant, lambda name: name != "k1" or corrected)
    for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
        require(name, getattr(config, name), "positive", lambda value: value > 0)
    ones_own = config.multi_objective_aggregation == "sum_then_normalize"
    meant = "group with normalize_then_sum, which has its own scale"
    require("scale_rewards", config.scale_rewards, meant, lambda name: name == "group" or ones_own)
    meant = f"false but with sum_then_normalize and one of {TOKEN_MEANS}: the others divide by all rows"
    droppable = ones_own and config.loss_type in TOKEN_MEANS
    require("drop_zero_std_groups", config.drop_zero_std_groups, meant, lambda drops: droppable or not drops)
    require("importance_sampling_clip_max", config.importance_sampling_clip_max, "positive", lambda bound: bound > 0)
    luspo = config.loss_type != "luspo" or config.importance_sampling_level == "sequence"
    require("importance_sampling_level", config.importance_sampling_level, "sequence for luspo", lambda _: luspo)
    cispo = config.loss_type != "cispo" or config.epsilon_high is not None
    require("epsilon_high", config.epsilon_high, "the largest ratio itself for cispo, such as 5", lambda _: cispo)
    share, parts = config.top_entropy_quantile, config.gradient_accumulation_steps
    require("top_entropy_quantile", share, "in [0, 1]", lambda quantile: 0 <= quantile <= 1)
    whole = "1 with top_entropy_quantile: the quantile is one of all tokens of an update"
    require("gradient_accumulation_steps", parts, whole, lambda parts: parts == 1 or share == 1)


def make_method(config: Config) -> Method:
    """Makes what GRPO learns from completions and rewards."""

    def gather(
        policy: Policy, params: Params, ref_params: Params | None, rollout: Rollout, loss_mask: Mask, carry: Any
    ) -> tuple[Experience, Metrics]:
        if config.drop_zero_std_groups:
            rewards = rollout.total_rewards(config.reward_weights)
            loss_mask = loss_mask & drop_zero_std_groups(rewards, config.num_generations).keep[:, None]
        # On a single update the policy is the one that sampled: its ratio is one, by definition.
        score_old = config.updates_per_step > 1 or config.importance_sampling_mode is not None
        parts = config.scoring_parts
        experience = gather_experience(policy, params, ref_params, rollout, loss_mask, score_old=score_old, parts=parts)
        advantages = multi_objective_advantages(
            rollout.rewards,
            config.num_generations,
            reward_weights=rollout.weights(config.reward_weights),
            multi_objective_aggregation=config.multi_objective_aggregation,
            scale_rewards=config.scale_rewards,
        )
        coef = (
            applied_entropy_coef(carry, entropy_target=config.entropy_target) if config.use_adaptive_entropy else None
        )
        carried = None if coef is None else jnp.full(advantages.shape, coef)
        metrics = {} if coef is None else {"entropy_coef": coef}
        return experience._replace(advantages=advantages, carried=carried), metrics

    def loss(policy: Policy, params: Params, batch: Experience, key: Key) -> tuple[Scalar, Metrics]:
        statistics = policy.score(params, batch)
        weights, kept, correction = batch.weights, None, None
        if config.top_entropy_quantile != 1:
            kept = top_entropy_mask(statistics.entropy, batch.loss_mask, config.top_entropy_quantile)
            weights = make_weights(batch.loss_mask, kept)
        if config.importance_sampling_mode is not None and batch.old_log_probs is not None:
            correction = importance_correction(
                batch.old_log_probs,
                batch.sampling_log_probs,
                batch.loss_mask,
                mode=config.importance_sampling_mode,
                clip_max=config.importance_sampling_clip_max,
            )
        result, metrics = grpo_loss(
            statistics.log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.loss_mask,
            ref_log_probs=batch.ref_log_probs,
            entropy=statistics.entropy,
            sampling_log_probs=batch.sampler_log_probs,
            correction=correction,
            entropy_mask=kept,
            loss_type=config.loss_type,
            importance_sampling_level=config.importance_sampling_level,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            delta=config.delta,
            sapo_temperature_pos=config.sapo_temperature_pos,
            sapo_temperature_neg=config.sapo_temperature_neg,
            vespo_k_pos=config.vespo_k_pos,
            vespo_lambda_pos=config.vespo_lambda_pos,
            vespo_k_neg=config.vespo_k_neg,
            vespo_lambda_neg=config.vespo_lambda_neg,
            beta=config.beta,
            kl_estimator=config.kl_estimator,
            use_bias_correction_kl=config.use_bias_correction_kl,
            max_completion_length=config.max_completion_length,
            off_policy_mask_threshold=config.off_policy_mask_threshold,
            entropy_coef=config.entropy_coef if batch.carried is None else batch.carried[0],
            weights=weights,
        )
        return result, metrics | sampling_metrics(batch, statistics.log_probs, weights.tokens)

    def make_weights(mask: Mask, kept: Mask | None = None, axis_name: str | None = None) -> LossWeights:
        length = config.max_completion_length
        options = {"max_completion_length": length, "entropy_mask": kept, "axis_name": axis_name}
        return grpo_weights(mask, config.loss_type, **options)

    def next_carry(carry: EntropyCoefState, metrics: Metrics) -> EntropyCoefState:
        target, delta = config.entropy_target, config.entropy_coef_delta
        return update_entropy_coef(carry, metrics["entropy"], entropy_target=target, entropy_coef_delta=delta)

    adapts = {"carry": init_entropy_coef(config.entropy_coef), "next_carry": next_carry}
    return Method(
        "grpo",
        gather,
        loss,
        lambda batch, axis_name: make_weights(batch.loss_mask, None, axis_name),
        **(adapts if config.use_adaptive_entropy else {}),
    )


def make_grpo_iteration(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    reward: TraceableReward,
    config: Config,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
):
    """Makes a whole iteration of GRPO as one pure function, see `iteration.make_iteration`.

    It is `iteration(state, prompts, key, ref_params=None) -> (state, metrics, rollout)`, with a state from
    `iteration.start_state(make_method(config), params, optimizer)`.
    """
    return make_iteration(policy, optimizer, make_method(config), reward, config, eos_ids=eos_ids, pad_id=pad_id)


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `model` (folder of the trained model), and the mean reward of greedy completions of held-out prompts before and
        after: `eval_reward_before`, `eval_reward`.

    Raises:
        ValueError: If a setting, a row of the data or a reward function is wrong.
    """
    validate(config)
    return run_first_order(config, lambda model, config: make_method(config), needs_reference=config.beta > 0)
