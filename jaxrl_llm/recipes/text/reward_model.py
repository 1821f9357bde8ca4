"""Reward model: learn a number for each text, from pairs of responses or from ratings.

    jaxrl-llm reward-model --model my/gpt2 --dataset pairs.jsonl --output-dir runs/reward
    jaxrl-llm reward-model --model my/gpt2 --dataset ratings.jsonl --learning-rate 1e-4

Rows have `chosen` and `rejected` with a `prompt` (Bradley-Terry: the chosen response shall have the higher reward, by
`margin` if the rows have one), or a `score` (or `rating`) with `text` or with `prompt` and `completion` (regression: the
reward shall be the score). The first row tells which. The model is a language model with a scalar head, saved as
transformers' `…ForSequenceClassification`; a saved reward model is trained further.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrl_llm.data import (
    PreferenceTokens,
    RatedExample,
    RatedTokens,
    Row,
    TokenBatch,
    TokenizedRows,
    collate_preference,
    collate_rated,
    padding_id,
    preference_example,
    rated_example,
    tokenize_preference_rows,
    tokenize_rated_rows,
)
from jaxrl_llm.losses import reward_model_loss, reward_regression_loss
from jaxrl_llm.models import ScalarHead, from_pretrained_reward_model, is_reward_model, scalar_head_params
from jaxrl_llm.recipes.options import LearningRates, ModelOptions, require
from jaxrl_llm.recipes.progress import facts, table
from jaxrl_llm.recipes.statistics import pearson_correlation, wilson_interval
from jaxrl_llm.recipes.text import pairs
from jaxrl_llm.recipes.text.language_model import (
    LanguageModel,
    in_host_memory,
    load_model,
    place,
    require_room,
    run_settings,
    with_adapters,
)
from jaxrl_llm.recipes.text.offline import report, run_keys, train_offline
from jaxrl_llm.recipes.text.offline_task import OfflineOptions, Task, load_splits, real_rows
from jaxrl_llm.recipes.text.scoring import in_batches, text_rewards
from jaxrl_llm.reductions import token_weights
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OfflineOptions):
    """Settings of reward modelling."""

    output_dir: str = "runs/reward_model"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str
    """A .json, .jsonl or .parquet file, or the name of a dataset, of pairs or of ratings."""
    center_rewards_coefficient: float = 0.0
    """Pull of the rewards of pairs to mean zero; 0.01 is common."""
    learning_rate: float | None = None
    """Peak learning rate; None: 1e-5 for a saved model, 1e-4 for adapters and for a new model."""
    default_learning_rates: ClassVar = LearningRates(new=1e-4, full=1e-5, adapters=1e-4)
    num_samples: int = 3
    """Held-out rows that are shown with their rewards at the end; 0: none."""
    sample_tokens: int = 40
    """Of these, the last tokens that are shown."""


class PairBatch(NamedTuple):
    """Pairs of texts."""

    chosen: TokenBatch
    rejected: TokenBatch
    margin: Float[Array, " batch"]
    real: Bool[Array, " batch"]
    weights: Float[Array, " batch"] | None = None


class RatedTexts(NamedTuple):
    """Texts with their ratings."""

    texts: TokenBatch
    scores: Float[Array, " batch"]
    real: Bool[Array, " batch"]
    weights: Float[Array, " batch"] | None = None


class Source(NamedTuple):
    """What a dataset of one kind is learned by.

    Attributes:
        name: "pairs" or "ratings".
        tokenize: `tokenize(examples, tokenizer, max_length=…)`.
        length: Tokens of a row.
        collate: `collate(pad_id, rows, length) -> batch`.
        make_loss: `make_loss(module, config) -> loss_fn`.
        texts: `texts(batch)`, the texts that get a reward.
        show: The metric of the progress line.
    """

    name: str
    tokenize: Callable[..., TokenizedRows[Any]]
    length: Callable[[Any], int]
    collate: Callable[[int, Sequence[Any], int], Any]
    make_loss: Callable[[ScalarHead, Config], Callable[..., tuple[Scalar, Metrics]]]
    texts: Callable[[Any], Any]
    show: str


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_offline()
    require("center_rewards_coefficient", config.center_rewards_coefficient, "at least 0", lambda c: c >= 0)


def load_reward_model(options: ModelOptions, key: Key) -> LanguageModel:
    """Loads the reward model that the options name, or puts a fresh scalar head on the language model that they name.

    The config gets a `pad_token_id`, by which transformers finds the end of a text.

    Args:
        options: Which model.
        key: Key of new parameters, and of adapters.

    Raises:
        ValueError: If a saved model comes without a tokenizer.
    """
    key, lora_key = jax.random.split(key) if options.adapts else (key, key)
    plain = dataclasses.replace(options, lora=False, qlora=False, adapter="", mesh="")
    with in_host_memory():
        model = with_adapters(_load_reward_model(plain, key), options, lora_key)
    return model._replace(params=place(model.params, options))


def _load_reward_model(options: ModelOptions, key: Key) -> LanguageModel:
    if not (options.model and is_reward_model(options.model)):
        model_key, head_key = jax.random.split(key)
        model = load_model(options, model_key)
        assert not isinstance(model.module, ScalarHead)
        config = dataclasses.replace(model.module.config, pad_token_id=model.pad_id)
        module = ScalarHead(model.module.clone(config=config))
        return model._replace(module=module, params=scalar_head_params(head_key, model.params))
    module, params, tokenizer = from_pretrained_reward_model(options.model, **run_settings(options))
    if tokenizer is None:
        raise ValueError(f"model={options.model!r} holds no tokenizer files; save them into the same folder.")
    config = module.backbone.config.with_dropout(options.dropout)
    if config.pad_token_id is None:
        config = dataclasses.replace(config, pad_token_id=padding_id(tokenizer))
    return LanguageModel(ScalarHead(module.backbone.clone(config=config)), params, tokenizer)


def read_example(row: Row) -> Any:
    """Reads a pair or a rating, whichever the row is.

    Raises:
        ValueError: If it is neither, or a field is wrong.
    """
    columns = {name for name, value in row.fields.items() if value is not None}
    if {"chosen", "rejected"} & columns:
        return preference_example(row)
    if {"score", "rating"} & columns:
        return rated_example(row)
    raise ValueError(
        f"{row.where}: a reward model cannot learn from the columns {sorted(columns)}. Accepted are: `prompt` + `chosen` "
        "+ `rejected` (+ `margin`); `text` + `score` (or `rating`); `prompt` + `completion` + `score` (or `rating`)."
    )


def make_pair_loss(module: ScalarHead, config: Config):
    """Makes `loss_fn(params, batch, key)` of pairs; both texts go through the model together."""

    def loss_fn(params: Params, batch: PairBatch, key: Key) -> tuple[Scalar, Metrics]:
        texts = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), batch.chosen, batch.rejected)
        rewards = text_rewards(module, params, texts, key if config.drops_out else None)
        chosen, rejected = jnp.split(rewards, 2)
        return reward_model_loss(
            chosen,
            rejected,
            margin=batch.margin,
            center_rewards_coefficient=config.center_rewards_coefficient,
            weights=batch.weights,
        )

    return loss_fn


def make_rating_loss(module: ScalarHead, config: Config):
    """Makes `loss_fn(params, batch, key)` of ratings."""

    def loss_fn(params: Params, batch: RatedTexts, key: Key) -> tuple[Scalar, Metrics]:
        rewards = text_rewards(module, params, batch.texts, key if config.drops_out else None)
        return reward_regression_loss(rewards, batch.scores, weights=batch.weights)

    return loss_fn


def batch_weights(batch: PairBatch | RatedTexts, axis_name: str | None) -> Float[Array, " batch"]:
    """Makes the weights of a whole batch: the mean over rows."""
    return token_weights(batch.real, "token_mean", axis_name=axis_name)


def collate_pairs(pad_id: int, rows: Sequence[PreferenceTokens], length: int) -> PairBatch:
    """Makes a batch of pairs."""
    batch = collate_preference(rows, pad_id=pad_id, length=length)
    margin = jnp.asarray(np.array([row.margin for row in rows], np.float32))
    return PairBatch(batch.chosen, batch.rejected, margin, real_rows(rows))


def collate_ratings(pad_id: int, rows: Sequence[RatedTokens], length: int) -> RatedTexts:
    """Makes a batch of ratings."""
    batch = collate_rated(rows, pad_id=pad_id, length=length)
    return RatedTexts(batch.texts, jnp.asarray(batch.scores), real_rows(rows))


def rated_length(row: RatedTokens) -> int:
    """Tokens of the prompt with its completion."""
    return len(row.prompt_ids) + len(row.completion_ids)


PAIRS = Source(
    "pairs",
    tokenize_preference_rows,
    pairs.row_length,
    collate_pairs,
    make_pair_loss,
    lambda batch: (batch.chosen, batch.rejected),
    "accuracy",
)
RATINGS = Source(
    "ratings",
    tokenize_rated_rows,
    rated_length,
    collate_ratings,
    make_rating_loss,
    lambda batch: batch.texts,
    "mae",
)


def rewards_of(model: LanguageModel, params: Params, source: Source, rows: Sequence[Any], *, batch_size: int) -> Any:
    """Computes the rewards of all rows.

    Returns:
        Of ratings an array [rows]; of pairs two, of the chosen and of the rejected texts.
    """
    return in_batches(
        partial(_text_rewards, model.module, params),
        rows,
        source.length,
        lambda rows, length: source.texts(source.collate(model.pad_id, rows, length)),
        batch_size=batch_size,
    )


_text_rewards = partial(jax.jit, static_argnames="module")(text_rewards)


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `eval_loss` and the other metrics on the held-out rows: of pairs `eval_accuracy` with its 95 % interval,
        `eval_accuracy_low` and `eval_accuracy_high`; of ratings `eval_mse`, `eval_mae` and the correlation `eval_pearson`.
        Of a complete run `model` (folder of the trained model).

    Raises:
        ValueError: If a setting or a row of the data is wrong.
    """
    validate(config)
    parts = load_splits(config, read_example)
    source = _source(config, [*parts[0], *parts[1]])
    model = load_reward_model(config, run_keys(config.seed)[0])
    train, held_out = (source.tokenize(part, model.tokenizer, max_length=config.max_length) for part in parts)
    module = model.module
    assert isinstance(module, ScalarHead)
    report(f"Reward model from {source.name}", config, model, train, held_out)
    # The last token is read too, as it is not by a language model.
    longest = max(map(source.length, [*train.rows, *held_out.rows]))
    require_room(model, longest, "lower max_length, or give a new model more n_positions")
    quiet = config.without_dropout()
    count = len(held_out.rows)
    task = Task(
        label="reward model",
        train=train.rows,
        held_out=held_out.rows,
        length=source.length,
        tokens=pairs.row_tokens if source is PAIRS else None,
        collate=partial(source.collate, model.pad_id),
        loss_fn=source.make_loss(module, config),
        evaluation_loss_fn=source.make_loss(module, quiet),
        weights_fn=batch_weights,
        derive=partial(_intervals, count) if source is PAIRS else lambda metrics: {},
        show=("loss", "eval_loss", f"eval_{source.show}"),
    )
    params, figures = train_offline(config, model, task)
    rewards = rewards_of(model, params, source, held_out.rows, batch_size=config.per_device_train_batch_size)
    if source is RATINGS:
        scores = np.array([row.score for row in held_out.rows])
        figures["eval_pearson"] = pearson_correlation(rewards, scores)
    facts("Result", figures)
    _show(config, model, source, held_out.rows, rewards)
    return figures


