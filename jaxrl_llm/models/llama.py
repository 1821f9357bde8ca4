"""The Llama family in Flax Linen: Llama 2 and 3, SmolLM2, Mistral without a sliding window, Qwen2 and Qwen3.

The tree of parameters is part of the interface; checkpoints, sharding rules and adapters name its leaves. Those under
`blocks` have the layer as their first axis:

    token_embedding/embedding           [vocab, hidden]
    blocks/attention_norm               scale [layers, hidden]
    blocks/query                        kernel [layers, hidden, heads × head_dim]; bias in Qwen2
    blocks/key, blocks/value            kernel [layers, hidden, kv_heads × head_dim]; bias in Qwen2
    blocks/query_norm, blocks/key_norm  scale [layers, head_dim], only in Qwen3
    blocks/attention_out                kernel [layers, heads × head_dim, hidden]
    blocks/mlp_norm                     scale [layers, hidden]
    blocks/mlp_gate, blocks/mlp_in      kernel [layers, hidden, intermediate]
    blocks/mlp_out                      kernel [layers, intermediate, hidden]
    final_norm                          scale [hidden]
    lm_head                             kernel [hidden, vocab], only if the head is not tied to token_embedding

References:
    Touvron et al., 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models", arXiv 2307.09288.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.typing import Initializer
from jaxtyping import Array, Float, Int

from jaxrl_llm.models import attention
from jaxrl_llm.models.activations import ACTIVATIONS
from jaxrl_llm.models.attention import LayerCache, LayerInputs, Rotation
from jaxrl_llm.models.decoder import Decoder
from jaxrl_llm.models.llama_config import LlamaConfig


class Block(nn.Module):
    """One transformer block: attention, then a gated MLP, each on a normalised copy and added to the residual stream."""

    config: LlamaConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "batch time hidden"], LayerCache | None],
        layer: Int[Array, ""],
        inputs: LayerInputs,
    ) -> tuple[tuple[Float[Array, "batch time hidden"], LayerCache | None], None]:
        """Maps (hidden states, cache of all layers) through this layer; signature and result are those of a scan."""
        config, (hidden, cache) = self.config, carry
        residual_init = nn.initializers.normal(config.initializer_range / (2 * config.num_layers) ** 0.5)
        width = config.head_size * config.num_attention_heads

        mixed, cache = self._attend(_rms_norm(config, "attention_norm")(hidden), cache, layer, inputs)
        mixed = mixed.reshape(*hidden.shape[:2], width)
        hidden += _dense(config, config.width, "attention_out", config.attention_bias, residual_init)(mixed)

        states = _rms_norm(config, "mlp_norm")(hidden)
        gate = _dense(config, config.intermediate_size, "mlp_gate", config.mlp_bias)(states)
        inner = _dense(config, config.intermediate_size, "mlp_in", config.mlp_bias)(states)
        inner *= ACTIVATIONS[config.hidden_act](gate)
        hidden += _dense(config, config.width, "mlp_out", config.mlp_bias, residual_init)(inner)
        return (hidden, cache), None

    def _attend(self, states, cache, layer, inputs):
        """Projects, normalises in Qwen3, rotates and attends."""
        config = self.config

        def project(heads: int, name: str) -> Array:
            flat = _dense(config, heads * config.head_size, name, config.qkv_bias)(states)
            return flat.reshape(*states.shape[:2], heads, config.head_size)

        query = project(config.num_attention_heads, "query")
        key, value = project(config.kv_heads, "key"), project(config.kv_heads, "value")
        if config.qk_norm:
            query, key = _rms_norm(config, "query_norm")(query), _rms_norm(config, "key_norm")(key)
        rate = 0.0 if self.deterministic else config.attention_dropout
        return attention.attend_layer(
            rotate(query, inputs.rotation),
            rotate(key, inputs.rotation),
            value,
            cache,
            layer,
            inputs,
            implementation=config.attention,
            dropout=attention.Dropout(rate, self.make_rng("dropout")) if rate > 0 else None,
        )


class Llama(Decoder):
    """A model of the Llama family with a language-model head.

    Example:
        >>> import jax
        >>> config = LlamaConfig(
        ...     vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8,
        ... )
        >>> module, tokens = Llama(config), jnp.array([[3, 1, 4, 1]])
        >>> params = module.init(jax.random.key(0), tokens)["params"]
        >>> logits, _ = module.apply({"params": params}, tokens)
        >>> logits.shape
        (1, 4, 11)
        >>> _, cache = module.apply({"params": params}, tokens[:, :3], cache=8)
        >>> cache.keys.shape  # layers, batch, key-value heads, slots, head_dim
        (2, 1, 2, 8, 2)
    """

    config: LlamaConfig
    block = Block

    def place(
        self, hidden: Float[Array, "batch time hidden"], positions: Int[Array, "batch time"], deterministic: bool
    ) -> tuple[Float[Array, "batch time hidden"], Rotation]:
        """Returns the embeddings as they are, and the rotation of the positions; out of range it is NaN."""
        positions = jnp.where(positions < self.config.context_length, positions, jnp.nan)
        return hidden.astype(self.config.dtype), rotation(positions, rotary_frequencies(self.config))

    def norm(self, name: str) -> nn.RMSNorm:
        """Makes a root-mean-square norm."""
        return _rms_norm(self.config, name)


def rotary_frequencies(config: LlamaConfig) -> np.ndarray:
    """Computes the angle, in radians, by which each pair of features turns from one token to the next.

    It is rope_theta^(−2i / head_dim) for pair i; with `rope_scaling`, slow pairs turn more slowly still.

    Returns:
        Float32 [head_dim / 2].

    References:
        Su et al., 2021, "RoFormer", arXiv 2104.09864; the scaling is that of Llama 3.1 (arXiv 2407.21783).
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_size, 2) / config.head_size)
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)  # over the original length
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = np.clip(smooth, 0, 1)
        frequencies = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return frequencies.astype(np.float32)


def rotation(positions: Float[Array, "batch time"], frequencies: np.ndarray) -> Rotation:
    """Computes cosine and sine of position × frequency, for all heads alike."""
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(frequencies)[None, None, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(
    heads: Float[Array, "batch time heads head_dim"], rotation: Rotation
) -> Float[Array, "batch time heads head_dim"]:
    """Turns the pair (i, i + head_dim / 2) of each head; the layout is Hugging Face's."""
    dtype = jnp.promote_types(heads.dtype, rotation.cos.dtype)
    first, second = jnp.split(heads.astype(dtype), 2, axis=-1)
    cos, sin = rotation
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)


def _rms_norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
    """Normalises in float32."""
    return nn.RMSNorm(config.rms_norm_eps, dtype=config.dtype, name=name)


def _dense(
    config: LlamaConfig, features: int, name: str, use_bias: bool, kernel_init: Initializer | None = None
) -> nn.Dense:
    kernel_init = kernel_init or nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, use_bias=use_bias, dtype=config.dtype, kernel_init=kernel_init, name=name)
