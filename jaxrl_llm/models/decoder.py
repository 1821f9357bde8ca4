"""What every decoder shares: the signature, positions, the cache, packed rows, noise on embeddings, and the head.

An architecture says how tokens are placed, what a block computes and how the last states are normalised; all else is
here, once, so that nothing outside this package need know which architecture it has.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Shaped

from jaxrl_llm.models import attention
from jaxrl_llm.models.attention import LayerInputs, Rotation
from jaxrl_llm.models.lora import Adapted, LoraModule
from jaxrl_llm.types import ROW_AXES, Key, KVCache, Numeric, Params


@runtime_checkable  # so that the tests can check annotations
class DecoderConfig(Protocol):
    """What the config of every architecture answers, whatever its own fields are called."""

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def context_length(self) -> int:
        """Longest sequence, tokens."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        ...

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        ...

    @property
    def kv_heads(self) -> int:
        """Heads that keys and values have."""
        ...

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        ...

    @property
    def initializer_range(self) -> float:
        """Standard deviation of fresh weights."""
        ...

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the token embedding."""
        ...

    @property
    def dtype(self) -> DTypeLike:
        """Type of the computation."""
        ...

    @property
    def remat(self) -> bool:
        """Whether to recompute each block in the backward pass."""
        ...

    def with_dropout(self, rate: float) -> "DecoderConfig":
        """Sets every dropout that the architecture has."""
        ...


class Head(nn.Module):
    """Holds the kernel of a language-model head that is not tied to the token embedding."""

    config: Any

    @nn.compact
    def __call__(self) -> Float[Array, "hidden vocab"]:
        """Returns the kernel."""
        init = nn.initializers.normal(self.config.initializer_range)
        return self.param("kernel", init, (self.config.width, self.config.vocab_size), jnp.float32)


class Decoder(LoraModule):
    """A causal language model: token embedding, stacked blocks, a norm and a head.

    A subclass sets `block` and defines `place` and `norm`.

    Attributes:
        config: A `DecoderConfig`.
    """

    config: Any
    block: ClassVar[type[nn.Module]]

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        mask: Shaped[Array, "batch time"] | None = None,
        positions: Int[Array, "batch time"] | None = None,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: KVCache | int | None = None,
        output: Literal["logits", "hidden"] = "logits",
        deterministic: bool = True,
        neftune_noise_alpha: Numeric = 0.0,
    ) -> tuple[Float[Array, "batch time features"], KVCache | None]:
        """Computes what follows each token; called as `module.apply({"params": params}, tokens, …)`.

        The parameters may have adapters (see `lora.Adapted`).

        Padding, on either side, changes nothing for the real tokens: positions count real tokens, and nobody sees
        padding. Outputs at padding are finite and mean nothing; its ids do not matter, in the vocabulary or not.

        Args:
            tokens: Ids in [0, vocab_size). An id beyond that gives NaN.
            mask: Nonzero for real tokens; None means all.
            positions: Place of each token, instead of the count of real tokens before it. From `context_length` on: NaN.
            segment_ids: For packed rows: a token sees its own segment only, and positions restart in each. The tokens
                of a segment stand together; 0 is padding.
            cache: A `KVCache` from an earlier call to continue from, or an int: start with an empty cache of so many
                slots. The tokens are written into it, and it is returned. Writing past the last slot gives NaN.
            output: "logits", or "hidden" for the states after the final norm: `hidden @ head_kernel(params)` are the
                logits, so that log-probabilities can be computed without an array of [batch, time, vocab].
            deterministic: False turns dropout and noise on; it needs `rngs={"dropout": key}` in `apply`.
            neftune_noise_alpha: α of NEFTune, at least 0: unless deterministic, the embedding of a row of L real tokens
                gets uniform noise in ±α / √(L × hidden) at each of them.

        Returns:
            Logits in float32 [batch, time, vocab], or hidden states in `config.dtype` [batch, time, hidden]; and the
            cache that includes these tokens, or None if `cache` is None.

        Raises:
            ValueError: If more tokens or slots come than there are positions (and none are given), if `segment_ids`
                come with a cache, if a chunk is longer than the cache, or if `output` is unknown.

        References:
            Jain et al., 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914.
        """
        config = self.config
        _check_call(config, tokens, positions, segment_ids, cache, output)
        real = attention.real_tokens(tokens, mask, segment_ids)
        start = layer_cache = visible = None
        if cache is None:
            counted = attention.token_positions(real, segment_ids)
            if mask is not None or segment_ids is not None:
                visible = attention.attention_mask(real, segment_ids)
        else:
            cache = _empty_cache(config, tokens.shape[0], cache) if isinstance(cache, int) else cache
            start, layer_cache = cache.length, (cache.keys, cache.values)
            cache, counted, visible = attention.append_tokens(cache, real)
        positions = jnp.where(real, counted if positions is None else positions, 0)
        if cache is not None:  # jit cannot raise on a full cache: positions out of range answer NaN instead
            positions = jnp.where(cache.length <= cache.mask.shape[1], positions, config.context_length)

        token_embedding = embedding(config, config.vocab_size, "token_embedding")
        hidden = look_up(token_embedding, jnp.where(real, tokens, 0))
        if not deterministic and not (isinstance(neftune_noise_alpha, int | float) and neftune_noise_alpha == 0):
            hidden += embedding_noise(self.make_rng("dropout"), real, config.width, neftune_noise_alpha)
        hidden, rotation = self.place(hidden, positions, deterministic)
        hidden = spread_rows(hidden)
        carry, layers = (hidden, layer_cache), jnp.arange(config.num_layers, dtype=jnp.int32)
        inputs = LayerInputs(visible, start, rotation)
        (hidden, layer_cache), _ = _stack(self.block, config, deterministic)(carry, layers, inputs)
        hidden = self.norm("final_norm")(spread_rows(hidden))
        if cache is not None and layer_cache is not None:
            cache = cache._replace(keys=layer_cache[0], values=layer_cache[1])
        if output == "hidden":
            return hidden, cache
        if config.tie_word_embeddings:
            return _unembed(hidden, token_embedding.embedding), cache
        kernel, dtype = Head(config, name="lm_head")(), jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype), cache

    def place(
        self, hidden: Float[Array, "batch time hidden"], positions: Int[Array, "batch time"], deterministic: bool
    ) -> tuple[Float[Array, "batch time hidden"], Rotation | None]:
        """Adds positions to the embeddings, or returns the rotation that brings them into attention; in `dtype`."""
        raise NotImplementedError

    def norm(self, name: str) -> nn.Module:
        """Makes a norm of this architecture."""
        raise NotImplementedError


def head_kernel(params: Params) -> Float[Array, "hidden vocab"]:
    """Returns the kernel that maps final hidden states to logits: `lm_head` or, if tied, the token embedding.

    Args:
        params: Parameters of a decoder, plain or `Adapted` (the head has no adapter).
    """
    if isinstance(params, Adapted):
        params = params.base
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["token_embedding"]["embedding"].T


def _unembed(
    hidden: Float[Array, "batch time hidden"], embedding: Float[Array, "vocab hidden"]
) -> Float[Array, "batch time vocab"]:
    """Computes hidden states times the transposed embedding, with sums in at least float32.

    On a CPU as the transpose of embedding times hidden states: in the plain order, XLA packs the whole embedding anew for
    each product. The barrier keeps it from turning one into the other.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def plain(hidden: Array, embedding: Array) -> Array:
        return jnp.matmul(hidden, embedding.T, preferred_element_type=dtype)

    def vocabulary_first(hidden: Array, embedding: Array) -> Array:
        axes = (((1,), (hidden.ndim - 1,)), ((), ()))
        logits = jax.lax.dot_general(embedding, hidden, axes, preferred_element_type=dtype)
        return jnp.moveaxis(jax.lax.optimization_barrier(logits), 0, -1)

    arrays = hidden, embedding.astype(hidden.dtype)
    return jax.lax.platform_dependent(*arrays, cpu=vocabulary_first, default=plain)


