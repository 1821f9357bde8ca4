"""Odds-ratio preference optimization (ORPO): fine-tuning and preferences in one loss, without a reference.

    jaxrl-llm orpo --model my/gpt2 --dataset pairs.jsonl --output-dir runs/orpo

Rows have `prompt`, `chosen` and `rejected`. The loss is the negative log-likelihood of prompt and chosen response, minus
beta times the log-sigmoid of the log-odds ratio of both responses, whose log-probabilities are averaged over tokens.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jaxrl_llm.losses import cross_entropy_loss, orpo_loss
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
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OfflineOptions):
    """Settings of odds-ratio preference optimization."""

    output_dir: str = "runs/orpo"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str
    """A .json, .jsonl or .parquet file, or the name of a dataset, with `prompt`, `chosen` and `rejected`."""
    beta: float = 0.1
    """Weight of the odds ratio (λ in the paper)."""
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


def make_loss(model: LanguageModel, config: Config):
    """Makes `loss_fn(params, batch, key)`."""

    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[Scalar, Metrics]:
        chosen, rejected = score_pairs(model, config, params, batch, key)
        weights = batch_weights(batch) if batch.weights is None else batch.weights
        nll, _ = cross_entropy_loss(
            chosen.log_probs, jnp.asarray(batch.chosen.mask)[:, 1:], weights=weights.chosen_text
        )
        loss, metrics = orpo_loss(
            averaged(chosen, targets(batch.chosen)),
            averaged(rejected, targets(batch.rejected)),
            nll,
            beta=config.beta,
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
    return train_on_pairs(config, "ORPO", make_loss, show=("nll_loss",))
