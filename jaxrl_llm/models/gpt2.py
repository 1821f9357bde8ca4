"""GPT-2 in Flax Linen, with stacked layers, padding that changes nothing, packed rows and an explicit cache.

The tree of parameters is part of the interface; checkpoints, sharding rules and adapters name its leaves. Those under
`blocks` have the layer as their first axis:

    token_embedding/embedding       [vocab, hidden]
    position_embedding/embedding    [n_positions, hidden]
    blocks/attention_norm           scale, bias [n_layer, hidden]
    blocks/qkv                      kernel [n_layer, hidden, 3 hidden] (query, key, value side by side), bias
    blocks/attention_out            kernel [n_layer, hidden, hidden], bias
    blocks/mlp_norm                 scale, bias [n_layer, hidden]
    blocks/mlp_in, blocks/mlp_out   kernel [n_layer, hidden, n_inner] and back, bias
    final_norm                      scale, bias [hidden]
    lm_head                         kernel [hidden, vocab], only if the head is not tied to token_embedding

References:
    Radford et al., 2019, "Language Models are Unsupervised Multitask Learners".
"""

from typing import Literal, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxrl_llm.models import attention
from jaxrl_llm.models.gpt2_config import ACTIVATIONS, GPT2Config
from jaxrl_llm.types import KVCache, Params

LayerCache: TypeAlias = tuple[Array, Array]
"""Keys and values of all layers, each [layers, batch, slots, heads, head_dim]: the scan over layers carries them."""


class Block(nn.Module):
    """One transformer block: attention, then MLP, each on a normalised copy and added to the residual stream."""

    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "batch time hidden"], LayerCache | None],
        layer: Int[Array, ""],
        visible: Bool[Array, "batch 1 time slots"] | None,
        start: Int[Array, ""] | None,
    ) -> tuple[tuple[Float[Array, "batch time hidden"], LayerCache | None], None]:
        """Maps (hidden states, cache of all layers) through this layer; signature and result are those of a scan."""
        config, (hidden, cache) = self.config, carry
        residual_init = nn.initializers.normal(config.initializer_range / (2 * config.n_layer) ** 0.5)
        dropout = nn.Dropout(config.resid_pdrop, deterministic=self.deterministic)

        qkv = _dense(config, 3 * config.n_embd, "qkv")(_layer_norm(config, "attention_norm")(hidden))
        mixed, cache = self._attend(qkv, cache, layer, visible, start)
        hidden += dropout(_dense(config, config.n_embd, "attention_out", residual_init)(mixed))

        inner = _dense(config, config.inner_size, "mlp_in")(_layer_norm(config, "mlp_norm")(hidden))
        inner = ACTIVATIONS[config.activation_function](inner)
        hidden += dropout(_dense(config, config.n_embd, "mlp_out", residual_init)(inner))
        return (hidden, cache), None

    def _attend(self, qkv, cache, layer, visible, start):
        """Attends over the tokens of this pass or, with a cache, over all slots of this layer after writing them."""
        config, (batch, time, _) = self.config, qkv.shape
        query, key, value = jnp.split(qkv.reshape(batch, time, 3 * config.n_head, config.head_size), 3, axis=2)
        is_causal, implementation, dropout = cache is None, config.attention, None
        if cache is not None:
            keys, key = attention.write_layer(cache[0], layer, start, key)
            values, value = attention.write_layer(cache[1], layer, start, value)
            cache, implementation = (keys, values), "xla"
        if config.attn_pdrop > 0 and not self.deterministic:
            dropout = attention.Dropout(config.attn_pdrop, self.make_rng("dropout"))
        mixed = attention.attend(
            query, key, value, visible, is_causal=is_causal, implementation=implementation, dropout=dropout
        )
        return mixed.reshape(batch, time, config.n_embd), cache


class Head(nn.Module):
    """Holds the kernel of a language-model head that is not tied to the token embedding."""

    config: GPT2Config

    @nn.compact
    def __call__(self) -> Float[Array, "hidden vocab"]:
        """Returns the kernel."""
        init = nn.initializers.normal(self.config.initializer_range)
        return self.param("kernel", init, (self.config.n_embd, self.config.vocab_size))


