"""Proximal policy optimization (PPO) on text, as in RLHF: a critic, GAE over tokens, and the KL in the reward.

    jaxrl-llm ppo --model runs/sft/model --dataset prompts.jsonl --reward-funcs reward_model:runs/reward_model/model

The score of a completion is paid at its last token; every token pays `kl_coef` × its KL to the starting model. A value
function, a head on the policy or a network of its own, says what is still to come.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.divergences import KLEstimator
from jaxrl_llm.losses import ppo_loss, update_kl_coef
from jaxrl_llm.losses.coefficients import KLCoefState, init_kl_coef
from jaxrl_llm.optimizers.first_order import ScheduleName
from jaxrl_llm.recipes.options import LearningRates, require
from jaxrl_llm.recipes.text.critic import ActorCriticParams, ValueNetwork, make_critic
from jaxrl_llm.recipes.text.experience import (
    Experience,
    Policy,
    Rollout,
    completion_kl,
    gather_experience,
    in_parts,
    sampling_metrics,
)
from jaxrl_llm.recipes.text.iteration import Method
from jaxrl_llm.recipes.text.language_model import LanguageModel
from jaxrl_llm.recipes.text.online import FirstOrderOptions, run_first_order
from jaxrl_llm.reductions import LossWeights, loss_weights, masked_mean
from jaxrl_llm.rewards.credit import penalize_missing_eos, response_advantages, token_rewards
from jaxrl_llm.training.parallel import parse_mesh
from jaxrl_llm.types import Key, Mask, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FirstOrderOptions):
    """Settings of PPO."""

    output_dir: str = "runs/ppo"
    """Folder for metrics, checkpoints and the trained model."""
    num_prompts: int = 256
    """Prompts of an iteration."""
    num_generations: int = 1
    """Completions of each prompt."""
    num_iterations: int = 4
    """Passes of updates over the completions of one iteration."""
    value_network: ValueNetwork = "separate"
    """`separate`: a network of its own; `shared`: a head on the policy, half the memory."""
    value_model: str = ""
    """Folder of a reward model that a separate value network begins as; empty: a copy of the policy."""
    kl_coef: float = 0.05
    """Strength of the KL penalty to the starting model, in the reward of each token; 0: no reference model."""
    kl_estimator: KLEstimator = "k1"
    """Estimator of that KL: k1 (unbiased) or k3."""
    target_kl: float | None = None
    """KL of a completion, in nats, that kl_coef is adapted to reach (Ziegler et al., 2019); None: kl_coef stays."""
    kl_horizon: int = 10_000
    """Completions over which an adapted kl_coef changes by up to a fifth."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a completion that does not end."""
    gamma: float = 1.0
    """Discount of a token."""
    lam: float = 0.95
    """λ of GAE."""
    whiten_rewards: bool = False
    """Divide the rewards of tokens by their standard deviation over the batch."""
    cliprange: float = 0.2
    """Half-width of the clip of the ratio."""
    cliprange_value: float | None = 0.2
    """Half-width of the clip of the values, in units of reward; None: no clip."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    learning_rate: float | None = None
    """Peak learning rate; None: TRL's 3e-6, of adapters 3e-5. Small new models need far more."""
    default_learning_rates: ClassVar = LearningRates(new=3e-6, full=3e-6, adapters=3e-5)
    lr_scheduler_type: ScheduleName = "linear"
    """Learning rate after the warm-up."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_optimizer()
    config.validate_online()
    require("cliprange", config.cliprange, "in (0, 1)", lambda e: 0 < e < 1)
    for name in ("cliprange_value", "target_kl"):
        require(name, getattr(config, name), "positive or None", lambda value: value is None or value > 0)
    for name in ("kl_coef", "vf_coef", "missing_eos_penalty", "entropy_coef"):
        require(name, getattr(config, name), "at least 0", lambda value: value >= 0)
    for name in ("gamma", "lam"):
        require(name, getattr(config, name), "in [0, 1]", lambda value: 0 <= value <= 1)
    require("kl_estimator", config.kl_estimator, "k1 or k3 in a reward", lambda name: name in ("k1", "k3"))
    adapts = config.target_kl is None or config.kl_coef > 0
    require("kl_coef", config.kl_coef, f"positive to be adapted to target_kl={config.target_kl}", lambda _: adapts)
    own = config.value_model == "" or config.value_network == "separate"
    require("value_model", config.value_model, "empty where value_network is shared", lambda _: own)
    meant = "shared with LoRA: a network of its own would be a second copy of the model"
    require("value_network", config.value_network, meant, lambda name: name == "shared" or not config.adapts)


def make_method(model: LanguageModel, config: Config) -> Method:
    """Makes what PPO learns from completions and rewards."""
    critic = make_critic(model, config.value_network, config.value_model, mesh=parse_mesh(config.mesh))

    def gather(
        policy: Policy,
        params: ActorCriticParams,
        ref_params: Params | None,
        rollout: Rollout,
        loss_mask: Mask,
        carry: KLCoefState,
    ) -> tuple[Experience, Metrics]:
        scores = rollout.total_rewards(config.reward_weights)
        valid = ~jnp.isnan(scores)
        completions = rollout.completions
        scores = penalize_missing_eos(
            jnp.where(valid, scores, 0),
            completions.ids,
            completions.mask,
            jnp.array(model.eos_ids),
            config.missing_eos_penalty,
        )
        experience = gather_experience(
            policy,
            params.policy,
            ref_params,
            rollout,
            loss_mask & valid[:, None],
            score_old=False,
            parts=config.scoring_parts,
        )
        old_log_probs, old_values, entropy = score_old(policy, params, experience)
        experience = experience._replace(old_log_probs=old_log_probs, old_values=old_values)
        rewards = token_rewards(
            scores,
            completions.mask,
            log_probs=None if ref_params is None else old_log_probs,
            ref_log_probs=experience.ref_log_probs,
            kl_coef=carry.kl_coef,
            kl_estimator=config.kl_estimator,
        )
        advantages = response_advantages(
            rewards,
            old_values,
            experience.loss_mask,
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
        )
        kl = jnp.zeros_like(scores) if ref_params is None else completion_kl(experience, config.kl_estimator)
        entropy = jnp.where(completions.mask, entropy, 0).sum(-1)
        metrics = objective_metrics(scores, rewards, kl, entropy, valid) | {"objective/kl_coef": carry.kl_coef}
        return experience._replace(advantages=advantages.advantages, returns=advantages.returns), metrics

    def score_old(policy: Policy, params: ActorCriticParams, experience: Experience) -> tuple[Array, Array, Array]:
        def some(part: Experience) -> tuple[Array, Array, Array]:
            statistics, values = critic.score(policy, params, part)
            return statistics.log_probs, values, statistics.entropy

        return jax.lax.stop_gradient(in_parts(some, experience, config.scoring_parts))

    def loss(policy: Policy, params: ActorCriticParams, batch: Experience, key: Key) -> tuple[Scalar, Metrics]:
        statistics, values = critic.score(policy, params, batch)
        result, metrics = ppo_loss(
            statistics.log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.loss_mask,
            values=values,
            old_values=batch.old_values,
            returns=batch.returns,
            entropy=statistics.entropy,
            cliprange=config.cliprange,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            entropy_coef=config.entropy_coef,
            weights=batch.weights,
        )
        return result, metrics | sampling_metrics(batch, statistics.log_probs, batch.weights.tokens)

    def weights(batch: Experience, axis_name: str | None) -> LossWeights:
        return loss_weights(batch.loss_mask, "token_mean", axis_name=axis_name)

    def next_carry(carry: KLCoefState, metrics: Metrics) -> KLCoefState:
        if config.target_kl is None:
            return carry
        kl, horizon = metrics["objective/kl"], config.kl_horizon
        return update_kl_coef(carry, kl, config.num_rows, kl_target=config.target_kl, horizon=horizon)

    return Method(
        "ppo",
        gather,
        loss,
        weights,
        start=critic.start,
        policy_params=lambda params: params.policy,
        carry=init_kl_coef(config.kl_coef),
        next_carry=next_carry,
        show=("reward", "eval_reward", "objective/kl", "policy/entropy_avg"),
    )


def objective_metrics(
    scores: Float[Array, " rows"],
    rewards: Float[Array, "rows time"],
    kl: Float[Array, " rows"],
    entropy: Float[Array, " rows"],
    valid: Bool[Array, " rows"],
) -> Metrics:
    """Computes TRL's `objective/…`: means over completions of what is maximised; sums over their tokens."""
    total = rewards.sum(-1)
    return {
        "objective/kl": masked_mean(kl, valid),
        "objective/entropy": masked_mean(entropy, valid),
        "objective/scores": masked_mean(scores, valid),
        "objective/non_score_reward": masked_mean(total - scores, valid),
        "objective/rlhf_reward": masked_mean(total, valid),
    }


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run, as `online.run_online` does.

    Raises:
        ValueError: If a setting, a row of the data or a reward function is wrong.
    """
    validate(config)
    return run_first_order(config, make_method, needs_reference=config.kl_coef > 0)
