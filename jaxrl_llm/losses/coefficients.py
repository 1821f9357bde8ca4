"""Coefficients that follow a target, as pure functions of a state that the caller keeps and saves."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.types import Numeric, Scalar


class EntropyCoefState(NamedTuple):
    """State of the adaptive entropy bonus.

    Attributes:
        coef: The coefficient that the rule moves.
        entropy: Mean entropy of the last update, nats; infinite before the first.
    """

    coef: Scalar
    entropy: Scalar


def init_entropy_coef(coef: Numeric = 0.0) -> EntropyCoefState:
    """Makes the state that a run starts with; `coef` is `entropy_coef`."""
    return EntropyCoefState(jnp.asarray(coef, jnp.result_type(float)), jnp.asarray(jnp.inf, jnp.result_type(float)))


def applied_entropy_coef(state: EntropyCoefState, *, entropy_target: Numeric = 0.2) -> Scalar:
    """Computes the `entropy_coef` of the next update: the coefficient where the entropy is too low, else 0."""
    return jnp.where(state.entropy <= entropy_target, state.coef, 0)


def update_entropy_coef(
    state: EntropyCoefState,
    entropy: Numeric,
    *,
    entropy_target: Numeric = 0.2,
    entropy_coef_delta: Numeric = 0.005,
    entropy_coef_min: Numeric = 0.0,
    entropy_coef_max: Numeric = 1.0,
) -> EntropyCoefState:
    """Moves the coefficient up by a step where the entropy is at or below its target, else down; within its bounds.

    Args:
        state: Before the update.
        entropy: Mean entropy over all tokens of the update (the metric `entropy`, summed over parts and devices), nats.
        entropy_target: What to hold the entropy at, nats.
        entropy_coef_delta: Step.
        entropy_coef_min: Lowest coefficient.
        entropy_coef_max: Highest coefficient.

    References:
        He et al., 2025, section 3 (Skywork-OR1). https://arxiv.org/abs/2505.22312
    """
    up = jnp.minimum(state.coef + entropy_coef_delta, entropy_coef_max)
    down = jnp.maximum(state.coef - entropy_coef_delta, entropy_coef_min)
    return EntropyCoefState(jnp.where(entropy <= entropy_target, up, down), jnp.asarray(entropy, state.entropy.dtype))


class KLCoefState(NamedTuple):
    """State of the adaptive KL coefficient: `kl_coef` itself."""

    kl_coef: Scalar


def init_kl_coef(kl_coef: Numeric = 0.2) -> KLCoefState:
    """Makes the state that a run starts with."""
    return KLCoefState(jnp.asarray(kl_coef, jnp.result_type(float)))


def update_kl_coef(
    state: KLCoefState, kl: Numeric, num_episodes: Numeric, *, kl_target: Numeric = 6.0, horizon: Numeric = 10_000
) -> KLCoefState:
    r"""Computes $\beta (1 + \mathrm{clip}(\mathrm{KL}/\mathrm{target} - 1, -0.2, 0.2)\, n / \mathrm{horizon})$.

    Args:
        state: Before the update.
        kl: Mean over the responses of the KL to the reference, summed over tokens, nats.
        num_episodes: n, responses since the last update.
        kl_target: What to hold the KL at, nats a response.
        horizon: Episodes over which a KL that is 20 % off or more moves the coefficient by a fifth.

    References:
        Ziegler et al., 2019, section 2.2. https://arxiv.org/abs/1909.08593
    """
    error = jnp.clip(kl / kl_target - 1, -0.2, 0.2)
    return KLCoefState(state.kl_coef * (1 + error * num_episodes / horizon))
