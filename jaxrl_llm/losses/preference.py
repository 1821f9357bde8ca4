"""Direct Preference Optimization: learning from pairs, without a reward model and without sampling.

(In reinforcement learning with JAX, "DPO" often means Discovered Policy Optimisation. Here it never does.)
"""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.reductions import row_weights, weighted_sum
from jaxrl_llm.types import Metrics, Numeric, Scalar

DPOLossType: TypeAlias = Literal["sigmoid"]


def dpo_loss(
    policy_chosen: Float[Array, " batch"],
    policy_rejected: Float[Array, " batch"],
    ref_chosen: Float[Array, " batch"],
    ref_rejected: Float[Array, " batch"],
    *,
    beta: Numeric = 0.1,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: Numeric = 0.0,
    weights: Float[Array, " batch"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the Direct Preference Optimization loss of pairs of responses.

    $$ -(1-\epsilon)\log\sigma(\beta\Delta) - \epsilon\log\sigma(-\beta\Delta), \qquad
       \Delta = (\log\pi_c - \log\pi_{ref,c}) - (\log\pi_r - \log\pi_{ref,r}) $$

    Args:
        policy_chosen: Log-probability of the chosen response, SUMMED over its tokens (prompt and padding excluded),
            nats, under the policy being trained.
        policy_rejected: The same of the rejected response.
        ref_chosen: The same of the chosen response under the reference; treated as constant.
        ref_rejected: The same of the rejected response.
        beta: Strength of the pull to the reference: the larger, the closer the policy stays.
        loss_type: `sigmoid` (the paper's).
        label_smoothing: ε, the probability that a label is wrong, in [0, 0.5) (conservative DPO).
        weights: Weight of each pair, made from the whole batch; the mean if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss (ln 2 where policy and reference agree), and metrics `rewards/chosen`, `rewards/rejected` (β times the
        log-ratio), `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected`.

    Raises:
        ValueError: If `loss_type` is unknown.

    Example:
        >>> zeros = jnp.zeros(2)
        >>> round(float(dpo_loss(zeros, zeros, zeros, zeros, beta=0.1)[0]), 6)
        0.693147

    References:
        Rafailov et al., 2023, eq. 7. https://arxiv.org/abs/2305.18290; Mitchell, 2023 (label smoothing).
        https://ericmitchell.ai/cdpo.pdf
    """
    if loss_type not in get_args(DPOLossType):
        raise ValueError(f"loss_type must be one of {get_args(DPOLossType)}, got {loss_type!r}.")
    if weights is None:
        weights = row_weights(policy_chosen, axis_name=axis_name)
    chosen_rewards = beta * (policy_chosen - jax.lax.stop_gradient(ref_chosen))
    rejected_rewards = beta * (policy_rejected - jax.lax.stop_gradient(ref_rejected))
    margins = jnp.where(weights == 0, 0, chosen_rewards - rejected_rewards)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margins) - label_smoothing * jax.nn.log_sigmoid(-margins)
    metrics = {
        "rewards/chosen": weighted_sum(chosen_rewards, weights),
        "rewards/rejected": weighted_sum(rejected_rewards, weights),
        "rewards/accuracies": weighted_sum(margins > 0, weights),
        "rewards/margins": weighted_sum(margins, weights),
        "logps/chosen": weighted_sum(policy_chosen, weights),
        "logps/rejected": weighted_sum(policy_rejected, weights),
    }
    return weighted_sum(losses, weights), jax.lax.stop_gradient(metrics)
