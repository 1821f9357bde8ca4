"""What attention needs in every decoder: positions, masks, rotation, the key-value cache, and the product itself.

Positions and masks follow from which tokens are real, never from where a token stands in its row: left padding, right
padding and packing all give a token the numbers that it has alone.
"""

import typing
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Shaped

from jaxrl_llm.types import Key, KVCache

Implementation: TypeAlias = Literal["xla", "cudnn"]

LayerCache: TypeAlias = tuple[Array, Array]
"""Keys and values of all layers, each [layers, batch, kv_heads, slots, head_dim]: the scan over layers carries them."""


def check_implementation(implementation: Implementation | None, dtype: DTypeLike, head_size: int) -> None:
    """Raises a `ValueError` for a config whose attention does not exist or could not run."""
    if implementation not in (None, *typing.get_args(Implementation)):
        raise ValueError(f"attention must be None, 'xla' or 'cudnn', got {implementation!r}.")
    if implementation == "cudnn" and (jnp.dtype(dtype).itemsize != 2 or head_size % 8):
        raise ValueError(
            f"attention='cudnn' needs dtype bfloat16 or float16 and a head width that is a multiple of 8, "
            f"got dtype={dtype} and a head width of {head_size}. Use attention='xla'."
        )


class Rotation(NamedTuple):
    """Cosine and sine of the angle by which each position turns each pair of features."""

    cos: Float[Array, "batch time 1 pairs"]
    sin: Float[Array, "batch time 1 pairs"]


class LayerInputs(NamedTuple):
    """What every layer is told, beside the hidden states and the cache.

    Attributes:
        visible: True where a query may see a key; None where the causal order says it all.
        start: First slot of the cache to write; None without a cache.
        rotation: Rotary positions; None where positions are in the embedding.
    """

    visible: Bool[Array, "batch 1 time slots"] | None
    start: Int[Array, ""] | None
    rotation: Rotation | None


class Dropout(NamedTuple):
    """Probability of dropping an attention weight, and the key that draws which."""

    rate: float
    key: Key


def real_tokens(
    tokens: Int[Array, "batch time"],
    mask: Shaped[Array, "batch time"] | None,
    segment_ids: Int[Array, "batch time"] | None,
) -> Bool[Array, "batch time"]:
    """Tells which tokens are real: not masked out, and not in segment 0."""
    real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    return real if segment_ids is None else real & (segment_ids != 0)


def token_positions(
    real: Bool[Array, "batch time"], segment_ids: Int[Array, "batch time"] | None = None
) -> Int[Array, "batch time"]:
    """Counts the real tokens before each token, in its own segment; padding before the first gets 0.

    Args:
        real: True for real tokens.
        segment_ids: Id of the segment of each token in a packed row; the tokens of a segment stand together.

    Example:
        >>> token_positions(jnp.array([[False, True, True, True]])).tolist()
        [[0, 0, 1, 2]]
        >>> token_positions(jnp.ones((1, 5), bool), jnp.array([[1, 1, 2, 2, 2]])).tolist()
        [[0, 1, 0, 1, 2]]
    """
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    if segment_ids is not None:
        begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
        count -= jax.lax.cummax(jnp.where(begins, count - real, 0), axis=1)
    return jnp.maximum(count - 1, 0)


def attention_mask(
    real: Bool[Array, "batch time"], segment_ids: Int[Array, "batch time"] | None = None
) -> Bool[Array, "batch 1 time time"]:
    """Says which keys a query may see, beside the causal order: the real ones of its own segment."""
    batch, time = real.shape
    mask = jnp.broadcast_to(real[:, None, None, :], (batch, 1, time, time))
    if segment_ids is None:
        return mask
    return mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


