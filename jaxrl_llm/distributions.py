"""Distributions of actions: a categorical for discrete actions, a diagonal Gaussian for continuous ones.

A policy network gives their parameters, `logits` or `(mean, log_std)`; `make_distribution` tells which it is. The rest of
the library sees `sample`, `mode`, `log_prob`, `entropy` and `kl` alone.
"""

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.divergences import categorical_kl, gaussian_kl
from jaxrl_llm.log_probs import token_entropy, token_log_probs
from jaxrl_llm.types import Key

PolicyOutput: TypeAlias = Array | tuple[Array, Array]
"""What a policy network returns: logits, or mean and logarithm of the standard deviation of each action dimension."""


class Categorical(NamedTuple):
    """One of finitely many actions, with probabilities softmax(logits)."""

    logits: Float[Array, "*shape actions"]

    def sample(self, key: Key) -> Int[Array, "*shape"]:
        """Draws actions; the key is consumed."""
        return jax.random.categorical(key, self.logits)

    def mode(self) -> Int[Array, "*shape"]:
        """Gives the most likely actions."""
        return jnp.argmax(self.logits, axis=-1)

    def log_prob(self, action: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Computes log-probabilities, in nats."""
        return token_log_probs(self.logits, action)

    def entropy(self) -> Float[Array, "*shape"]:
        """Computes the entropy, in nats."""
        return token_entropy(self.logits)

    def kl(self, other: "Categorical") -> Float[Array, "*shape"]:
        """Computes the exact KL(self || other), in nats."""
        return categorical_kl(self.logits, other.logits)


class DiagonalGaussian(NamedTuple):
    """A vector of independent normal variables.

    An action out of range is clipped on the way into the environment; its density stays that of what was drawn.
    """

    mean: Float[Array, "*shape actions"]
    log_std: Float[Array, "*shape actions"]

    def sample(self, key: Key) -> Float[Array, "*shape actions"]:
        """Draws actions; the key is consumed."""
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> Float[Array, "*shape actions"]:
        """Gives the mean."""
        return self.mean

    def log_prob(self, action: Float[Array, "*shape actions"]) -> Float[Array, "*shape"]:
        """Computes the logarithms of the densities, in nats."""
        scaled = (action - self.mean) * jnp.exp(-self.log_std)
        return -jnp.sum(scaled**2 / 2 + self.log_std + math.log(2 * math.pi) / 2, axis=-1)

    def entropy(self) -> Float[Array, "*shape"]:
        """Computes the differential entropy, in nats; it may be negative."""
        return jnp.sum(self.log_std + (1 + math.log(2 * math.pi)) / 2, axis=-1)

    def kl(self, other: "DiagonalGaussian") -> Float[Array, "*shape"]:
        """Computes the exact KL(self || other), in nats."""
        return gaussian_kl(self.mean, self.log_std, other.mean, other.log_std)


def make_distribution(output: PolicyOutput) -> Categorical | DiagonalGaussian:
    """Makes the distribution that a policy network describes.

    Args:
        output: Logits, or (mean, log_std).

    Example:
        >>> make_distribution(jnp.zeros(4)).entropy().round(4)
        Array(1.3863, dtype=float32)
    """
    return DiagonalGaussian(*output) if isinstance(output, tuple) else Categorical(output)
