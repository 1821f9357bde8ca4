"""Distillation: a student learns the distributions of a teacher over the vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.divergences import generalized_jsd
from jaxrl_llm.reductions import token_weights, weighted_sum
from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar


def distillation_loss(
    student_logits: Float[Array, "batch time vocab"],
    teacher_logits: Float[Array, "batch time vocab"],
    mask: Mask,
    *,
    beta: Numeric = 0.5,
    temperature: Numeric = 1.0,
    weights: Float[Array, "batch time"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the generalised Jensen-Shannon divergence between teacher and student, averaged over tokens (GKD).

    For long rows or large vocabularies use `divergences.chunked_generalized_jsd`, which takes hidden states, and
    `token_mean_divergence`.

    Args:
        student_logits: Predictions of the model being trained.
        teacher_logits: Predictions of the teacher for the same tokens; treated as constant.
        mask: Nonzero where a token counts.
        beta: 0: forward KL(teacher‖student); 1: reverse KL(student‖teacher); between: the mixture's divergence.
        temperature: Positive divisor of both logits.
        weights: Weight of each token, made from the whole batch; the mean over the mask if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss in nats for each token, and the metric `jsd`, which is the same.

    References:
        Agarwal et al., 2024, eq. 1 and 2 (GKD). https://arxiv.org/abs/2306.13649
    """
    counts = (jnp.asarray(mask) != 0)[..., None]
    student, teacher = (jnp.where(counts, x, 0) for x in (student_logits, jax.lax.stop_gradient(teacher_logits)))
    divergences = generalized_jsd(student, teacher, beta=beta, temperature=temperature)
    return token_mean_divergence(divergences, mask, weights=weights, axis_name=axis_name)


def token_mean_divergence(
    divergences: Float[Array, "batch time"],
    mask: Mask,
    *,
    weights: Float[Array, "batch time"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    """Computes the mean of divergences over the tokens that count; arguments and result as `distillation_loss`."""
    mask = jnp.asarray(mask) != 0
    if weights is None:
        weights = token_weights(mask, "token_mean", axis_name=axis_name)
    loss = weighted_sum(jnp.where(mask, divergences, 0), weights)
    return loss, {"jsd": jax.lax.stop_gradient(loss)}