def _source(config: Config, examples: Sequence[Any]) -> Source:
    kinds = {RATINGS if isinstance(example, RatedExample) else PAIRS for example in examples}
    if len(kinds) > 1:
        raise ValueError(
            f"{config.dataset} mixes pairs (`chosen`, `rejected`) and ratings (`score`): train on one kind."
        )
    (source,) = kinds
    if source is RATINGS and config.center_rewards_coefficient:
        raise ValueError(
            f"center_rewards_coefficient={config.center_rewards_coefficient} is for pairs; the rows of {config.dataset} "
            "have scores, which say themselves where rewards lie. Leave it at 0."
        )
    return source


def _intervals(count: int, metrics: Metrics) -> dict[str, Any]:
    right = round(float(metrics["eval_accuracy"]) * count)
    low, high = wilson_interval(right, count)
    return {"eval_accuracy_low": low, "eval_accuracy_high": high}


def _show(config: Config, model: LanguageModel, source: Source, rows: Sequence[Any], rewards: Any) -> None:
    """Prints the ends of some held-out texts with their rewards."""
    count = min(config.num_samples, len(rows))
    if not count:
        return

    def end(*parts: np.ndarray) -> str:
        return model.tokenizer.decode(np.concatenate(parts)[-config.sample_tokens :], skip_special_tokens=True)

    if source is PAIRS:
        cells = [
            (end(row.prompt_ids, row.chosen_ids), rewards[0][i], end(row.prompt_ids, row.rejected_ids), rewards[1][i])
            for i, row in enumerate(rows[:count])
        ]
        table("Held-out pairs", ("chosen", "reward", "rejected", "reward"), cells)
    else:
        cells = [(end(row.prompt_ids, row.completion_ids), row.score, rewards[i]) for i, row in enumerate(rows[:count])]
        table("Held-out ratings", ("text", "score", "reward"), cells)
