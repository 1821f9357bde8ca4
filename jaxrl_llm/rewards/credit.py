"""From scores of completions to what PPO learns from, in jax: rewards and advantages of tokens, `[batch, time]`.

The score of a completion stands at its last token. TRL's PPO put it one position past that, where it also asked the
critic for a value: `score_position="after_last"` does the same.
"""

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages import generalized_advantages
from jaxrl_llm.divergences import KLEstimator, kl_estimate
from jaxrl_llm.reductions import masked_standardize
from jaxrl_llm.types import Mask, Numeric

ScorePosition: TypeAlias = Literal["last", "after_last"]


def step_mask(mask: Mask, score_position: ScorePosition = "last") -> Bool[Array, "batch time"]:
    """Marks the positions that have rewards and values: those of the response, and one past it for `after_last`.

    A response that fills its row has no room for another position, and an empty one no last token.

    Raises:
        ValueError: If `score_position` is unknown.
    """
    mask = jnp.asarray(mask) != 0
    if score_position == "last":
        return mask
    if score_position != "after_last":
        raise ValueError(f"score_position must be one of {get_args(ScorePosition)}, got {score_position!r}.")
    return mask | (jnp.pad(_last(mask), ((0, 0), (1, 0)))[:, :-1])


def _last(mask: Array) -> Array:
    """Marks the last unmasked position of each row."""
    return mask & (jnp.cumsum(mask, axis=-1) == mask.sum(-1, keepdims=True))


def token_rewards(
    scores: Float[Array, " batch"] | Int[Array, " batch"],
    mask: Mask,
    *,
    log_probs: Float[Array, "batch time"] | None = None,
    ref_log_probs: Float[Array, "batch time"] | None = None,
    kl_coef: Numeric = 0.05,
    kl_estimator: KLEstimator = "k1",
    score_position: ScorePosition = "last",
) -> Float[Array, "batch time"]:
    r"""Computes the rewards of tokens: the score at the end, less a penalty of $\beta\,\mathrm{KL}_t$ at each.

    Args:
        scores: Of each completion, in units of reward.
        mask: Nonzero at response tokens, up to and including the first EOS.
        log_probs: Of the tokens under the policy that sampled, nats; constants. Without them there is no penalty.
        ref_log_probs: The same under the reference.
        kl_coef: β, in units of reward a nat.
        kl_estimator: `k1` (unbiased, either sign) or `k3` (unbiased, never negative). Both are right in a reward.
        score_position: `last` token, or `after_last`.

    Raises:
        ValueError: If one of the two log-probabilities is missing, or a name is unknown.

    References:
        Ziegler et al., 2019, eq. 2. https://arxiv.org/abs/1909.08593
    """
    if (log_probs is None) != (ref_log_probs is None):
        raise ValueError("The KL penalty needs log_probs and ref_log_probs; got one of them.")
    mask = jnp.asarray(mask) != 0
    end = _last(step_mask(mask, score_position))
    # In floating point whatever came: integers would cut a fraction of the penalty off.
    scores = jnp.asarray(scores, jnp.promote_types(scores.dtype, jnp.float32))
    rewards = jnp.where(end, scores[:, None], 0)
    if log_probs is not None and ref_log_probs is not None:
        difference = jnp.where(mask, log_probs - ref_log_probs, 0)
        rewards -= kl_coef * kl_estimate(difference, jnp.zeros_like(difference), kl_estimator)
    return jax.lax.stop_gradient(rewards)


def penalize_missing_eos(
    scores: Float[Array, " batch"],
    completion_ids: Int[Array, "batch time"],
    mask: Mask,
    eos_ids: int | Int[Array, "*eos"],
    missing_eos_penalty: Numeric = 1.0,
) -> Float[Array, " batch"]:
    """Subtracts the penalty from the score of every completion without a token that ends it.

    Args:
        scores: Of each completion, in units of reward.
        completion_ids: Tokens of the completions.
        mask: Nonzero at completion tokens.
        eos_ids: The id that ends a completion, or several.
        missing_eos_penalty: In units of reward, at least 0.
    """
    ended = (jnp.isin(completion_ids, jnp.asarray(eos_ids)) & (jnp.asarray(mask) != 0)).any(-1)
    return scores - jnp.where(ended, 0, missing_eos_penalty)


