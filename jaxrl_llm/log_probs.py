"""Log-probabilities of tokens, from logits or, without ever building `[batch, time, vocab]`, from hidden states."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.chunks import map_time_chunks
from jaxrl_llm.types import Numeric


class TokenStatistics(NamedTuple):
    """What losses and metrics need to know of a distribution over the vocabulary, for each position.

    Attributes:
        log_probs: Log-probability of the given token, nats, at most 0.
        entropy: Entropy of the distribution, nats.
        logsumexp: Log of the normaliser of the (temperature-scaled) logits.
        mean_log_probs: Mean of the log-probabilities of all tokens that are possible (a logit above -inf), nats: what
            label smoothing adds.
        is_argmax: Whether the given token is the most likely one.
        log_sum_sq_probs: Log of the sum of the squared probabilities of all tokens, at most 0: the mean log-probability
            of a token of the policy's own, up to Jensen's inequality (WPO).
    """

    log_probs: Float[Array, "*batch time"]
    entropy: Float[Array, "*batch time"]
    logsumexp: Float[Array, "*batch time"]
    mean_log_probs: Float[Array, "*batch time"]
    is_argmax: Bool[Array, "*batch time"]
    log_sum_sq_probs: Float[Array, "*batch time"]


def _centred(logits: Array, temperature: Numeric) -> tuple[Array, Array]:
    """Divides by the temperature, in at least float32, and takes off the largest: the rest, and what was taken off.

    The logits of GPT-2 lie around -100, where float32 has five digits after the point; differences of them have more.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return logits - largest, largest[..., 0]


def _take(values: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]


def token_log_probs(
    logits: Float[Array, "*shape vocab"], tokens: Int[Array, "*shape"], *, temperature: Numeric = 1.0
) -> Float[Array, "*shape"]:
    """Computes log softmax(logits / temperature) at the given tokens.

    `logits[..., t, :]` must be the prediction FOR `tokens[..., t]`: shift before you call.

    Args:
        logits: Unnormalised log-probabilities.
        tokens: Index into the vocabulary for each position.
        temperature: Positive divisor of the logits; GRPO and PPO score at the temperature they sampled with.

    Returns:
        Log-probabilities in nats, in float32 or better.

    Example:
        >>> float(jnp.exp(token_log_probs(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([1]))[0]))
        0.75
    """
    logits, _ = _centred(logits, temperature)
    return _take(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


def token_entropy(logits: Float[Array, "*shape vocab"], *, temperature: Numeric = 1.0) -> Float[Array, "*shape"]:
    r"""Computes the entropy $\mathrm{lse}(z) - \sum_v p_v z_v$ of softmax(logits / temperature), in nats."""
    logits, _ = _centred(logits, temperature)
    return _entropy(logits, jax.nn.logsumexp(logits, axis=-1))


def _entropy(logits: Array, logsumexp: Array) -> Array:
    probs = jnp.exp(logits - logsumexp[..., None])
    return logsumexp - jnp.sum(probs * jnp.where(probs > 0, logits, 0), axis=-1)


def token_statistics(
    logits: Float[Array, "*shape vocab"], tokens: Int[Array, "*shape"], *, temperature: Numeric = 1.0
) -> TokenStatistics:
    """Computes all of `TokenStatistics` from logits; what is not used costs nothing once compiled.

    Args:
        logits: Predictions for `tokens`, already shifted.
        tokens: Index into the vocabulary for each position.
        temperature: Positive divisor of the logits.
    """
    logits, largest = _centred(logits, temperature)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    possible = logits > -jnp.inf
    return TokenStatistics(
        log_probs=_take(logits, tokens) - logsumexp,
        entropy=_entropy(logits, logsumexp),
        logsumexp=logsumexp + largest,
        mean_log_probs=jnp.sum(jnp.where(possible, logits, 0), axis=-1) / possible.sum(-1) - logsumexp,
        is_argmax=jnp.argmax(logits, axis=-1) == tokens,
        log_sum_sq_probs=jax.nn.logsumexp(2 * logits, axis=-1) - 2 * logsumexp,
    )


def chunked_token_statistics(
    hidden: Float[Array, "*batch time hidden"],
    kernel: Float[Array, "hidden vocab"],
    tokens: Int[Array, "*batch time"],
    *,
    temperature: Numeric = 1.0,
    chunk_size: int = 128,
) -> TokenStatistics:
    """Computes `token_statistics(hidden @ kernel, tokens)` a few positions at a time.

    Logits exist for `chunk_size` positions of each row only, in the forward and (recomputed) in the backward pass: peak
    memory is batch × chunk_size × vocab, whatever the length. Values and gradients equal the dense form.

    Args:
        hidden: Last hidden states; `hidden[..., t, :]` predicts `tokens[..., t]`.
        kernel: The language model's head.
        tokens: Index into the vocabulary for each position.
        temperature: Positive divisor of the logits.
        chunk_size: Positions along time that are scored at once; it need not divide the length.

    Raises:
        ValueError: If `chunk_size` is not positive.
    """

    def score(hidden: Array, tokens: Array) -> TokenStatistics:
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype)
        return token_statistics(logits, tokens, temperature=temperature)

    return map_time_chunks(score, hidden, tokens, axis=tokens.ndim - 1, chunk_size=chunk_size)
