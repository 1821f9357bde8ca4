"""Kahneman-Tversky optimization (KTO): learn from single responses that are labelled good or bad.

    jaxrl-llm kto --model my/gpt2 --dataset labelled.jsonl --output-dir runs/kto

Rows have `prompt`, `completion` and `label` (true or false); a row with `prompt`, `chosen` and `rejected` gives two. The
reference is the model as it was at the start. Its distance, the reference point of the loss, is estimated on prompts
with the completion of another row.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.data import (
    TokenBatch,
    UnpairedTokens,
    collate_unpaired,
    rotate_completions,
    tokenize_unpaired_rows,
    unpaired_examples,
)
from jaxrl_llm.log_probs import TokenStatistics
from jaxrl_llm.losses import kto_kl, kto_loss, sequence_log_probs, unpaired_weights
from jaxrl_llm.losses.unpaired import KTOLossType, UnpairedWeights
from jaxrl_llm.recipes.options import LearningRates, require
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model
from jaxrl_llm.recipes.text.offline import report, run_keys, train_offline
from jaxrl_llm.recipes.text.offline_task import OfflineOptions, ReferenceOptions, Task, load_splits, real_rows, targets
from jaxrl_llm.reductions import token_weights, weighted_sum
from jaxrl_llm.rollouts import score_tokens
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OfflineOptions, ReferenceOptions):
    """Settings of Kahneman-Tversky optimization."""

    output_dir: str = "runs/kto"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str
    """A .json, .jsonl or .parquet file, or the name of a dataset, with `prompt`, `completion` and `label`."""
    beta: float = 0.1
    """Strength of the pull to the reference: the larger, the closer the model stays to where it began."""
    loss_type: KTOLossType = "kto"
    """kto, or apo_zero_unpaired, which has no reference point to estimate."""
    desirable_weight: float = 1.0
    """Weight of the desirable responses."""
    undesirable_weight: float = 1.0
    """Weight of the undesirable ones; choose the two so that both classes weigh about the same."""
    learning_rate: float | None = None
    """Peak learning rate; None: 1e-6, of adapters 1e-5. Small new models need far more."""
    default_learning_rates: ClassVar = LearningRates(new=1e-6, full=1e-6, adapters=1e-5)
    per_device_train_batch_size: int = 16
    """Responses of a step."""


class LabelledRow(NamedTuple):
    """A response, and its prompt with the response of another row."""

    row: UnpairedTokens
    mismatched: UnpairedTokens


class LogProbs(NamedTuple):
    """Log-probabilities, summed over tokens, of the responses and, for `kto`, of the mismatched ones."""

    responses: Float[Array, " batch"]
    mismatched: Float[Array, " batch"] | None


class Weights(NamedTuple):
    """Weights of means over all responses of a batch, and over their tokens.

    Attributes:
        rows: Of each response.
        chosen: Of each token of the desirable responses.
        rejected: Of each token of the undesirable ones.
        both: Of each token of all responses.
    """

    rows: UnpairedWeights
    chosen: Float[Array, "batch targets"]
    rejected: Float[Array, "batch targets"]
    both: Float[Array, "batch targets"]


class Batch(NamedTuple):
    """Labelled responses, with what the reference thinks of them and the reference point of the whole batch."""

    completions: TokenBatch
    labels: Bool[Array, " batch"]
    mismatched: TokenBatch
    real: Bool[Array, " batch"]
    reference: LogProbs | None = None
    kl: Float[Array, " batch"] | None = None
    weights: Weights | None = None


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_offline()
    config.validate_reference()
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        require(name, getattr(config, name), "positive", lambda value: value > 0)


def make_score(model: LanguageModel, config: Config):
    """Makes `score(params, batch, key=None)`: the summed log-probability of each completion, and the tokens' statistics."""

    def score(
        params: Params, batch: TokenBatch, key: Key | None = None
    ) -> tuple[Float[Array, " batch"], TokenStatistics]:
        statistics = score_tokens(
            model.apply,
            model.head_kernel,
            params,
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.mask),
            chunk_size=config.chunk_size,
            dropout_key=key if config.drops_out else None,
        )
        return sequence_log_probs(statistics.log_probs, targets(batch)), statistics

    return score


def make_reference(model: LanguageModel, config: Config):
    """Makes `reference_fn(params, batch) -> LogProbs`."""
    score = make_score(model, config)

    def reference_fn(params: Params, batch: Batch) -> LogProbs:
        mismatched = score(params, batch.mismatched)[0] if config.loss_type == "kto" else None
        return LogProbs(score(params, batch.completions)[0], mismatched)

    return reference_fn


def make_reference_point(model: LanguageModel, config: Config):
    """Makes `prepare(params, batch) -> batch`, which adds the reference point of the whole batch."""
    score = make_score(model, config)

    def prepare(params: Params, batch: Batch) -> Batch:
        assert batch.reference is not None
        assert batch.reference.mismatched is not None
        kl = kto_kl(score(params, batch.mismatched)[0], batch.reference.mismatched, mask=batch.real)
        return batch._replace(kl=jnp.broadcast_to(kl, batch.real.shape))

    return prepare


