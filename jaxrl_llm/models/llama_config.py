"""The shape and run settings of a model of the Llama family."""

import dataclasses
import typing
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import DTypeLike

from jaxrl_llm.models.activations import ACTIVATIONS
from jaxrl_llm.models.attention import Implementation, check_implementation

ModelType: TypeAlias = Literal["llama", "mistral", "qwen2", "qwen3"]


class RopeScaling(NamedTuple):
    """How Llama 3.1 and later stretch their rotary positions beyond the length of their first training.

    Attributes:
        factor: Divides the slow frequencies.
        low_freq_factor: Wavelengths above original length / this are divided in full.
        high_freq_factor: Wavelengths below original length / this stay as they are; between the two, it is interpolated.
        original_max_position_embeddings: Length of the first training, tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and run settings of a Llama, under their Hugging Face names; the defaults are Llama 2 with 7B parameters.

    Attributes:
        model_type: Which of the family. "qwen2" has biases on query, key and value; "qwen3" normalises the queries and
            keys of each head; "mistral" (without its sliding window) is as "llama".
        vocab_size: Number of token ids.
        hidden_size: Width of the hidden states.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Attention heads per block.
        num_key_value_heads: Heads that keys and values have, a divisor of `num_attention_heads`; None: as many.
        head_dim: Width of a head, even; None is hidden_size / num_attention_heads.
        max_position_embeddings: Longest sequence, tokens.
        hidden_act: A key of `ACTIVATIONS`.
        rms_norm_eps: Added to the mean square in every norm.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: Stretching of Llama 3.1 and later; None for none.
        attention_bias: Whether all four projections of attention have biases.
        mlp_bias: Whether those of the MLP do.
        attention_dropout: Probability of dropping an attention weight, when not deterministic.
        initializer_range: Standard deviation of fresh weights.
        tie_word_embeddings: Whether the head is the token embedding.
        bos_token_id: Kept for the checkpoint's config.json; the model does not read it.
        eos_token_id: As `bos_token_id`; may be several.
        pad_token_id: As `bos_token_id`.
        dtype: Type of the computation, a name or a jax dtype; parameters, softmax and logits stay in float32.
        remat: Whether to recompute each block whole in the backward pass. Else the results of products with parameters are
            kept, and the rest is recomputed, attention too.
        attention: As in `GPT2Config`.
    """

    model_type: ModelType = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: DTypeLike = "float32"
    remat: bool = False
    attention: Implementation | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        self._check_choices()
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size where head_dim is None, got "
                f"num_attention_heads={self.num_attention_heads} and hidden_size={self.hidden_size}."
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim must be even, for positions rotate pairs of features; got {self.head_size}.")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, got num_key_value_heads={self.kv_heads} and "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout is a probability in [0, 1), got {self.attention_dropout}.")
        check_implementation(self.attention, self.dtype, self.head_size)

    def _check_choices(self) -> None:
        if self.model_type not in typing.get_args(ModelType):
            raise ValueError(
                f"model_type must be one of {', '.join(typing.get_args(ModelType))}, got {self.model_type!r}."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}.")

    @property
    def context_length(self) -> int:
        """Longest sequence, tokens; every decoder's config has it."""
        return self.max_position_embeddings

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.hidden_size

    @property
    def kv_heads(self) -> int:
        """Heads that keys and values have."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether the queries and keys of each head are normalised."""
        return self.model_type == "qwen3"

    def with_dropout(self, rate: float) -> "LlamaConfig":
        """Sets every dropout that the architecture has: on attention weights."""
        return dataclasses.replace(self, attention_dropout=rate)
