"""Log-probabilities of tokens, from logits or, without ever building `[batch, time, vocab]`, from hidden states."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.chunks import map_time_chunks
from jaxrl_llm.types import MESH_AXES, Numeric

VOCABULARY_BLOCK = 2048
"""Most tokens of the vocabulary whose logits exist at once in `chunked_token_statistics`."""


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

    Logits exist for `chunk_size` positions of each row and `VOCABULARY_BLOCK` tokens of the vocabulary only, in the forward
    and (recomputed) in the backward pass; what stays between the two is a few numbers for each position and block. The
    backward pass holds one gradient of the kernel more than the one it returns, if there are several chunks; where the
    axis `tensor` of a mesh divides the vocabulary, a copy of the kernel. Values and gradients equal the dense form. Blocks
    of logits that lie in a processor's cache are also faster there than all logits at once.

    Args:
        hidden: Last hidden states; `hidden[..., t, :]` predicts `tokens[..., t]`.
        kernel: The language model's head.
        tokens: Index into the vocabulary for each position.
        temperature: Positive divisor of the logits.
        chunk_size: Positions along time that are scored at once; it need not divide the length.

    Raises:
        ValueError: If `chunk_size` is not positive.
    """
    vocab = kernel.shape[1]
    num_blocks = -(-vocab // VOCABULARY_BLOCK)
    size = -(-vocab // num_blocks)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape.get(MESH_AXES[2], 1)
    if parts > 1:  # a block is every num_blocks-th token, so that each device has an equal part of each block
        size = -(-size // parts) * parts
        rows = jnp.pad(kernel.T, ((0, num_blocks * size - vocab), (0, 0)))
        rows = jnp.moveaxis(rows.reshape(size, num_blocks, -1), 1, 0)

    def block_of(number: Array) -> tuple[Array, _Block]:
        if parts > 1:
            return rows[number].T, _Block(number, num_blocks, jnp.zeros_like(number), size, vocab)
        lowest = number * size
        first = jnp.minimum(lowest, vocab - size)  # the last block reaches back over tokens of another
        return jax.lax.dynamic_slice_in_dim(kernel, first, size, axis=1), _Block(first, 1, lowest, size, vocab)

    def score(hidden: Array, tokens: Array) -> TokenStatistics:
        @jax.checkpoint
        def score_block(number: Array) -> _BlockStatistics:
            part, block = block_of(number)
            logits = jnp.matmul(hidden, part.astype(hidden.dtype), preferred_element_type=dtype) / temperature
            return _block_statistics(logits, jnp.where(tokens < 0, tokens + vocab, tokens), block)

        return _join_blocks(jax.lax.map(score_block, jnp.arange(num_blocks)), tokens)

    return map_time_chunks(score, hidden, tokens, axis=tokens.ndim - 1, chunk_size=chunk_size, recompute=False)


class _Block(NamedTuple):
    """Which tokens of the vocabulary a block has: first, first + stride, … (`size` of them) from `lowest` on, below `vocab`."""

    first: Array
    stride: int
    lowest: Array
    size: int
    vocab: int


class _BlockStatistics(NamedTuple):
    """Of a block of the vocabulary: its largest logit m, and sums over its logits z.

    Attributes:
        largest: m.
        most_likely: The lowest token with this logit.
        taken: z - m of the given token, 0 where it is in another block.
        has_token: Whether it is in this block.
        total: Σ exp(z - m).
        moment: Σ exp(z - m) (z - m).
        total_sq: Σ exp(2 (z - m)).
        possible: Number of tokens that are possible.
        possible_sum: Σ z - m over them.
    """

    largest: Array
    most_likely: Array
    taken: Array
    has_token: Array
    total: Array
    moment: Array
    total_sq: Array
    possible: Array
    possible_sum: Array


def _block_statistics(logits: Array, tokens: Array, block: _Block) -> _BlockStatistics:
    """Sums over a block of logits."""
    ids = block.first + block.stride * jnp.arange(block.size)
    ids = jnp.expand_dims(ids, range(tokens.ndim))
    logits = jnp.where((ids >= block.lowest) & (ids < block.vocab), logits, -jnp.inf)
    place = (tokens - block.first) // block.stride
    has_token = (tokens >= block.lowest) & (tokens < block.vocab) & (place < block.size)
    has_token &= tokens == block.first + block.stride * place
    taken = _take(logits, jnp.where(has_token, place, 0))
    largest = jax.lax.stop_gradient(logits.max(-1))
    base = jnp.maximum(largest, jnp.finfo(logits.dtype).min)  # a block may have no possible token
    possible = logits > -jnp.inf
    first = jnp.where(logits == largest[..., None], ids, block.vocab)
    logits = logits - base[..., None]
    exp, finite = jnp.exp(logits), jnp.where(possible, logits, 0)
    return _BlockStatistics(
        largest=base,
        most_likely=first.min(-1),
        taken=jnp.where(has_token, taken - base, 0),
        has_token=has_token,
        total=exp.sum(-1),
        moment=jnp.sum(exp * finite, axis=-1),
        total_sq=jnp.exp(2 * logits).sum(-1),
        possible=possible.sum(-1),
        possible_sum=finite.sum(-1),
    )


def _join_blocks(blocks: _BlockStatistics, tokens: Array) -> TokenStatistics:
    """Makes the statistics of the whole vocabulary from those of its blocks, on the first axis."""
    largest = blocks.largest.max(0)
    off = blocks.largest - largest[None]  # what a logit of the block loses when the largest of all is taken off
    weight = jnp.exp(off)
    total = jnp.sum(weight * blocks.total, axis=0)
    logsumexp = jnp.log(total)
    moment = jnp.sum(weight * (blocks.moment + off * blocks.total), axis=0)
    possible_sum = jnp.sum(blocks.possible_sum + jnp.where(blocks.possible > 0, off, 0) * blocks.possible, axis=0)
    most_likely = jnp.where(off == 0, blocks.most_likely, jnp.iinfo(tokens.dtype).max).min(0)
    taken = jnp.sum(blocks.taken + jnp.where(blocks.has_token, off, 0), axis=0)
    return TokenStatistics(
        log_probs=jnp.where(blocks.has_token.any(0), taken - logsumexp, jnp.nan),
        entropy=logsumexp - moment / total,
        logsumexp=logsumexp + largest,
        mean_log_probs=possible_sum / blocks.possible.sum(0) - logsumexp,
        is_argmax=most_likely == tokens,
        log_sum_sq_probs=jnp.log(jnp.sum(weight**2 * blocks.total_sq, axis=0)) - 2 * logsumexp,
    )
