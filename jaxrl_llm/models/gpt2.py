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

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float, Int

from jaxrl_llm.models import attention
from jaxrl_llm.models.activations import ACTIVATIONS
from jaxrl_llm.models.attention import LayerCache, LayerInputs
from jaxrl_llm.models.decoder import Decoder, embedding, look_up
from jaxrl_llm.models.gpt2_config import GPT2Config


class Block(nn.Module):
    """One transformer block: attention, then MLP, each on a normalised copy and added to the residual stream."""

    config: GPT2Config
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
        residual_init = nn.initializers.normal(config.initializer_range / (2 * config.n_layer) ** 0.5)
        dropout = nn.Dropout(config.resid_pdrop, deterministic=self.deterministic)

        qkv = _dense(config, 3 * config.n_embd, "qkv")(_layer_norm(config, "attention_norm")(hidden))
        heads = qkv.reshape(*hidden.shape[:2], 3 * config.n_head, config.head_size)
        query, key, value = jnp.split(heads, 3, axis=2)
        rate = 0.0 if self.deterministic else config.attn_pdrop
        mixed, cache = attention.attend_layer(
            query,
            key,
            value,
            cache,
            layer,
            inputs,
            implementation=config.attention,
            dropout=attention.Dropout(rate, self.make_rng("dropout")) if rate > 0 else None,
        )
        hidden += dropout(_dense(config, config.n_embd, "attention_out", residual_init)(mixed.reshape(hidden.shape)))

        inner = _dense(config, config.inner_size, "mlp_in")(_layer_norm(config, "mlp_norm")(hidden))
        inner = ACTIVATIONS[config.activation_function](inner)
        hidden += dropout(_dense(config, config.n_embd, "mlp_out", residual_init)(inner))
        return (hidden, cache), None


class GPT2(Decoder):
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
    block = Block

    def place(
        self, hidden: Float[Array, "batch time hidden"], positions: Int[Array, "batch time"], deterministic: bool
    ) -> tuple[Float[Array, "batch time hidden"], None]:
        """Adds the position embedding; out of range it answers NaN."""
        config = self.config
        hidden += look_up(embedding(config, config.n_positions, "position_embedding"), positions)
        return nn.Dropout(config.embd_pdrop, deterministic=deterministic)(hidden.astype(config.dtype)), None

    def norm(self, name: str) -> nn.LayerNorm:
        """Makes a layer norm."""
        return _layer_norm(self.config, name)


def _layer_norm(config: GPT2Config, name: str) -> nn.LayerNorm:
    """Normalises in float32; the two-pass variance keeps what the difference of two large means would lose."""
    return nn.LayerNorm(config.layer_norm_epsilon, dtype=config.dtype, use_fast_variance=False, name=name)


def _dense(config: GPT2Config, features: int, name: str, kernel_init: Initializer | None = None) -> nn.Dense:
    kernel_init = kernel_init or nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, dtype=config.dtype, kernel_init=kernel_init, name=name)
