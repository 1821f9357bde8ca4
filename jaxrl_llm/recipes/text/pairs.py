"""Pairs of responses, as the recipes that learn from preferences see them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.data import (
    PreferenceTokens,
    TokenBatch,
    collate_preference,
    preference_example,
    tokenize_preference_rows,
)
from jaxrl_llm.log_probs import TokenStatistics
from jaxrl_llm.losses import dpo_weights, sequence_log_probs
from jaxrl_llm.losses.preference import PairWeights
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model
from jaxrl_llm.recipes.text.offline import report, run_keys, train_offline
from jaxrl_llm.recipes.text.offline_task import OfflineOptions, ReferenceOptions, Task, load_splits, real_rows, targets
from jaxrl_llm.reductions import token_weights, weighted_sum
from jaxrl_llm.rollouts import score_tokens
from jaxrl_llm.training.step import LossFunction, WeightsFunction
from jaxrl_llm.types import Key, Mask, Metrics, Params


class ResponseLogProbs(NamedTuple):
    """Log-probability of both responses of each pair, summed over their tokens."""

    chosen: Float[Array, " batch"]
    rejected: Float[Array, " batch"]


class Weights(NamedTuple):
    """Weights of means over all pairs of a batch, and over the tokens of their responses.

    Attributes:
        pairs: Of each pair.
        chosen: Of each token of the chosen responses.
        rejected: Of each token of the rejected ones.
        both: Of each token of both.
        chosen_text: Of each token of the chosen responses and their prompts.
    """

    pairs: PairWeights
    chosen: Float[Array, "batch targets"]
    rejected: Float[Array, "batch targets"]
    both: Float[Array, "batch 2 targets"]
    chosen_text: Float[Array, "batch targets"]


class Batch(NamedTuple):
    """Pairs, with what the reference thinks of them."""

    chosen: TokenBatch
    rejected: TokenBatch
    real: Bool[Array, " batch"]
    reference: ResponseLogProbs | None = None
    weights: Weights | None = None


def score_pairs(
    model: LanguageModel, config: ModelOptions, params: Params, batch: Batch, key: Key | None = None
) -> tuple[TokenStatistics, TokenStatistics]:
    """Scores the tokens of the chosen and of the rejected responses, in one forward pass."""
    tokens, mask = (jnp.concatenate([x, y]) for x, y in zip(batch.chosen[:2], batch.rejected[:2], strict=True))
    statistics = score_tokens(
        model.apply,
        model.head_kernel,
        params,
        tokens,
        mask,
        chunk_size=config.chunk_size,
        dropout_key=key if config.drops_out else None,
    )
    rows = len(tokens) // 2
    return jax.tree.map(lambda x: x[:rows], statistics), jax.tree.map(lambda x: x[rows:], statistics)


def token_metrics(chosen: TokenStatistics, rejected: TokenStatistics, weights: Weights) -> Metrics:
    """Means over tokens; mean logits as TRL has them, averaged over the vocabulary."""
    logits = [statistics.mean_log_probs + statistics.logsumexp for statistics in (chosen, rejected)]
    return {
        "logits/chosen": weighted_sum(logits[0], weights.chosen),
        "logits/rejected": weighted_sum(logits[1], weights.rejected),
        "mean_token_accuracy": weighted_sum(chosen.is_argmax, weights.chosen),
        "entropy": weighted_sum(jnp.stack([chosen.entropy, rejected.entropy], axis=1), weights.both),
    }


def averaged(statistics: TokenStatistics, mask: Mask) -> Float[Array, " batch"]:
    """Computes the log-probability of each response, averaged over its tokens."""
    return sequence_log_probs(statistics.log_probs, mask) / jnp.maximum(mask.sum(-1), 1)


def batch_weights(batch: Batch, axis_name: str | None = None) -> Weights:
    """Makes the weights of a whole batch of pairs."""
    masks = [targets(half) & batch.real[:, None] for half in (batch.chosen, batch.rejected)]
    text = jnp.asarray(batch.chosen.mask)[:, 1:] & batch.real[:, None]
    means = [token_weights(x, "token_mean", axis_name=axis_name) for x in (*masks, jnp.stack(masks, axis=1), text)]
    return Weights(dpo_weights(masks[0].sum(-1), mask=batch.real, axis_name=axis_name), *means)


def collate_pairs(pad_id: int, rows: Sequence[PreferenceTokens], length: int) -> Batch:
    """Makes a batch of pairs."""
    return Batch(*collate_preference(rows, pad_id=pad_id, length=length), real=real_rows(rows))


def row_length(row: PreferenceTokens) -> int:
    """Tokens of the prompt with the longer response."""
    return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))


def row_tokens(row: PreferenceTokens) -> int:
    """Tokens of both responses, each with the prompt: what the model reads."""
    return 2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids)


def train_on_pairs(
    config: OfflineOptions,
    title: str,
    make_loss: Callable[[LanguageModel, Any], LossFunction],
    *,
    weights_fn: WeightsFunction | None = batch_weights,
    make_reference: Callable[[LanguageModel, Any], Callable | None] = lambda model, config: None,
    reference: ReferenceOptions | None = None,
    show: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains a model on the pairs of a dataset; returns the figures of the run.

    Args:
        config: Settings of the recipe.
        title: Name of the method.
        make_loss: `make_loss(model, config) -> loss_fn`, of a `Batch`.
        weights_fn: Weights of a whole batch; None for a loss that cannot be split.
        make_reference: `make_reference(model, config) -> reference_fn` or None.
        reference: Settings of the reference.
        show: More metrics of the progress line.
    """
    model = load_model(config, run_keys(config.seed)[0])
    train, held_out = (
        tokenize_preference_rows(examples, model.tokenizer, max_length=config.max_length)
        for examples in load_splits(config, preference_example)
    )
    report(title, config, model, train, held_out)
    quiet = config.without_dropout()
    task = Task(
        label=title.lower(),
        train=train.rows,
        held_out=held_out.rows,
        length=row_length,
        tokens=row_tokens,
        collate=partial(collate_pairs, model.pad_id),
        loss_fn=make_loss(model, config),
        evaluation_loss_fn=make_loss(model, quiet),
        weights_fn=weights_fn,
        reference_fn=make_reference(model, quiet),
        prompts=[row.prompt_ids for row in held_out.rows],
        show=("loss", *show, "rewards/accuracies", "eval_rewards/accuracies"),
    )
    _, figures = train_offline(config, model, task, reference=reference)
    facts("Result", figures)
    return figures