def spread_rows(hidden: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
    """Keeps rows spread over the devices of the mesh in force (`jax.set_mesh`), if it has the axes `ROW_AXES`.

    What lies where is XLA's choice else, and parameters that are divided would let it divide the features of all rows.
    """
    sizes = _mesh_axes()
    if not sizes:
        return hidden
    divides = hidden.shape[0] % (sizes[ROW_AXES[0]] * sizes[ROW_AXES[1]]) == 0
    return jax.lax.with_sharding_constraint(hidden, jax.sharding.PartitionSpec(ROW_AXES if divides else None))


def _mesh_axes() -> Mapping[str, int]:
    """Tells the sizes of the mesh in force, empty if there is none whose placement is XLA's choice."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or not set(ROW_AXES) <= set(mesh.auto_axes) else mesh.shape


def embedding(config: Any, num_embeddings: int, name: str) -> nn.Embed:
    """Makes a table of embeddings, in float32."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Embed(num_embeddings, config.width, embedding_init=init, name=name)


def look_up(table: nn.Embed, ids: Int[Array, "batch time"]) -> Float[Array, "batch time hidden"]:
    """Looks ids up in a table; NaN where they are out of range. On a mesh the whole table is gathered first.

    (XLA would look up the features that each device has, and then exchange them for rows by way of a copy for all rows.)
    """
    rows = table.embedding
    if _mesh_axes():
        rows = jax.lax.with_sharding_constraint(rows, jax.sharding.PartitionSpec())
    return jnp.take(rows, ids, axis=0)


def embedding_noise(
    key: Key, real: Bool[Array, "batch time"], features: int, alpha: Numeric
) -> Float[Array, "batch time {features}"]:
    """Draws the noise of NEFTune: uniform in ±alpha / √(L × features), L being the number of real tokens of the row."""
    length = jnp.maximum(real.sum(axis=1), 1)[:, None, None]
    noise = jax.random.uniform(key, (*real.shape, features), minval=-1.0, maxval=1.0)
    return jnp.where(real[..., None], noise * alpha / jnp.sqrt(length * features), 0.0)


def _empty_cache(config: DecoderConfig, batch: int, slots: int) -> KVCache:
    return attention.empty_cache(
        layers=config.num_layers,
        batch=batch,
        slots=slots,
        kv_heads=config.kv_heads,
        head_dim=config.head_size,
        dtype=config.dtype,
    )


def _stack(block: type[nn.Module], config: DecoderConfig, deterministic: bool) -> nn.Module:
    """Stacks the blocks: one compiled block, scanned over parameters with a leading layer axis.

    The backward pass always computes again all but the products with parameters, whose results it keeps: to write and read
    the rest (attention weights among it) takes longer. With `remat` it keeps the inputs of the blocks alone.
    """
    kept = None if config.remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    scanned = nn.scan(
        nn.remat(block, prevent_cse=False, policy=kept),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]: flax takes a tuple too
        length=config.num_layers,
    )
    return scanned(config, deterministic, name="blocks")


def _check_call(config, tokens, positions, segment_ids, cache, output) -> None:
    """Refuses, at trace time, what could only give wrong numbers."""
    time = tokens.shape[1]
    if output not in ("logits", "hidden"):
        raise ValueError(f"output must be 'logits' or 'hidden', got {output!r}.")
    if cache is not None and segment_ids is not None:
        raise ValueError("segment_ids cannot be used with a cache: decode unpacked rows, with a mask.")
    slots = time if cache is None else cache if isinstance(cache, int) else cache.mask.shape[1]
    if time > slots:
        raise ValueError(f"cache has {slots} slots, fewer than the {time} tokens of this call: make it longer.")
    longest = max(time, cache) if isinstance(cache, int) else time
    if longest > config.context_length and positions is None:
        raise ValueError(
            f"tokens (with the slots of the cache) are {longest} long, and the model has context_length="
            f"{config.context_length}. Shorten them, or pass positions below context_length."
        )
