"""From logits to a token: temperature, and the filters of the field (top-k, top-p, min-p, repetition penalty)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.types import Key, Mask, Numeric

SAMPLING_BLOCK = 256
"""Tokens of a block in `sample_tokens`."""


def is_off(value: Numeric, neutral: float) -> bool:
    """Tells whether an option is a Python number that changes nothing, so that its filter need not be compiled."""
    return isinstance(value, int | float) and value == neutral


def penalize_repetition(
    logits: Float[Array, "rows vocab"],
    history: Int[Array, "rows length"],
    history_mask: Bool[Array, "rows length"],
    penalty: Numeric,
) -> Float[Array, "rows vocab"]:
    """Divides positive and multiplies negative logits of the tokens in `history` by `penalty`.

    References:
        Keskar et al., 2019, section 4.1 (CTRL). https://arxiv.org/abs/1909.05858
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    seen = jnp.take_along_axis(logits, history, axis=-1, mode="clip")
    penalized = jnp.where(seen < 0, seen * penalty, seen / penalty)
    return logits.at[rows, jnp.where(history_mask, history, logits.shape[-1])].set(penalized, mode="drop")


def filter_logits(
    logits: Float[Array, "rows vocab"], *, top_k: int = 0, top_p: Numeric = 1.0, min_p: Numeric = 0.0
) -> Float[Array, "rows vocab"]:
    """Sets to -inf the logits of the tokens that may not be sampled; the most likely one always may.

    Tokens exactly as likely as the last one that top-k or top-p keeps are kept too: no filter depends on their order.

    Args:
        logits: Temperature-scaled logits.
        top_k: Keep the k most likely tokens; 0 keeps all. Static.
        top_p: Keep the most likely tokens whose probabilities sum to at least p (nucleus), of those that top-k kept.
        min_p: Keep tokens at least min_p times as likely as the most likely one.

    References:
        Holtzman et al., 2020 (top-p). https://arxiv.org/abs/1904.09751; Nguyen et al., 2024 (min-p).
        https://arxiv.org/abs/2407.01082
    """
    if top_k > 0:
        lowest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if not is_off(top_p, 1.0):
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        kept = (before < top_p) | (top_p >= 1)  # rounding can lift `before` to 1 long before the last token
        kept = kept.at[:, 0].set(True)
        lowest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if not is_off(min_p, 0.0):
        lowest = logits.max(-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def sample_tokens(keys: Key, logits: Float[Array, "rows vocab"]) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """Draws a token of each row from softmax(logits), with one key a row; returns it with its log-probability.

    The inverse of the distribution function, in two steps: a block of tokens by its probability, then a token of the block.
    That takes two random numbers a row, where the Gumbel trick of `jax.random.categorical` takes one for each token of the
    vocabulary. A token of logit -inf is never drawn.

    Args:
        keys: One for each row; they are consumed.
        logits: Unnormalised log-probabilities, at least one of each row above -inf.
    """
    size = SAMPLING_BLOCK
    largest = logits.max(-1, keepdims=True)
    # A sum over windows: on CPUs it is faster than a sum over an axis, and needs no filling up of the last block.
    padding = ((0, 0), (0, -logits.shape[-1] % size))
    blocks = jax.lax.reduce_window(jnp.exp(logits - largest), 0.0, jax.lax.add, (1, size), (1, size), padding)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), logits.dtype))(keys)
    block = _draw(blocks, uniform[:, 0])
    tokens = block[:, None] * size + jnp.arange(size)[None, :]
    members = jnp.take_along_axis(logits, tokens, axis=1, mode="fill", fill_value=-jnp.inf) - largest
    member = _draw(jnp.exp(members), uniform[:, 1])
    drawn = jnp.take_along_axis(members, member[:, None], axis=1)[:, 0]
    return block * size + member, drawn - jnp.log(blocks.sum(-1))


def _draw(weights: Float[Array, "rows entries"], uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """Inverts the distribution function of weights at a number in [0, 1): finds the first that reaches above it."""
    entries = jnp.arange(weights.shape[-1])[None, :]
    # A product with a triangle of ones; `cumsum` is a loop of loops on CPUs. Rounding leads to no weight of 0.
    upto = jnp.matmul(weights, jnp.triu(jnp.ones((entries.size, entries.size), weights.dtype)), precision="highest")
    possible = weights > 0
    reached = possible & (upto > uniform[:, None] * upto[:, -1:])
    first = jnp.min(jnp.where(reached, entries, entries.size), axis=-1)
    return jnp.minimum(first, jnp.max(jnp.where(possible, entries, 0), axis=-1))


def most_likely_tokens(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """Finds the first of the largest logits of each row: what `jnp.argmax` does, as two reductions that a CPU vectorises."""
    vocab = logits.shape[-1]
    return jnp.min(jnp.where(logits == logits.max(-1, keepdims=True), jnp.arange(vocab), vocab - 1), axis=-1)


def left_pad(ids: Int[Array, "batch time"], mask: Mask) -> tuple[Int[Array, "batch time"], Bool[Array, "batch time"]]:
    """Moves the real tokens of each prompt to the end of its row, in their order, wherever the padding was.

    Raises:
        ValueError: If the mask has another shape than the ids, or if the rows have no room for a token.
    """
    real = jnp.asarray(mask) != 0
    if real.shape != ids.shape:
        raise ValueError(f"prompt_mask must have the shape of prompt_ids, {ids.shape}, got {real.shape}.")
    if ids.shape[1] == 0:
        raise ValueError(
            f"prompt_ids must have at least one token in each row, got shape {ids.shape}. Start with a BOS token."
        )
    order = jnp.argsort(real, axis=-1, stable=True)
    return jnp.take_along_axis(ids, order, axis=-1), jnp.take_along_axis(real, order, axis=-1)
