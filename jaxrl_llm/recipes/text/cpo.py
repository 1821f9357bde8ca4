"""Contrastive preference optimization (CPO), SimPO and AlphaPO: preferences without a reference.

    jaxrl-llm cpo --model my/gpt2 --dataset pairs.jsonl --output-dir runs/cpo
    jaxrl-llm cpo --model my/gpt2 --dataset pairs.jsonl --loss-type simpo --cpo-alpha 0 --beta 2 --simpo-gamma 1

Rows have `prompt`, `chosen` and `rejected`. The margin is that of the log-probabilities of both responses, summed over
their tokens, or averaged for ipo and simpo; the negative log-likelihood of the chosen response is added.
"""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float

from jaxrl_llm.log_probs import TokenStatistics
from jaxrl_llm.losses import cpo_loss, cross_entropy_loss, sequence_log_probs
from jaxrl_llm.losses.reference_free import CPOLossType
from jaxrl_llm.recipes.options import LearningRates, require
from jaxrl_llm.recipes.text.language_model import LanguageModel
from jaxrl_llm.recipes.text.offline_task import OfflineOptions, targets
from jaxrl_llm.recipes.text.pairs import (
    Batch,
    averaged,
    batch_weights,
    score_pairs,
    token_metrics,
    train_on_pairs,
)
from jaxrl_llm.types import Key, Mask, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OfflineOptions):
    """Settings of contrastive preference optimization."""

    output_dir: str = "runs/cpo"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str
    """A .json, .jsonl or .parquet file, or the name of a dataset, with `prompt`, `chosen` and `rejected`."""
    loss_type: CPOLossType = "sigmoid"
    """sigmoid (CPO), hinge, ipo or simpo."""
    beta: float = 0.1
    """Scale of the margin; SimPO's paper takes 2 and more."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5)."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks for, in units of reward."""
    alpha: float = 0.0
    """AlphaPO's reshaping of the reward; 0: the log-probability."""
    cpo_alpha: float = 1.0
    """Weight of the likelihood of the chosen response; SimPO has 0."""
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
    require("beta", config.beta, "positive", lambda beta: beta > 0)
    require("label_smoothing", config.label_smoothing, "in [0, 0.5)", lambda share: 0 <= share < 0.5)
    reads = config.loss_type in ("sigmoid", "simpo")
    meant = f"0: {config.loss_type} does not read it"
    require("label_smoothing", config.label_smoothing, meant, lambda share: share == 0 or reads)
    for name in ("simpo_gamma", "cpo_alpha"):
        require(name, getattr(config, name), "at least 0", lambda value: value >= 0)


def make_loss(model: LanguageModel, config: Config):
    """Makes `loss_fn(params, batch, key)`."""
    average = config.loss_type in ("ipo", "simpo")

    def log_probs(statistics: TokenStatistics, mask: Mask) -> Float[Array, " batch"]:
        return averaged(statistics, mask) if average else sequence_log_probs(statistics.log_probs, mask)

    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[Scalar, Metrics]:
        chosen, rejected = score_pairs(model, config, params, batch, key)
        weights = batch_weights(batch) if batch.weights is None else batch.weights
        nll, _ = cross_entropy_loss(chosen.log_probs, targets(batch.chosen), weights=weights.chosen)
        loss, metrics = cpo_loss(
            log_probs(chosen, targets(batch.chosen)),
            log_probs(rejected, targets(batch.rejected)),
            beta=config.beta,
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
            simpo_gamma=config.simpo_gamma,
            alpha=config.alpha,
            nll=nll,
            cpo_alpha=config.cpo_alpha,
            weights=weights.pairs.rows,
        )
        return loss, metrics | token_metrics(chosen, rejected, weights)

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
    return train_on_pairs(config, "CPO", make_loss, show=("nll_loss",))
