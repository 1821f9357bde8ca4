"""One number for every token, on top of a decoder: a reward model, or the value function of PPO."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxrl_llm.models.decoder import Decoder
from jaxrl_llm.models.lora import LoraModule
from jaxrl_llm.types import Key, KVCache, Numeric, Params


class ScalarHead(LoraModule):
    """A decoder with a linear score of each token's final state, instead of logits.

    Parameters are `backbone/…`, the decoder's own without `lm_head`, and `score/kernel` [hidden, 1], which starts normal
    with variance 1 / (hidden + 1), as in the reward models of Stiennon et al. (2020).

    Attributes:
        backbone: The decoder.

    Example:
        >>> import jax
        >>> from jaxrl_llm.models import GPT2, GPT2Config
        >>> decoder = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2))
        >>> tokens = jnp.array([[3, 1, 4, 1]])
        >>> pretrained = decoder.init(jax.random.key(0), tokens)["params"]
        >>> params = scalar_head_params(jax.random.key(1), pretrained)
        >>> values, _ = ScalarHead(decoder).apply({"params": params}, tokens)
        >>> values.shape
        (1, 4)
    """

    backbone: Decoder

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        mask: Shaped[Array, "batch time"] | None = None,
        positions: Int[Array, "batch time"] | None = None,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: KVCache | int | None = None,
        deterministic: bool = True,
        neftune_noise_alpha: Numeric = 0.0,
    ) -> tuple[Float[Array, "batch time"], KVCache | None]:
        """Computes the score of each token in the light of those before it; arguments as in `Decoder`.

        Returns:
            Scores in float32, and the cache as from the decoder.
        """
        hidden, cache = self.backbone(
            tokens,
            mask=mask,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            output="hidden",
            deterministic=deterministic,
            neftune_noise_alpha=neftune_noise_alpha,
        )
        score = nn.Dense(1, use_bias=False, kernel_init=_score_init(hidden.shape[-1]), name="score")
        return score(hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)))[..., 0], cache


def scalar_head_params(key: Key, decoder_params: Params) -> Params:
    """Puts a fresh scalar head on the parameters of a (pretrained) decoder.

    Args:
        key: Key of the new head.
        decoder_params: Those of the decoder; an untied language-model head is left out.

    Returns:
        Parameters of `ScalarHead(decoder)`; the decoder's leaves are shared, not copied.
    """
    backbone = {name: leaf for name, leaf in decoder_params.items() if name != "lm_head"}
    width = decoder_params["token_embedding"]["embedding"].shape[1]
    return {"backbone": backbone, "score": {"kernel": _score_init(width)(key, (width, 1), jnp.float32)}}


def last_token_values(values: Float[Array, "batch time"], mask: Shaped[Array, "batch time"]) -> Float[Array, " batch"]:
    """Picks the value at the last real token of each row: the score of the whole text.

    Args:
        values: A value for each token.
        mask: Nonzero for real tokens; padding may be on either side. A row without any gives 0.

    Example:
        >>> last_token_values(jnp.array([[1.0, 2.0, 3.0]] * 2), jnp.array([[1, 1, 0], [0, 1, 1]])).tolist()
        [2.0, 3.0]
    """
    real: Bool[Array, "batch time"] = mask != 0
    last = values.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    picked = jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]
    return jnp.where(real.any(axis=1), picked, 0.0)


def _score_init(width: int) -> nn.initializers.Initializer:
    return nn.initializers.normal((width + 1) ** -0.5)
