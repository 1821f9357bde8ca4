"""Log-probabilities of given text under a model: the counterpart of sampling.

A model comes as two functions: `apply(variables, tokens, *, mask, cache, output, …) -> (outputs, cache)`, such as
`module.apply`, and `head_kernel(params) -> [hidden, vocab]`. No array of [batch, time, vocab] is ever built.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.log_probs import TokenStatistics, chunked_token_statistics
from jaxrl_llm.rollouts.sampling import left_pad
from jaxrl_llm.types import Key, Mask, Numeric, Params

Apply: TypeAlias = Callable[..., tuple[Any, Any]]
"""`apply({"params": params}, tokens, *, mask, positions, segment_ids, cache, output, …) -> (outputs, cache)`."""
HeadKernel: TypeAlias = Callable[[Params], Float[Array, "hidden vocab"]]


def score_tokens(
    apply: Apply,
    head_kernel: HeadKernel,
    params: Params,
    tokens: Int[Array, "batch time"],
    mask: Mask,
    *,
    segment_ids: Int[Array, "batch time"] | None = None,
    temperature: Numeric = 1.0,
    chunk_size: int = 128,
    dropout_key: Key | None = None,
    neftune_noise_alpha: Numeric = 0.0,
) -> TokenStatistics:
    """Computes statistics of each token given those before it.

    Args:
        apply: The model, such as `module.apply`.
        head_kernel: The kernel of the model's head, from its parameters.
        params: Parameters of the model.
        tokens: Ids, padded on either side.
        mask: Nonzero for real tokens.
        segment_ids: Segments of packed rows, 0 for padding.
        temperature: Positive divisor of the logits.
        chunk_size: Positions along time whose logits exist at once.
        dropout_key: Turns dropout on, and the noise.
        neftune_noise_alpha: Scale of the noise on the embeddings.

    Returns:
        Statistics of `tokens[:, 1:]`, so one shorter than the tokens.
    """
    options: dict[str, Any] = {} if segment_ids is None else {"segment_ids": segment_ids[:, :-1]}
    if dropout_key is not None:
        options |= {"deterministic": False, "rngs": {"dropout": dropout_key}}
        options |= {"neftune_noise_alpha": neftune_noise_alpha}
    mask = jnp.asarray(mask)
    with jax.named_scope("score"):
        hidden, _ = apply({"params": params}, tokens[:, :-1], mask=mask[:, :-1], output="hidden", **options)
        return chunked_token_statistics(
            hidden, head_kernel(params), tokens[:, 1:], temperature=temperature, chunk_size=chunk_size
        )


def score_completions(
    apply: Apply,
    head_kernel: HeadKernel,
    params: Params,
    prompt_ids: Int[Array, "rows prompt_time"],
    prompt_mask: Mask,
    completion_ids: Int[Array, "rows time"],
    completion_mask: Mask,
    *,
    temperature: Numeric = 1.0,
    chunk_size: int = 128,
) -> TokenStatistics:
    """Computes statistics of the tokens of completions; what `generate` recorded as `log_probs`, up to rounding.

    Only the states that predict completion tokens meet the head.

    Args:
        apply: The model, such as `module.apply`.
        head_kernel: The kernel of the model's head, from its parameters.
        params: Parameters of the model.
        prompt_ids: The prompt of each completion (`jnp.repeat(prompts, num_generations, axis=0)`).
        prompt_mask: Nonzero for real tokens, with padding on either side.
        completion_ids: Ids of the completions, padded on the right.
        completion_mask: Nonzero up to and including the first EOS.
        temperature: That of the sampling.
        chunk_size: Positions along time whose logits exist at once.
    """
    with jax.named_scope("score"):
        rows = prompt_ids, prompt_mask, completion_ids, completion_mask
        hidden = completion_outputs(apply, params, *rows, output="hidden")
        return chunked_token_statistics(
            hidden, head_kernel(params), completion_ids, temperature=temperature, chunk_size=chunk_size
        )


def completion_outputs(
    apply: Apply,
    params: Params,
    prompt_ids: Int[Array, "rows prompt_time"],
    prompt_mask: Mask,
    completion_ids: Int[Array, "rows time"],
    completion_mask: Mask,
    **options: Any,
) -> Float[Array, "rows time *features"]:
    """Computes what a model says before each token of completions; other arguments as in `score_completions`.

    Args:
        apply: The model; of a `ScalarHead`, the outputs are values.
        params: Its parameters.
        prompt_ids: The prompt of each completion.
        prompt_mask: Nonzero for real tokens.
        completion_ids: Ids of the completions.
        completion_mask: Nonzero up to and including the first EOS.
        **options: More arguments of the model, such as `output="hidden"`.
    """
    prompt_ids, prompt_real = left_pad(prompt_ids, prompt_mask)
    tokens = jnp.concatenate([prompt_ids, completion_ids], axis=1)
    mask = jnp.concatenate([prompt_real, jnp.asarray(completion_mask) != 0], axis=1)
    outputs, _ = apply({"params": params}, tokens[:, :-1], mask=mask[:, :-1], **options)
    return outputs[:, prompt_ids.shape[1] - 1 :]