class GPT2(nn.Module):
    """GPT-2 with a language-model head.

    Example:
        >>> import jax
        >>> module = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2))
        >>> tokens = jnp.array([[3, 1, 4, 1]])
        >>> params = module.init(jax.random.key(0), tokens)["params"]
        >>> logits, _ = module.apply({"params": params}, tokens)
        >>> logits.shape
        (1, 4, 11)
        >>> _, cache = module.apply({"params": params}, tokens[:, :3], cache=8)  # 8 empty slots, 3 of them written
        >>> last, cache = module.apply({"params": params}, tokens[:, 3:], cache=cache)
        >>> bool(jnp.allclose(last, logits[:, 3:], atol=1e-6)), int(cache.length)
        (True, 4)
    """

    config: GPT2Config

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
    ) -> tuple[Float[Array, "batch time features"], KVCache | None]:
        """Computes what follows each token; called as `module.apply({"params": params}, tokens, …)`.

        Padding, on either side, changes nothing for the real tokens: positions count real tokens, and nobody sees
        padding. Outputs at padding are finite and mean nothing; its ids do not matter, in the vocabulary or not.

        Args:
            tokens: Ids in [0, vocab_size). An id beyond that gives NaN.
            mask: Nonzero for real tokens; None means all.
            positions: Index into the position embedding, instead of the count of real tokens. Beyond n_positions: NaN.
            segment_ids: For packed rows: a token sees its own segment only, and positions restart in each. The tokens
                of a segment stand together; 0 is padding.
            cache: A `KVCache` from an earlier call to continue from, or an int: start with an empty cache of so many
                slots. The tokens are written into it, and it is returned. Writing past the last slot gives NaN.
            output: "logits", or "hidden" for the states after the final norm: `hidden @ head_kernel(params)` are the
                logits, so that log-probabilities can be computed without an array of [batch, time, vocab].
            deterministic: False turns dropout on; it needs `rngs={"dropout": key}` in `apply`.

        Returns:
            Logits in float32 [batch, time, vocab], or hidden states in `config.dtype` [batch, time, hidden]; and the
            cache that includes these tokens, or None if `cache` is None.

        Raises:
            ValueError: If more tokens or slots come than there are positions (and none are given), if `segment_ids`
                come with a cache, if a chunk is longer than the cache, or if `output` is unknown.
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
            cache = self._empty_cache(tokens.shape[0], cache) if isinstance(cache, int) else cache
            start, layer_cache = cache.length, (cache.keys, cache.values)
            cache, counted, visible = attention.append_tokens(cache, real)
        positions = jnp.where(real, counted if positions is None else positions, 0)
        if cache is not None:  # jit cannot raise on a full cache: positions out of range answer NaN instead
            positions = jnp.where(cache.length <= cache.mask.shape[1], positions, config.n_positions)

        token_embedding = _embedding(config, config.vocab_size, "token_embedding")
        position_embedding = _embedding(config, config.n_positions, "position_embedding")
        hidden = token_embedding(jnp.where(real, tokens, 0)) + position_embedding(positions)
        hidden = nn.Dropout(config.embd_pdrop, deterministic=deterministic)(hidden.astype(config.dtype))
        carry, layers = (hidden, layer_cache), jnp.arange(config.n_layer, dtype=jnp.int32)
        (hidden, layer_cache), _ = _stack(config, deterministic)(carry, layers, visible, start)
        hidden = _layer_norm(config, "final_norm")(hidden)
        if cache is not None:
            cache = cache._replace(keys=layer_cache[0], values=layer_cache[1])
        if output == "hidden":
            return hidden, cache
        kernel = token_embedding.embedding.T if config.tie_word_embeddings else Head(config, name="lm_head")()
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype), cache

    def _empty_cache(self, batch: int, slots: int) -> KVCache:
        config = self.config
        return attention.empty_cache(
            layers=config.n_layer,
            batch=batch,
            slots=slots,
            kv_heads=config.n_head,
            head_dim=config.head_size,
            dtype=config.dtype,
        )


def head_kernel(params: Params) -> Float[Array, "hidden vocab"]:
    """Returns the kernel that maps final hidden states to logits: `lm_head` or, if tied, the token embedding."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["token_embedding"]["embedding"].T


def _layer_norm(config: GPT2Config, name: str) -> nn.LayerNorm:
    """Normalises in float32; the two-pass variance keeps what the difference of two large means would lose."""
    return nn.LayerNorm(config.layer_norm_epsilon, dtype=config.dtype, use_fast_variance=False, name=name)


def _dense(config: GPT2Config, features: int, name: str, kernel_init: Initializer | None = None) -> nn.Dense:
    kernel_init = kernel_init or nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, dtype=config.dtype, kernel_init=kernel_init, name=name)


def _embedding(config: GPT2Config, num_embeddings: int, name: str) -> nn.Embed:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Embed(num_embeddings, config.n_embd, embedding_init=init, name=name)


def _stack(config: GPT2Config, deterministic: bool) -> nn.Module:
    """Stacks the blocks: one compiled block, scanned over parameters with a leading layer axis."""
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]: flax takes a tuple too
        length=config.n_layer,
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
    if longest > config.n_positions and positions is None:
        raise ValueError(
            f"tokens (with the slots of the cache) are {longest} long, and the model has n_positions="
            f"{config.n_positions}. Shorten them, or pass positions below n_positions."
        )
