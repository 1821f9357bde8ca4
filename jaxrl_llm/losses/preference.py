"""Direct Preference Optimization and its kin: learning from pairs of responses, with a reference policy.

(Not Discovered Policy Optimisation, which reinforcement learning in JAX also calls DPO.)

A loss is put together from three parts: a SCORE of each response (ρ = log π − log π_ref, or its f-divergence), a LINK
that turns the scores of a pair into a loss, and the weighted sum over pairs. `PAIRWISE` and `POINTWISE` say which
method is which link; `jaxrl_llm.losses.links` holds the equations.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxrl_llm.losses import links
from jaxrl_llm.losses.links import LinkOptions, PairwiseLink, PointwiseLink
from jaxrl_llm.reductions import sum_over_axis, token_weights, weighted_sum
from jaxrl_llm.types import Mask, Metrics, Numeric, Scalar

DPOLossType: TypeAlias = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
FDivergence: TypeAlias = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

Margin: TypeAlias = Literal["summed", "averaged", "sorted_pairs", "sorted_responses"]

PAIRWISE: dict[str, tuple[Margin, PairwiseLink]] = {
    "sigmoid": ("summed", links.logistic),
    "hinge": ("summed", links.hinge),
    "ipo": ("averaged", links.squared),
    "exo_pair": ("summed", links.exo),
    "robust": ("summed", links.robust),
    "discopop": ("summed", links.discopop),
    "sigmoid_norm": ("averaged", links.logistic),
    "aot": ("sorted_pairs", links.logistic),
    "aot_unpaired": ("sorted_responses", links.logistic),
}
"""Losses of a margin Δ: which margin (`_margin`), and the link."""

POINTWISE: dict[str, PointwiseLink] = {
    "nca_pair": links.nca,
    "bco_pair": links.bco,
    "sppo_hard": links.sppo,
    "apo_zero": links.apo_zero,
    "apo_down": links.apo_down,
}
"""Losses of the log-ratios ρ of both responses."""

SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired")
"""Losses that read `label_smoothing`."""

SORTED = ("aot", "aot_unpaired")
"""Losses that sort the batch, so that no part of it has a loss of its own."""


class PairWeights(NamedTuple):
    """Weights of `dpo_loss`, made from the whole batch by `dpo_weights`.

    Attributes:
        rows: Of each pair.
        chosen_tokens: Of each token of the pair's chosen response, for the type `sft`.
    """

    rows: Float[Array, " batch"]
    chosen_tokens: Float[Array, " batch"]


def dpo_weights(
    chosen_lengths: Num[Array, " batch"], *, mask: Mask | None = None, axis_name: str | None = None
) -> PairWeights:
    """Makes the weights of `dpo_loss`: the mean over pairs, and over all tokens of the chosen responses.

    Args:
        chosen_lengths: Tokens of each chosen response.
        mask: Nonzero where a pair counts; all if not given.
        axis_name: Mapped axis to count over.
    """
    counts = jnp.ones_like(chosen_lengths, bool) if mask is None else jnp.asarray(mask) != 0
    rows = token_weights(counts, "token_mean", axis_name=axis_name)
    total = sum_over_axis(jnp.sum(chosen_lengths, where=counts), axis_name)
    return PairWeights(rows, jnp.where(counts, 1 / jnp.maximum(total, 1), 0))


def sequence_log_probs(
    log_probs: Float[Array, "batch time"],
    mask: Mask,
    *,
    ld_alpha: Numeric = 1.0,
    shared_lengths: Num[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    r"""Computes the log-probability of each response: the SUM over its tokens.

    With `shared_lengths`, tokens after the first $\min(L_c, L_r)$ count only α: length-desensitised (LD-DPO).

    Args:
        log_probs: Of each token, nats.
        mask: Nonzero on the response.
        ld_alpha: α in [0, 1]; 1 is the plain sum.
        shared_lengths: Length of the shorter response of each row's pair.

    References:
        Liu et al., 2024. https://arxiv.org/abs/2409.06411
    """
    mask = jnp.asarray(mask) != 0
    log_probs = jnp.where(mask, log_probs, 0)
    if shared_lengths is None:
        return log_probs.sum(-1)
    beyond = jnp.cumsum(mask, axis=-1) > shared_lengths[:, None]
    return jnp.where(beyond, ld_alpha * log_probs, log_probs).sum(-1)


def wpo_weights(
    log_probs: Float[Array, "batch time"], log_sum_sq_probs: Float[Array, "batch time"], mask: Mask
) -> Float[Array, " batch"]:
    r"""Computes how likely the policy itself would be to write each response; a pair's weight is the product of its two.

    $$ \exp\Big(\frac1L \sum_t \log p_t(y_t) - \log\textstyle\sum_v p_t(v)^2\Big) $$

    Args:
        log_probs: Of each token under the policy, nats.
        log_sum_sq_probs: Log of the sum of squared probabilities at each token (`log_probs.TokenStatistics`).
        mask: Nonzero on the response.

    Returns:
        One weight for each response, a constant.

    References:
        Zhou et al., 2024, eq. 2. https://arxiv.org/abs/2406.11827
    """
    mask = jnp.asarray(mask) != 0
    aligned = jnp.where(mask, log_probs - log_sum_sq_probs, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
    return jax.lax.stop_gradient(jnp.exp(aligned))


def dpo_loss(
    policy_chosen: Float[Array, " batch"],
    policy_rejected: Float[Array, " batch"],
    ref_chosen: Float[Array, " batch"] | None,
    ref_rejected: Float[Array, " batch"] | None,
    *,
    beta: Numeric,
    loss_type: DPOLossType | Sequence[DPOLossType] = "sigmoid",
    loss_weights: Sequence[Numeric] | None = None,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: Numeric = 0.5,
    label_smoothing: Numeric = 0.0,
    discopop_tau: Numeric = 0.05,
    chosen_lengths: Num[Array, " batch"] | None = None,
    rejected_lengths: Num[Array, " batch"] | None = None,
    chosen_log_probs: Float[Array, " batch"] | None = None,
    pair_weights: Float[Array, " batch"] | None = None,
    weights: Float[Array, " batch"] | PairWeights | None = None,
    axis_name: str | None = None,
) -> tuple[Scalar, Metrics]:
    r"""Computes the Direct Preference Optimization loss of pairs of responses, in any of its variants.

    $$ -(1-\epsilon)\log\sigma(\beta\Delta) - \epsilon\log\sigma(-\beta\Delta), \qquad
       \Delta = (\log\pi_c - \log\pi_{ref,c}) - (\log\pi_r - \log\pi_{ref,r}) $$

    is `sigmoid`; the equations of the other types stand in `jaxrl_llm.losses.links`.

    Args:
        policy_chosen: Log-probability of the chosen response, SUMMED over its tokens (prompt and padding excluded; see
            `sequence_log_probs`), nats, under the policy being trained.
        policy_rejected: The same of the rejected response.
        ref_chosen: The same of the chosen response under the reference, treated as constant; None: reference-free.
        ref_rejected: The same of the rejected response.
        beta: Strength of the pull to the reference: the larger, the closer the policy stays.
        loss_type: One type, or several that are added up (MPO).
        loss_weights: Weight of each type; 1 if not given.
        f_divergence_type: Divergence that holds the policy to the reference. The pointwise types (`nca_pair`,
            `bco_pair`, `sppo_hard`, `apo_zero`, `apo_down`) and those that sort have the reverse KL built in, and take
            no other.
        f_alpha_divergence_coef: α of `alpha_divergence`.
        label_smoothing: ε, the probability that a label is wrong, in [0, 0.5). `exo_pair` needs it above 0 (1e-3);
            `sigmoid` (conservative DPO; TRL ignores it there), `sigmoid_norm`, `robust` and those that sort read it too.
        discopop_tau: τ of `discopop`.
        chosen_lengths: Tokens of each chosen response, for `ipo`, `sigmoid_norm` and `sft`.
        rejected_lengths: Tokens of each rejected response, for `ipo` and `sigmoid_norm`.
        chosen_log_probs: For `sft`, the plain sum of the chosen response where `policy_chosen` is another (LD-DPO).
        pair_weights: Factor of each pair, a constant: the product of the `wpo_weights` of its responses (WPO). In `sft`
            it is that of each of the pair's tokens.
        weights: Made from the whole batch, by `dpo_weights` or `reductions.row_weights`; the mean if not given. `aot`
            and `aot_unpaired` take none: they sort the batch, so it cannot be split.
        axis_name: Mapped axis to count, and sort, over.

    Returns:
        The loss (ln 2 for `sigmoid` where policy and reference agree), and metrics `rewards/chosen`,
        `rewards/rejected` (β times the log-ratio), `rewards/accuracies`, `rewards/margins`, `logps/chosen`,
        `logps/rejected`.

    Raises:
        ValueError: If a name is unknown, or a type lacks what it needs.

    Example:
        >>> zeros = jnp.zeros(2)
        >>> round(float(dpo_loss(zeros, zeros, zeros, zeros, beta=0.1)[0]), 6)
        0.693147

    References:
        Rafailov et al., 2023, eq. 7. https://arxiv.org/abs/2305.18290; Mitchell, 2023 (label smoothing).
        https://ericmitchell.ai/cdpo.pdf; Melnyk et al., 2024 (AOT). https://arxiv.org/abs/2406.05882; Wang et al., 2024
        (MPO). https://arxiv.org/abs/2411.10442
    """
    loss_types = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    loss_weights = (1.0,) * len(loss_types) if loss_weights is None else tuple(loss_weights)
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("dpo_loss got one of ref_chosen and ref_rejected; give both, or neither (reference-free).")
    _check(loss_types, loss_weights, f_divergence_type, label_smoothing)
    sorts = any(name in SORTED for name in loss_types)
    if sorts and not (weights is None and pair_weights is None):
        raise ValueError(f"loss_type={loss_type!r} sorts the whole batch: it takes no weights and no pair_weights.")
    if weights is None:
        lengths = jnp.ones_like(policy_chosen) if chosen_lengths is None else chosen_lengths
        weights = dpo_weights(lengths, axis_name=axis_name)
    rows = weights.rows if isinstance(weights, PairWeights) else weights
    counts = rows != 0
    if ref_chosen is None or ref_rejected is None:
        ref_chosen = ref_rejected = jnp.zeros_like(policy_chosen)
    pairs = _Pairs(
        jnp.where(counts, policy_chosen, 0),
        jnp.where(counts, policy_rejected, 0),
        jax.lax.stop_gradient(jnp.where(counts, ref_chosen, 0)),
        jax.lax.stop_gradient(jnp.where(counts, ref_rejected, 0)),
        chosen_lengths,
        rejected_lengths,
    )
    options = LinkOptions(beta, label_smoothing, discopop_tau)
    divergence = f_divergence_type, f_alpha_divergence_coef
    factor = 1 if pair_weights is None else jax.lax.stop_gradient(jnp.where(counts, pair_weights, 0))

    loss = jnp.zeros((), rows.dtype)
    for name, loss_weight in zip(loss_types, loss_weights, strict=True):
        over = rows
        if name in PAIRWISE:
            margin, link = PAIRWISE[name]
            losses = link(_margin(margin, pairs, divergence, axis_name), options)
        elif name in POINTWISE:
            losses = POINTWISE[name](pairs.chosen, pairs.rejected, options)
        else:  # "sft": the negative log-likelihood of the chosen responses, a mean over their tokens
            losses = -pairs.policy_chosen if chosen_log_probs is None else -jnp.where(counts, chosen_log_probs, 0)
            over = _token_weights(weights, chosen_lengths)
        loss += loss_weight * weighted_sum(losses * factor, over)
    margins = beta * (pairs.chosen - pairs.rejected)
    metrics = {
        "rewards/chosen": weighted_sum(beta * pairs.chosen, rows),
        "rewards/rejected": weighted_sum(beta * pairs.rejected, rows),
        "rewards/accuracies": weighted_sum(margins > 0, rows),
        "rewards/margins": weighted_sum(margins, rows),
        "logps/chosen": weighted_sum(pairs.policy_chosen, rows),
        "logps/rejected": weighted_sum(pairs.policy_rejected, rows),
    }
    return loss, jax.lax.stop_gradient(metrics)


class _Pairs(NamedTuple):
    """Pairs of responses, 0 where they do not count."""

    policy_chosen: Array
    policy_rejected: Array
    ref_chosen: Array
    ref_rejected: Array
    chosen_lengths: Array | None
    rejected_lengths: Array | None

    @property
    def chosen(self) -> Array:
        """ρ of the chosen response."""
        return self.policy_chosen - self.ref_chosen

    @property
    def rejected(self) -> Array:
        """ρ of the rejected response."""
        return self.policy_rejected - self.ref_rejected


def _margin(margin: Margin, pairs: _Pairs, divergence: tuple[str, Numeric], axis_name: str | None) -> Array:
    r"""Computes Δ from the scores s.

    `summed` $s_c - s_r$ · `averaged` $s_c/L_c - s_r/L_r$ · `sorted_pairs` the sorted $\log\pi_c - \log\pi_r$ minus the
    sorted same of the reference · `sorted_responses` the sorted $\rho_c$ minus the sorted $\rho_r$.
    """
    if margin == "sorted_pairs":
        policy = links.sort_over_axis(pairs.policy_chosen - pairs.policy_rejected, axis_name)
        return policy - links.sort_over_axis(pairs.ref_chosen - pairs.ref_rejected, axis_name)
    if margin == "sorted_responses":
        return links.sort_over_axis(pairs.chosen, axis_name) - links.sort_over_axis(pairs.rejected, axis_name)
    chosen, rejected = links.score(pairs.chosen, *divergence), links.score(pairs.rejected, *divergence)
    if margin == "averaged":
        if pairs.chosen_lengths is None or pairs.rejected_lengths is None:
            raise ValueError("loss_type 'ipo' and 'sigmoid_norm' need chosen_lengths and rejected_lengths, in tokens.")
        chosen = chosen / jnp.maximum(pairs.chosen_lengths, 1)
        rejected = rejected / jnp.maximum(pairs.rejected_lengths, 1)
    return chosen - rejected


def _token_weights(weights: Array | PairWeights, chosen_lengths: Array | None) -> Array:
    if not isinstance(weights, PairWeights) or chosen_lengths is None:
        raise ValueError(
            "loss_type='sft' is a mean over tokens: it needs chosen_lengths and, where weights are given, those of "
            "dpo_weights(chosen_lengths)."
        )
    return weights.chosen_tokens


def _check(loss_types: tuple[str, ...], loss_weights: tuple, f_divergence_type: str, label_smoothing: Numeric) -> None:
    for name in loss_types:
        if name not in get_args(DPOLossType):
            raise ValueError(f"loss_type must be one of {get_args(DPOLossType)}, got {name!r}.")
    if len(loss_weights) != len(loss_types):
        raise ValueError(f"loss_weights must have one weight for each of {loss_types}, got {len(loss_weights)}.")
    if f_divergence_type not in get_args(FDivergence):
        raise ValueError(f"f_divergence_type must be one of {get_args(FDivergence)}, got {f_divergence_type!r}.")
    own = [name for name in loss_types if name in POINTWISE or name in SORTED]
    if own and f_divergence_type != "reverse_kl":
        raise ValueError(
            f"loss_type={own[0]!r} has the reverse KL built in, got f_divergence_type={f_divergence_type!r}."
        )
    if "exo_pair" in loss_types and isinstance(label_smoothing, int | float) and label_smoothing <= 0:
        raise ValueError(f"loss_type='exo_pair' needs label_smoothing above 0, such as 1e-3; got {label_smoothing}.")