def empty_cache(*, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """Makes a cache with room for `slots` tokens in each row."""
    shape = (layers, batch, kv_heads, slots, head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        mask=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


def append_tokens(
    cache: KVCache, real: Bool[Array, "batch time"]
) -> tuple[KVCache, Int[Array, "batch time"], Bool[Array, "batch 1 time slots"]]:
    """Takes the next slots of a cache for a chunk of tokens; the layers then write their keys and values there.

    Returns:
        The cache with these slots taken; the position of each token, counted on from the real tokens in the cache; and
        the mask that lets each token see the real tokens up to its own slot.
    """
    time, slots = real.shape[1], cache.mask.shape[1]
    positions = token_positions(real) + cache.mask.sum(axis=1, dtype=jnp.int32)[:, None]
    mask = jax.lax.dynamic_update_slice_in_dim(cache.mask, real, cache.length, axis=1)
    causal = jnp.arange(slots)[None, :] <= (cache.length + jnp.arange(time))[:, None]
    visible = mask[:, None, None, :] & causal[None, None]
    return cache._replace(mask=mask, length=cache.length + time), positions, visible


def write_layer(
    cache: Float[Array, "layers batch kv_heads slots head_dim"],
    layer: Int[Array, ""],
    start: Int[Array, ""],
    chunk: Float[Array, "batch time kv_heads head_dim"],
) -> tuple[Float[Array, "layers batch kv_heads slots head_dim"], Float[Array, "batch slots kv_heads head_dim"]]:
    """Writes a chunk into one layer, from slot `start` on; returns the cache and all slots of that layer.

    The cache of all layers is carried through the scan over layers and updated here, not split and stacked again: XLA
    then writes into the one buffer, instead of copying the cache for every token. The slots of a head lie together, as
    the products of attention read them: else XLA would turn the whole layer around for every token.
    """
    zero = jnp.zeros((), jnp.int32)
    chunk = jnp.swapaxes(chunk, 1, 2)[None].astype(cache.dtype)
    cache = jax.lax.dynamic_update_slice(cache, chunk, (layer, zero, zero, start, zero))
    return cache, jnp.swapaxes(jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False), 1, 2)


def attend_layer(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch time kv_heads head_dim"],
    value: Float[Array, "batch time kv_heads head_dim"],
    cache: LayerCache | None,
    layer: Int[Array, ""],
    inputs: LayerInputs,
    *,
    implementation: Implementation | None = None,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "batch time heads head_dim"], LayerCache | None]:
    """Attends over the tokens of this pass or, with a cache, over all slots of this layer after writing them.

    Passes with a cache always use XLA. Returns the mixed values and the cache.
    """
    if cache is None:
        options = {"is_causal": True, "implementation": implementation}
    else:
        assert inputs.start is not None
        keys, key = write_layer(cache[0], layer, inputs.start, key)
        values, value = write_layer(cache[1], layer, inputs.start, value)
        cache, options = (keys, values), {"is_causal": False, "implementation": "xla"}
    return attend(query, key, value, inputs.visible, dropout=dropout, **options), cache


def attend(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch slots kv_heads head_dim"],
    value: Float[Array, "batch slots kv_heads head_dim"],
    mask: Bool[Array, "batch 1 time slots"] | None,
    *,
    is_causal: bool,
    implementation: Implementation | None = None,
    dropout: Dropout | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Computes softmax(query keyᵀ / √head_dim) value, with the softmax in float32.

    Each key and value serves heads / kv_heads neighbouring heads (grouped-query attention).

    A query that may see nothing (padding) gets an even mean of the values: finite, and so is its gradient.

    Args:
        query: Queries.
        key: Keys; heads is a multiple of kv_heads.
        value: Values.
        mask: True where a query may see a key.
        is_causal: Whether a query sees no key after its own place (as many queries as keys).
        implementation: Handed to `jax.nn.dot_product_attention`; None leaves the choice to jax.
        dropout: Drops attention weights. Fused attention has none, so the weights are then built explicitly.
    """
    if dropout is None:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=is_causal, implementation=implementation
        )
    groups = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    visible = jnp.tri(*scores.shape[-2:], dtype=bool)[None, None] if is_causal else True
    visible = visible if mask is None else visible & mask
    scores = jnp.where(visible, scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min / 2)
    weights = jax.nn.softmax(scores)
    keep = jax.random.bernoulli(dropout.key, 1 - dropout.rate, weights.shape)
    weights = jnp.where(keep, weights / (1 - dropout.rate), 0).astype(value.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, value)
