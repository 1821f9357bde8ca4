"""Direct Preference Optimization: learn from pairs of responses which one to prefer.

    jaxrl-llm dpo --model my/gpt2 --dataset pairs.jsonl --output-dir runs/dpo
    jaxrl-llm dpo --model my/gpt2 --dataset pairs.jsonl --loss-type sigmoid bco_pair sft --loss-weights 0.8 0.2 1

Rows have `prompt`, `chosen` and `rejected`. The log-probability of a response is SUMMED over its tokens, with its EOS;
the reference is the model as it was at the start. (Not the Discovered Policy Optimisation of reinforcement learning.)
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxrl_llm.log_probs import TokenStatistics
from jaxrl_llm.losses import dpo_loss, sequence_log_probs, wpo_weights
from jaxrl_llm.losses.preference import POINTWISE, SMOOTHED, SORTED, DPOLossType, FDivergence
from jaxrl_llm.recipes.options import LearningRates, require
from jaxrl_llm.recipes.text.language_model import LanguageModel
from jaxrl_llm.recipes.text.offline_task import OfflineOptions, ReferenceOptions, targets
from jaxrl_llm.recipes.text.pairs import (
    Batch,
    ResponseLogProbs,
    batch_weights,
    score_pairs,
    token_metrics,
    train_on_pairs,
)
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OfflineOptions, ReferenceOptions):
    """Settings of Direct Preference Optimization."""

    output_dir: str = "runs/dpo"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str
    """A .json, .jsonl or .parquet file, or the name of a dataset, with `prompt`, `chosen` and `rejected`."""
    beta: float = 0.1
    """Strength of the pull to the reference: the larger, the closer the model stays to where it began."""
    loss_type: tuple[DPOLossType, ...] = ("sigmoid",)
    """The paper's loss, or others; several are added up (MPO)."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each loss type; empty: 1."""
    f_divergence_type: FDivergence = "reverse_kl"
    """Divergence that holds the model to the reference."""
    f_alpha_divergence_coef: float = 0.5
    """α of alpha_divergence."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5); exo_pair needs it above 0, such as 1e-3."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""
    ld_alpha: float = 1.0
    """Weight of what a response has beyond the length of the other (LD-DPO); 1: as all other tokens."""
    use_weighting: bool = False
    """Weigh each pair by how likely the model is to write it (WPO)."""
    reference_free: bool = False
    """Compare with no reference."""
    learning_rate: float | None = None
    """Peak learning rate; None: 1e-6, of adapters 1e-5. Small new models need far more."""
    default_learning_rates: ClassVar = LearningRates(new=1e-6, full=1e-6, adapters=1e-5)
    per_device_train_batch_size: int = 8
    """Pairs of a step."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_offline()
    config.validate_reference()
    types = config.loss_type
    require("beta", config.beta, "positive", lambda beta: beta > 0)
    require("loss_type", types, "at least one type", bool)
    require("loss_weights", config.loss_weights, f"one for each of {types}", lambda w: not w or len(w) == len(types))
    smallest = "above 0 for exo_pair, such as 1e-3, and below 0.5" if "exo_pair" in types else "in [0, 0.5)"
    require(
        "label_smoothing",
        config.label_smoothing,
        smallest,
        lambda share: 0 <= share < 0.5 and (share > 0 or "exo_pair" not in types),
    )
    moving = config.reference_free and (config.precompute_ref_log_probs or config.sync_ref_model)
    require("reference_free", moving, "false with precompute_ref_log_probs and sync_ref_model", lambda both: not both)
    require("ld_alpha", config.ld_alpha, "in [0, 1]", lambda alpha: 0 <= alpha <= 1)
    if any(name in SORTED for name in types):
        whole = "1 for aot and aot_unpaired, which sort the whole batch"
        require("gradient_accumulation_steps", config.gradient_accumulation_steps, whole, lambda parts: parts == 1)
        require("use_weighting", config.use_weighting, "false for aot and aot_unpaired", lambda weighs: not weighs)
    own = [name for name in types if name in POINTWISE or name in SORTED]
    meant = f"reverse_kl for {own[0]}, which has it built in" if own else ""
    require("f_divergence_type", config.f_divergence_type, meant, lambda name: name == "reverse_kl" or not own)
    smoothed = [name for name in types if name in SMOOTHED]
    meant = f"0: none of {types} reads it (only {', '.join(SMOOTHED)} do)"
    require("label_smoothing", config.label_smoothing, meant, lambda share: share == 0 or len(smoothed) > 0)


def response_log_probs(
    config: Config, batch: Batch, chosen: TokenStatistics, rejected: TokenStatistics
) -> ResponseLogProbs:
    """Sums log-probabilities over responses."""
    masks = targets(batch.chosen), targets(batch.rejected)
    shared = jnp.minimum(masks[0].sum(-1), masks[1].sum(-1))
    return ResponseLogProbs(
        *(
            sequence_log_probs(statistics.log_probs, mask, ld_alpha=config.ld_alpha, shared_lengths=shared)
            for statistics, mask in zip((chosen, rejected), masks, strict=True)
        )
    )


def make_reference(model: LanguageModel, config: Config):
    """Makes `reference_fn(params, batch) -> ResponseLogProbs`; None if the loss has no reference."""
    if config.reference_free:
        return None

    def reference_fn(params: Params, batch: Batch) -> ResponseLogProbs:
        return response_log_probs(config, batch, *score_pairs(model, config, params, batch))

    return reference_fn


def make_loss(model: LanguageModel, config: Config):
    """Makes `loss_fn(params, batch, key)`."""
    splits = not any(name in SORTED for name in config.loss_type)

    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[Scalar, Metrics]:
        chosen, rejected = score_pairs(model, config, params, batch, key)
        masks = targets(batch.chosen), targets(batch.rejected)
        likely = [
            wpo_weights(statistics.log_probs, statistics.log_sum_sq_probs, mask)
            for statistics, mask in zip((chosen, rejected), masks, strict=True)
        ]
        weights = batch_weights(batch) if batch.weights is None else batch.weights
        loss, metrics = dpo_loss(
            *response_log_probs(config, batch, chosen, rejected),
            *((None, None) if batch.reference is None else batch.reference),
            beta=config.beta,
            loss_type=config.loss_type,
            loss_weights=config.loss_weights or None,
            f_divergence_type=config.f_divergence_type,
            f_alpha_divergence_coef=config.f_alpha_divergence_coef,
            label_smoothing=config.label_smoothing,
            discopop_tau=config.discopop_tau,
            chosen_lengths=masks[0].sum(-1),
            rejected_lengths=masks[1].sum(-1),
            chosen_log_probs=sequence_log_probs(chosen.log_probs, masks[0]),
            pair_weights=likely[0] * likely[1] if config.use_weighting else None,
            weights=weights.pairs if splits else None,
        )
        return loss, metrics | jax.lax.stop_gradient(token_metrics(chosen, rejected, weights))

    return loss_fn


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `eval_loss`, `eval_rewards/accuracies` and the other metrics on the held-out pairs; of a complete run `model`
        (folder of the trained model).

    Raises:
        ValueError: If a setting or a row of the data is wrong.
    """
    validate(config)
    sorts = any(name in SORTED for name in config.loss_type)
    return train_on_pairs(
        config,
        "DPO",
        make_loss,
        weights_fn=None if sorts else batch_weights,
        make_reference=make_reference,
        reference=config,
        show=("rewards/margins",),
    )