def make_loss(model: LanguageModel, config: Config):
    """Makes `loss_fn(params, batch, key)`."""
    score = make_score(model, config)

    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[Scalar, Metrics]:
        assert batch.reference is not None
        weights = batch_weights(batch) if batch.weights is None else batch.weights
        kl = jnp.zeros(()) if batch.kl is None else batch.kl[0]
        log_probs, statistics = score(params, batch.completions, key)
        loss, metrics = kto_loss(
            log_probs,
            batch.reference.responses,
            batch.labels,
            beta=config.beta,
            kl=kl,
            loss_type=config.loss_type,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            weights=weights.rows,
        )
        metrics |= {"kl": kl * weights.rows.rows.sum()}
        return loss, metrics | jax.lax.stop_gradient(token_metrics(statistics, weights))

    return loss_fn


def token_metrics(statistics: TokenStatistics, weights: Weights) -> Metrics:
    """Means over tokens; mean logits as TRL has them, averaged over the vocabulary."""
    logits = statistics.mean_log_probs + statistics.logsumexp
    return {
        "logits/chosen": weighted_sum(logits, weights.chosen),
        "logits/rejected": weighted_sum(logits, weights.rejected),
        "entropy": weighted_sum(statistics.entropy, weights.both),
    }


def batch_weights(batch: Batch, axis_name: str | None = None) -> Weights:
    """Makes the weights of a whole batch."""
    real, labels = targets(batch.completions) & batch.real[:, None], batch.labels[:, None]
    means = [token_weights(mask, "token_mean", axis_name=axis_name) for mask in (real & labels, real & ~labels, real)]
    return Weights(unpaired_weights(batch.labels, mask=batch.real, axis_name=axis_name), *means)


def collate(pad_id: int, rows: Sequence[LabelledRow], length: int) -> Batch:
    """Makes a batch of labelled responses."""
    batch = collate_unpaired([row.row for row in rows], pad_id=pad_id, length=length)
    mismatched = collate_unpaired([row.mismatched for row in rows], pad_id=pad_id, length=length)
    return Batch(batch.completions, jnp.asarray(batch.labels), mismatched.completions, real_rows(rows))


def row_length(row: LabelledRow) -> int:
    """Tokens of the longer of both texts."""
    return max(len(text.prompt_ids) + len(text.completion_ids) for text in row)


def with_mismatched(rows: Sequence[UnpairedTokens], *, max_length: int) -> list[LabelledRow]:
    """Gives each row's prompt the completion of a row with another prompt (unless most rows have the same prompt).

    Sorted by prompt, rows that are as far apart as the most frequent prompt is frequent cannot have the same one.
    """
    rows = sorted(rows, key=lambda row: row.prompt_ids.tobytes())
    most = max(Counter(row.prompt_ids.tobytes() for row in rows).values())
    shift = most if 2 * most <= len(rows) else 1
    return list(map(LabelledRow, rows, rotate_completions(rows, max_length=max_length, shift=shift)))


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `eval_loss`, `eval_rewards/margins` and the other metrics on the held-out rows (with z₀ of each batch of them);
        of a complete run `model` (folder of the trained model).

    Raises:
        ValueError: If a setting or a row of the data is wrong.
    """
    validate(config)
    model = load_model(config, run_keys(config.seed)[0])
    parts = load_splits(config, unpaired_examples)
    train, held_out = (
        tokenize_unpaired_rows(list(chain(*examples)), model.tokenizer, max_length=config.max_length)
        for examples in parts
    )
    report("KTO", config, model, train, held_out)
    quiet = config.without_dropout()
    estimates_kl = config.loss_type == "kto"
    if estimates_kl and min(len(train.rows), len(held_out.rows)) < 2:
        raise ValueError(
            f"KTO needs at least 2 rows to train on and 2 held out, to exchange their completions; got {len(train.rows)} "
            f"and {len(held_out.rows)}. Raise eval_fraction, name an eval_dataset, or take apo_zero_unpaired."
        )

    def labelled(rows: Sequence[UnpairedTokens]) -> list[LabelledRow]:
        if not estimates_kl:
            return [LabelledRow(row, row) for row in rows]
        return with_mismatched(rows, max_length=config.max_length)

    task = Task(
        label="kto",
        train=labelled(train.rows),
        held_out=labelled(held_out.rows),
        length=row_length,
        tokens=lambda row: len(row.row.prompt_ids) + len(row.row.completion_ids),
        collate=partial(collate, model.pad_id),
        loss_fn=make_loss(model, config),
        evaluation_loss_fn=make_loss(model, quiet),
        weights_fn=batch_weights,
        reference_fn=make_reference(model, quiet),
        prepare=make_reference_point(model, quiet) if estimates_kl else None,
        prompts=[row.prompt_ids for row in held_out.rows],
        show=("loss", "eval_loss", "rewards/margins", "kl"),
    )
    _, figures = train_offline(config, model, task, reference=config)
    facts("Result", figures)
    return figures
