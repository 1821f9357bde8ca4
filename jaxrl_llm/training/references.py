"""The reference policy that follows the model (TR-DPO)."""

import optax
from jaxtyping import Array, Int

from jaxrl_llm.types import Numeric, Params


def sync_reference(
    ref_params: Params,
    params: Params,
    step: Int[Array, ""],
    *,
    mixup_alpha: Numeric = 0.6,
    sync_steps: Numeric = 512,
) -> Params:
    r"""Moves the reference to $\alpha\,\theta + (1-\alpha)\,\theta_{ref}$ in every `sync_steps`-th step.

    Args:
        ref_params: Parameters of the reference.
        params: Parameters of the model.
        step: Number of steps made, at least 1.
        mixup_alpha: α in (0, 1]; 1 copies the model (a hard update).
        sync_steps: Steps between two updates.

    Returns:
        The reference of the next step.

    References:
        Gorbatovski et al., 2024. https://arxiv.org/abs/2404.09656
    """
    mixed = optax.incremental_update(params, ref_params, mixup_alpha)
    return optax.periodic_update(mixed, ref_params, step, sync_steps)
