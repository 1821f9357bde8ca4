"""The shape and run settings of a GPT-2."""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import DTypeLike

from jaxrl_llm.models.activations import ACTIVATIONS
from jaxrl_llm.models.attention import Implementation, check_implementation

Size: TypeAlias = Literal["124M", "355M", "774M", "1.5B"]

SIZES: dict[Size, dict[str, Any]] = {
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "355M": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "774M": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "1.5B": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
"""The four released models, by their number of parameters."""


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Shape and run settings of a GPT-2, under their Hugging Face names; the defaults are the 124M model.

    Attributes:
        vocab_size: Number of token ids.
        n_positions: Longest sequence, tokens.
        n_embd: Width of the hidden states.
        n_layer: Number of blocks.
        n_head: Attention heads per block; they divide `n_embd`.
        n_inner: Width inside the MLP; None is 4 × `n_embd`.
        activation_function: A key of `ACTIVATIONS`.
        layer_norm_epsilon: Added to the variance in every layer norm.
        embd_pdrop: Probability of dropping an entry of the embedding, when not deterministic.
        attn_pdrop: The same for attention weights.
        resid_pdrop: The same for what attention and MLP add to the residual stream.
        initializer_range: Standard deviation of fresh weights.
        tie_word_embeddings: Whether the head is the token embedding.
        bos_token_id: Kept for the checkpoint's config.json; the model does not read it.
        eos_token_id: As `bos_token_id`; may be several.
        pad_token_id: As `bos_token_id`.
        dtype: Type of the computation, a name or a jax dtype; parameters, softmax and logits stay in float32.
        remat: Whether to recompute each block whole in the backward pass. Else the results of products with parameters are
            kept, and the rest is recomputed, attention too.
        attention: "xla", "cudnn" (fused; needs an NVIDIA GPU, a 16-bit `dtype`, a head width that is a multiple of 8,
            and even lengths under a mask), or None for jax's own choice (today XLA). Passes with a cache, and those
            with attention dropout, never use cuDNN.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: DTypeLike = "float32"
    remat: bool = False
    attention: Implementation | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd, got n_head={self.n_head} and n_embd={self.n_embd}.")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}, got {self.activation_function!r}."
            )
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a probability in [0, 1), got {getattr(self, name)}.")
        check_implementation(self.attention, self.dtype, self.head_size)

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture."""
        return "gpt2"

    @property
    def context_length(self) -> int:
        """Longest sequence, tokens; every decoder's config has it."""
        return self.n_positions

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.n_layer

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.n_embd

    @property
    def kv_heads(self) -> int:
        """Heads that keys and values have: each head its own."""
        return self.n_head

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        """Width inside the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def with_dropout(self, rate: float) -> "GPT2Config":
        """Sets every dropout that the architecture has."""
        return dataclasses.replace(self, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)

    @classmethod
    def of_size(cls, size: Size, **settings: Any) -> "GPT2Config":
        """Makes the config of a released model; `settings` replace or add to its fields."""
        return cls(**(SIZES[size] | settings))
