"""Next-token prediction: pretraining and supervised fine-tuning."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.log_probs import TokenStatistics
from jaxrl_llm.reductions import token_weights, weighted_sum
from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar

SFTLossType: TypeAlias = Literal["nll", "dft"]


def cross_entropy_loss(
    log_probs: Float[Array, "*shape"],
    mask: Mask,
    *,
    loss_type: SFTLossType = "nll",
    label_smoothing: Numeric = 0.0,
    z_loss: Numeric = 0.0,
    statistics: TokenStatistics | None = None,
    weights: Float[Array, "*shape"] | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the negative log-likelihood of the tokens that count, averaged over all of them.

    $$ \sum w\,\big[-(1-\epsilon)\log p(y) - \epsilon\,\tfrac1V \textstyle\sum_v \log p(v) + z \log^2 Z\big] $$

    With `dft` the first term is $-\mathrm{sg}(p(y))\log p(y)$: tokens that the model thinks unlikely teach less.

    Args:
        log_probs: Log-probability, in nats, of each token given those before it (already shifted).
        mask: Nonzero where a token is to be learned: the response, with its EOS; not the prompt, not padding.
        loss_type: `nll`, or `dft` (dynamic fine-tuning).
        label_smoothing: ε, the share of the target spread over the vocabulary.
        z_loss: Coefficient z of the squared log-normaliser, which keeps logits from drifting (PaLM: 1e-4).
        statistics: Of the same tokens, see `log_probs.token_statistics`; needed by the two options above, and adds the
            metrics `entropy` and `mean_token_accuracy`.
        weights: Weight of each token, made from the whole batch; the mean over the mask if not given.
        axis_name: Mapped axis to count over when the weights are made here.

    Returns:
        The loss in nats for each token, and metrics `nll`, `num_tokens`, and with statistics `entropy`,
        `mean_token_accuracy`.

    Raises:
        ValueError: If `loss_type` is unknown, or `label_smoothing` or `z_loss` come without `statistics`.

    References:
        Wu et al., 2025 (DFT). https://arxiv.org/abs/2508.05629; Chowdhery et al., 2022 (z-loss).
        https://arxiv.org/abs/2204.02311
    """
    if loss_type not in get_args(SFTLossType):
        raise ValueError(f"loss_type must be one of {get_args(SFTLossType)}, got {loss_type!r}.")
    mask = jnp.asarray(mask) != 0
    if weights is None:
        weights = token_weights(mask, "token_mean", axis_name=axis_name)
    log_probs = jnp.where(mask, log_probs, 0)
    nll = -weighted_sum(log_probs, weights)
    metrics = {"nll": nll, "num_tokens": (weights != 0).sum()}
    loss = nll
    if loss_type == "dft":
        loss = -weighted_sum(jax.lax.stop_gradient(jnp.exp(log_probs)) * log_probs, weights)
    if statistics is None:
        for name, value in {"label_smoothing": label_smoothing, "z_loss": z_loss}.items():
            if not (isinstance(value, int | float) and value == 0):
                raise ValueError(f"{name}={value} needs statistics, see log_probs.token_statistics.")
        return loss, jax.lax.stop_gradient(metrics)
    smooth = -weighted_sum(jnp.where(mask, statistics.mean_log_probs, 0), weights)
    squared = weighted_sum(jnp.where(mask, statistics.logsumexp, 0) ** 2, weights)
    metrics["entropy"] = weighted_sum(statistics.entropy, weights)
    metrics["mean_token_accuracy"] = weighted_sum(statistics.is_argmax, weights)
    loss = (1 - label_smoothing) * loss + label_smoothing * smooth + z_loss * squared
    return loss, jax.lax.stop_gradient(metrics)