def soft_overlong_punishment(
    lengths: Int[Array, " batch"], *, max_completion_length: Numeric, soft_punish_cache: Numeric
) -> Float[Array, " batch"]:
    r"""Computes DAPO's reward of length: 0, then linearly down to −1 over the last tokens that are allowed.

    $$ \mathrm{clip}\big((L_{max} - L_{cache} - L) / L_{cache},\ -1,\ 0\big) $$

    Args:
        lengths: L, tokens of each completion.
        max_completion_length: $L_{max}$, tokens.
        soft_punish_cache: $L_{cache}$, tokens over which the punishment grows; 0 for a step after $L_{max}$.

    Example:
        >>> lengths = jnp.array([50, 90, 110])
        >>> soft_overlong_punishment(lengths, max_completion_length=100, soft_punish_cache=20).tolist()
        [0.0, -0.5, -1.0]

    References:
        Yu et al., 2025, eq. 13. https://arxiv.org/abs/2503.14476
    """
    room = max_completion_length - jnp.asarray(lengths, jnp.result_type(float))
    cache = jnp.asarray(soft_punish_cache, room.dtype)
    slope = jnp.clip((room - cache) / jnp.where(cache > 0, cache, 1), -1, 0)
    return jnp.where(room < 0, -1, jnp.where(cache > 0, slope, 0))


class ResponseAdvantages(NamedTuple):
    """What PPO learns from.

    Attributes:
        advantages: Of each response token; 0 elsewhere.
        returns: Targets of the critic; 0 elsewhere.
        value_mask: Where there is a target, the `value_mask` of `ppo_loss`.
    """

    advantages: Float[Array, "batch time"]
    returns: Float[Array, "batch time"]
    value_mask: Bool[Array, "batch time"]


def response_advantages(
    rewards: Float[Array, "batch time"],
    values: Float[Array, "batch time"],
    mask: Mask,
    *,
    gamma: Numeric = 1.0,
    lam: Numeric = 0.95,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    score_position: ScorePosition = "last",
    axis_name: str | None = None,
) -> ResponseAdvantages:
    """Computes generalized advantages (GAE) over the tokens of each response; it ends with its last token.

    Masked positions between tokens (the output of a tool) are passed over: the next value is that of the next token.

    Args:
        rewards: Of `token_rewards`.
        values: Of the critic at each token, in units of reward, before the update.
        mask: Nonzero at response tokens.
        gamma: Discount, in [0, 1].
        lam: λ in [0, 1].
        whiten_rewards: Whether to divide the rewards by their deviation over the batch; the mean stays.
        whiten_advantages: Whether to standardise the advantages over the response tokens of the batch. The returns are
            made before.
        score_position: As given to `token_rewards`.
        axis_name: Mapped axis over whose devices the statistics are taken.

    References:
        Schulman et al., 2016, eq. 16. https://arxiv.org/abs/1506.02438
    """
    mask = jnp.asarray(mask) != 0
    steps = step_mask(mask, score_position)
    rewards, values = jnp.where(steps, rewards, 0), jnp.where(steps, values, 0)
    if whiten_rewards:
        rewards = masked_standardize(rewards, steps, shift_mean=False, axis_name=axis_name)
    never = jnp.zeros_like(steps)
    time_first = (x.T for x in (rewards, values, _next_values(values, steps), never, never))
    advantages, returns = generalized_advantages(*time_first, gamma=gamma, lam=lam, mask=steps.T)
    advantages = jnp.where(mask, advantages.T, 0)
    if whiten_advantages:
        advantages = masked_standardize(advantages, mask, axis_name=axis_name)
    return ResponseAdvantages(*jax.lax.stop_gradient((advantages, returns.T)), steps)


def _next_values(values: Array, steps: Array) -> Array:
    """Takes the value at the next position that counts; 0 after the last."""
    width = steps.shape[1]
    here = jnp.where(steps, jnp.arange(width), width)
    following = jax.lax.cummin(jnp.pad(here[:, 1:], ((0, 0), (0, 1)), constant_values=width), axis=1, reverse=True)
    return jnp.take_along_axis(jnp.pad(values, ((0, 0), (0, 1))), following, axis=1)
