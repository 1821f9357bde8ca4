"""What a policy wrote, and what an update learns from it: arrays with one row for each completion."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.divergences import KLEstimator, kl_estimate
from jaxrl_llm.log_probs import TokenStatistics
from jaxrl_llm.reductions import masked_mean, masked_std, weighted_sum
from jaxrl_llm.rollouts import Completions, score_completions
from jaxrl_llm.rollouts.scoring import Apply, HeadKernel
from jaxrl_llm.types import Mask, Metrics, Numeric, Params, Scalar

T = TypeVar("T")


class Rollout(NamedTuple):
    """Completions and their rewards; those of one prompt are contiguous, the prompt repeated.

    Attributes:
        prompt_ids: Prompts, padded on the left.
        prompt_mask: True for real tokens.
        completions: What was sampled.
        rewards: Of each completion, by each reward function; NaN where one does not apply.
    """

    prompt_ids: Int[Array, "rows prompt_time"]
    prompt_mask: Bool[Array, "rows prompt_time"]
    completions: Completions
    rewards: Float[Array, "rows functions"]

    def total_rewards(self, reward_weights: tuple[float, ...] = ()) -> Float[Array, " rows"]:
        """Adds the weighted rewards up; NaN where none applies."""
        none = jnp.isnan(self.rewards).all(axis=1)
        return jnp.where(none, jnp.nan, jnp.nansum(self.rewards * self.weights(reward_weights)[None], axis=1))

    def weights(self, reward_weights: tuple[float, ...] = ()) -> Float[Array, " functions"]:
        """Makes an array of the weights of the rewards; all 1 where none are given."""
        return jnp.asarray(reward_weights or [1.0] * self.rewards.shape[1], jnp.float32)


class Experience(NamedTuple):
    """What an update learns from; rows may be split into mini-batches, micro-batches and devices.

    Attributes:
        prompt_ids: Prompts, padded on the left.
        prompt_mask: True for real tokens.
        completion_ids: Sampled tokens.
        completion_mask: True up to and including the first EOS.
        loss_mask: True for the tokens that are learned from: those of all completions that count.
        sampler_log_probs: Log-probabilities that the sampler recorded, of the distribution that the loss scores.
        sampling_log_probs: Those of the filtered distribution that was really sampled from.
        advantages: For each completion `[rows]` or token `[rows, time]`; a constant.
        old_log_probs: Under the policy before the update; None where there is one update, whose ratio is one.
        ref_log_probs: Under the reference policy, if there is one.
        old_values: Predictions of the critic before the update, if there is one.
        returns: What they should be.
        carried: A number that the method carries from iteration to iteration (a coefficient), for each row.
        weights: Of the terms of the loss, made from all rows of an update.
    """

    prompt_ids: Int[Array, "rows prompt_time"]
    prompt_mask: Bool[Array, "rows prompt_time"]
    completion_ids: Int[Array, "rows time"]
    completion_mask: Bool[Array, "rows time"]
    loss_mask: Bool[Array, "rows time"]
    sampler_log_probs: Float[Array, "rows time"]
    sampling_log_probs: Float[Array, "rows time"]
    advantages: Any = None
    old_log_probs: Float[Array, "rows time"] | None = None
    ref_log_probs: Float[Array, "rows time"] | None = None
    old_values: Float[Array, "rows time"] | None = None
    returns: Float[Array, "rows time"] | None = None
    carried: Float[Array, " rows"] | None = None
    weights: Any = None

    @property
    def text(self) -> tuple[Array, Array, Array, Array]:
        """Prompts and completions with their masks, as `score_completions` takes them."""
        return self.prompt_ids, self.prompt_mask, self.completion_ids, self.completion_mask


class Policy(NamedTuple):
    """A language model as functions of the parameters that are trained.

    Attributes:
        apply: The model, such as `module.apply`.
        head_kernel: The kernel of its head, from its parameters.
        temperature: Divides the logits, in sampling and in scoring.
        chunk_size: Positions along time whose logits exist at once.
    """

    apply: Apply
    head_kernel: HeadKernel
    temperature: Numeric = 1.0
    chunk_size: int = 128

    def score(self, params: Params, experience: Experience) -> TokenStatistics:
        """Computes statistics of the tokens of the completions."""
        options = {"temperature": self.temperature, "chunk_size": self.chunk_size}
        return score_completions(self.apply, self.head_kernel, params, *experience.text, **options)

    def log_probs(self, params: Params, experience: Experience, parts: int = 1) -> Float[Array, "rows time"]:
        """Computes the log-probability of each token as a constant."""
        return jax.lax.stop_gradient(in_parts(lambda part: self.score(params, part).log_probs, experience, parts))


def in_parts(score: Callable[[Experience], T], experience: Experience, parts: int) -> T:
    """Maps a function over parts of the rows, one after the other: as many at once as an update takes."""
    if parts == 1:
        return score(experience)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), experience)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(score, split))


def gather_experience(
    policy: Policy,
    params: Params,
    ref_params: Params | None,
    rollout: Rollout,
    loss_mask: Mask,
    *,
    score_old: bool,
    parts: int = 1,
) -> Experience:
    """Scores what was sampled under the policy before the update and under the reference.

    Args:
        policy: The model.
        params: Its parameters, those that sampled.
        ref_params: Those of the reference policy; None: there is none.
        rollout: What was sampled.
        loss_mask: Nonzero for the tokens to learn from.
        score_old: Whether log-probabilities before the update are needed: for several updates, or in the reward.
        parts: In how many parts to score the rows.
    """
    completions = rollout.completions
    experience = Experience(
        rollout.prompt_ids,
        rollout.prompt_mask,
        completions.ids,
        completions.mask,
        jnp.asarray(loss_mask) != 0,
        completions.log_probs,
        completions.sampling_log_probs,
    )
    return experience._replace(
        old_log_probs=policy.log_probs(params, experience, parts) if score_old else None,
        ref_log_probs=None if ref_params is None else policy.log_probs(ref_params, experience, parts),
    )


def completion_kl(experience: Experience, estimator: KLEstimator = "k1") -> Float[Array, " rows"]:
    """Estimates the KL of each completion to the reference before the update, in nats (k1 may be negative)."""
    assert experience.old_log_probs is not None
    assert experience.ref_log_probs is not None
    gap = jnp.where(experience.completion_mask, experience.old_log_probs - experience.ref_log_probs, 0)
    return kl_estimate(gap, jnp.zeros_like(gap), estimator).sum(-1)


def sampling_metrics(
    experience: Experience, log_probs: Float[Array, "rows time"], token_weights: Float[Array, "rows time"]
) -> Metrics:
    """Compares the sampler with the trainer: how far their log-probabilities of the same tokens lie apart, in nats.

    Says something of an update only before the parameters have moved.
    """
    gap = jnp.abs(log_probs - experience.sampler_log_probs)
    ratio = jnp.exp(jnp.where(experience.loss_mask, log_probs - experience.sampling_log_probs, 0))
    return jax.lax.stop_gradient(
        {
            "sampling/sampling_logp_difference/mean": weighted_sum(gap, token_weights),
            "sampling/sampling_logp_difference/max": jnp.max(jnp.where(experience.loss_mask, gap, 0)),
            "sampling/importance_sampling_ratio/mean": weighted_sum(ratio, token_weights),
            "sampling/importance_sampling_ratio/min": _or_one(jnp.min(jnp.where(experience.loss_mask, ratio, jnp.inf))),
            "sampling/importance_sampling_ratio/max": _or_one(
                jnp.max(jnp.where(experience.loss_mask, ratio, -jnp.inf))
            ),
        }
    )


def _or_one(ratio: Scalar) -> Scalar:
    """Reads the extreme of no ratios at all as one."""
    return jnp.where(jnp.isfinite(ratio), ratio, 1.0)


def rollout_metrics(
    completions: Completions, rewards: Float[Array, " rows"], group_size: int, ended: Bool[Array, " rows"]
) -> Metrics:
    """Computes what TRL logs of completions and their total rewards; NaN rewards do not count.

    Args:
        completions: What was sampled.
        rewards: Total reward of each completion.
        group_size: Completions of each prompt.
        ended: Whether a completion came to its end, and was not cut.
    """
    valid = ~jnp.isnan(rewards)
    groups, group_valid = rewards.reshape(-1, group_size), valid.reshape(-1, group_size)
    stds = jax.vmap(masked_std)(groups, group_valid)
    # By comparison: the deviation of equal rewards may be a rounding error instead of 0.
    lowest, highest = (jnp.min(jnp.where(group_valid, sign * groups, jnp.inf), axis=1) for sign in (1, -1))
    lengths = completions.mask.sum(-1)
    shortest = jnp.min(jnp.where(ended, lengths, completions.mask.shape[1]))
    return {
        "reward": masked_mean(rewards, valid),
        "reward_std": stds.mean(),
        "frac_reward_zero_std": jnp.mean(lowest >= -highest),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": jnp.mean(~ended),
        "completions/mean_terminated_length": masked_mean(lengths.astype(jnp.float32), ended),
        "completions/min_terminated_length": jnp.where(ended.any(), shortest, 0),
        "completions/max_terminated_length": jnp.max(jnp.where(ended, lengths, 0)),
    }
