"""A language model as a policy under a trust region: the functions that `optimizers.natural_gradient` needs of it.

A state is a prompt and the tokens so far, an action the next token. Hidden states are kept, logits never: surrogate, exact KL
and Fisher meet the head a few positions at a time.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.divergences import chunked_generalized_jsd
from jaxrl_llm.log_probs import chunked_token_statistics
from jaxrl_llm.losses.ratios import per_token
from jaxrl_llm.optimizers.fisher import chunked_categorical_fisher
from jaxrl_llm.reductions import LossWeights, as_loss_weights, loss_weights, sum_over_axis, weighted_sum
from jaxrl_llm.rollouts.scoring import Apply, HeadKernel, completion_outputs
from jaxrl_llm.types import Mask, Numeric, Params, Scalar


def policy_functions(
    apply: Apply,
    head_kernel: HeadKernel,
    params: Params,
    prompt_ids: Int[Array, "rows prompt_time"],
    prompt_mask: Mask,
    completion_ids: Int[Array, "rows time"],
    completion_mask: Mask,
    advantages: Float[Array, "*advantage_shape"],
    *,
    weights: Float[Array, "rows time"] | LossWeights | None = None,
    temperature: Numeric = 1.0,
    chunk_size: int = 128,
    fisher_every: int = 1,
    axis_name: str | None = None,
) -> dict[str, Any]:
    r"""Makes the keyword arguments of `natural_gradient(…).update` for completions of prompts.

    With $\pi_0$ the policy of `params`, before the step:

    $$ \mathrm{surrogate}(\theta) = \sum_{bt} w_{bt}\, \frac{\pi_\theta}{\pi_0} A_{bt}, \qquad
    \mathrm{kl}(\theta) = \sum_{bt} v_{bt}\, \mathrm{KL}(\pi_0 \| \pi_\theta)_{bt} $$

    with the KL exact over the vocabulary, and the Fisher weighted as the KL. At `params` the surrogate has minus the gradient
    of `policy_gradient_loss`, and of every clipped loss with the same weights.

    Args:
        apply: The model, such as `module.apply`; wrapped, if only some parameters are trained.
        head_kernel: The kernel of the model's head, from the trained parameters.
        params: The trained parameters, before the step.
        prompt_ids: The prompt of each completion.
        prompt_mask: Nonzero for real tokens, with padding on either side.
        completion_ids: Ids of the completions, padded on the right.
        completion_mask: Nonzero up to and including the first EOS.
        advantages: Of each completion `[rows]`, or of each of its tokens `[rows, time]`.
        weights: From the whole batch: $w$ is `weights.policy`, and $v$ `weights.tokens`, so that `max_kl` bounds the mean
            KL of a token. One array serves for both; not given, both are the mean over tokens.
        temperature: That of the sampling.
        chunk_size: Positions along time whose logits exist at once.
        fisher_every: The Fisher matrix is estimated from every how many-th row, which saves that much of the time of
            conjugate gradients (appendix C of the paper: a tenth is enough). Surrogate and KL have all rows.
        axis_name: Mapped axis; each function then returns this device's share, which the optimizer sums.

    Returns:
        `distribution_fn`, `fisher_fn`, `surrogate_fn`, `kl_fn`, `evaluate_fn` (both from one pass) and `axis_name`.

    Raises:
        ValueError: If `fisher_every` leaves no row.

    References:
        Schulman et al., 2015. https://arxiv.org/abs/1502.05477
    """
    if not 1 <= fisher_every <= len(prompt_ids):
        raise ValueError(f"fisher_every must be from 1 to the number of rows, {len(prompt_ids)}, got {fisher_every}.")
    rows = prompt_ids, prompt_mask, completion_ids, completion_mask
    mask = jnp.asarray(completion_mask) != 0
    weights = as_loss_weights(loss_weights(mask, "token_mean", axis_name=axis_name) if weights is None else weights)
    options: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}

    def distribution(params: Params, every: int = 1) -> tuple[Array, Array]:
        return completion_outputs(apply, params, *(x[::every] for x in rows), output="hidden"), head_kernel(params)

    def log_probs(outputs: tuple[Array, Array]) -> Array:
        return chunked_token_statistics(*outputs, completion_ids, **options).log_probs

    old = distribution(params)
    old_log_probs = log_probs(old)
    fisher_weights = _share_weight(weights.tokens, weights.tokens[::fisher_every], axis_name)
    gain = jnp.where(mask, per_token(advantages, old_log_probs), 0)

    def surrogate(outputs: tuple[Array, Array]) -> Scalar:
        ratio = jnp.exp(jnp.where(mask, log_probs(outputs) - old_log_probs, 0))
        return weighted_sum(ratio * gain, weights.policy)

    def kl(outputs: tuple[Array, Array]) -> Scalar:
        divergence = chunked_generalized_jsd(*old, *outputs, beta=1.0, **options)
        return weighted_sum(divergence, weights.tokens)

    def evaluate(params: Params) -> tuple[Scalar, Scalar]:
        outputs = distribution(params)
        return surrogate(outputs), kl(outputs)

    def fisher(outputs: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        return chunked_categorical_fisher(outputs, tangents, weights=fisher_weights, **options)

    return {
        "distribution_fn": functools.partial(distribution, every=fisher_every),
        "fisher_fn": fisher,
        "surrogate_fn": lambda params: surrogate(distribution(params)),
        "kl_fn": lambda params: kl(distribution(params)),
        "evaluate_fn": evaluate,
        "axis_name": axis_name,
    }


def _share_weight(everyone: Array, chosen: Array, axis_name: str | None) -> Array:
    """Scales the weights of the chosen, so that they weigh as much as all; zeros if they weigh nothing."""
    total, part = (sum_over_axis(jnp.sum(weights), axis_name) for weights in (everyone, chosen))
    return chosen * jnp.where(part == 0, 0, total / jnp.where(part == 0, 1, part))
