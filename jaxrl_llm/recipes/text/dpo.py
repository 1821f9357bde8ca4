"""Direct Preference Optimization: learn from pairs of responses which one to prefer.

    jaxrl-llm dpo --model my/gpt2 --dataset pairs.jsonl --output-dir runs/dpo

Rows have `prompt`, `chosen` and `rejected`. The log-probability of a response is SUMMED over its tokens, with its EOS;
the reference is the model as it was at the start. The trained model is saved to `<output_dir>/model`.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.data import (
    PreferenceBatch,
    PreferenceTokens,
    TokenBatch,
    batch_indices,
    collate_preference,
    preference_example,
    split_indices,
    tokenize_preference_rows,
)
from jaxrl_llm.losses import dpo_loss
from jaxrl_llm.losses.preference import DPOLossType
from jaxrl_llm.models import save_pretrained
from jaxrl_llm.recipes.loop import training_loop
from jaxrl_llm.recipes.options import ModelOptions, OptimizerOptions, RunOptions, require, require_at_least
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model, load_rows, require_room
from jaxrl_llm.reductions import row_weights
from jaxrl_llm.rollouts import score_tokens
from jaxrl_llm.training import init_train_state, make_train_step
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunOptions, ModelOptions, OptimizerOptions):
    """Settings of Direct Preference Optimization."""

    output_dir: str = "runs/dpo"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str
    """A .json, .jsonl or .parquet file, or the name of a dataset, with `prompt`, `chosen` and `rejected`."""
    split: str = "train"
    """Split of a dataset that has several."""
    eval_fraction: float = 0.1
    """Share of the pairs that is held out for evaluation."""
    max_length: int = 256
    """Tokens of prompt and response together after which a response is cut."""
    beta: float = 0.1
    """Strength of the pull to the reference: the larger, the closer the model stays to where it began."""
    loss_type: DPOLossType = "sigmoid"
    """The paper's loss."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5)."""
    learning_rate: float = 1e-6
    """Peak learning rate. 1e-6 suits large pretrained models; small new ones need more."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    per_device_train_batch_size: int = 8
    """Pairs of a step."""
    num_train_epochs: float = 1.0
    """Passes over the training pairs, unless max_steps says otherwise."""
    max_steps: int = 0
    """Steps of the run; 0: as many as the epochs have."""


class Batch(NamedTuple):
    """Pairs, with what the reference thinks of them."""

    chosen: TokenBatch
    rejected: TokenBatch
    ref_chosen: Float[Array, " batch"]
    ref_rejected: Float[Array, " batch"]
    weights: Float[Array, " batch"] | None = None


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_run()
    config.validate_model()
    config.validate_optimizer()
    require_at_least(2, max_length=config.max_length)
    require_at_least(0, max_steps=config.max_steps)
    size = config.per_device_train_batch_size
    require_at_least(1, per_device_train_batch_size=size)
    parts = config.gradient_accumulation_steps
    require("gradient_accumulation_steps", parts, f"a divisor of the {size} pairs of a step", lambda k: size % k == 0)
    require("eval_fraction", config.eval_fraction, "between 0 and 1", lambda share: 0 < share < 1)
    require("num_train_epochs", config.num_train_epochs, "positive", lambda epochs: epochs > 0)
    require("beta", config.beta, "positive", lambda beta: beta > 0)
    require("label_smoothing", config.label_smoothing, "in [0, 0.5)", lambda share: 0 <= share < 0.5)


def response_log_probs(
    model: LanguageModel,
    config: Config,
    params: Params,
    chosen: TokenBatch,
    rejected: TokenBatch,
    key: Key | None = None,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Computes the log-probability of both responses of each pair, summed over their tokens, in one forward pass."""
    tokens, mask, loss_mask = (jnp.concatenate(pair) for pair in zip(chosen, rejected, strict=True))
    statistics = score_tokens(
        model.apply,
        model.head_kernel,
        params,
        tokens,
        mask,
        chunk_size=config.chunk_size,
        dropout_key=key if config.dropout > 0 else None,
    )
    summed = jnp.where(loss_mask[:, 1:], statistics.log_probs, 0).sum(-1)
    return summed[: len(summed) // 2], summed[len(summed) // 2 :]


def make_loss(model: LanguageModel, config: Config):
    """Makes `loss_fn(params, batch, key)`."""

    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[Scalar, Metrics]:
        chosen, rejected = response_log_probs(model, config, params, batch.chosen, batch.rejected, key)
        return dpo_loss(
            chosen,
            rejected,
            batch.ref_chosen,
            batch.ref_rejected,
            beta=config.beta,
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
            weights=batch.weights,
        )

    return loss_fn


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `model` (folder of the trained model), `eval_loss` and `eval_rewards/accuracies` on the held-out pairs.

    Raises:
        ValueError: If a setting or a row of the data is wrong.
    """
    validate(config)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    examples = [preference_example(row) for row in load_rows(config.dataset, config.split)]
    model = load_model(config, init_key)
    train, held_out = (
        tokenize_preference_rows([examples[i] for i in indices], model.tokenizer, max_length=config.max_length)
        for indices in split_indices(len(examples), held_out=config.eval_fraction, seed=0)
    )
    facts(
        f"DPO on {config.dataset}",
        {"training": train, "held out": held_out, "parameters": model.num_params, "folder": config.output_dir},
    )

    length = max(_length(row) for row in train.rows + held_out.rows)
    require_room(model, length - 1, "lower max_length, or give a new model more n_positions")
    collate = partial(collate_preference, pad_id=model.pad_id, length=length)
    reference = jax.jit(partial(response_log_probs, model, dataclasses.replace(config, dropout=0.0)))
    # A copy, for the step gives the memory of its state away.
    ref_params = jax.tree.map(jnp.copy, model.params)

    def with_reference(pairs: PreferenceBatch) -> Batch:
        return Batch(*pairs, *reference(ref_params, *pairs))

    size = config.per_device_train_batch_size
    epoch_steps = len(train.rows) / size
    total_steps = config.max_steps or max(round(config.num_train_epochs * epoch_steps), 1)
    optimizer, schedule = config.optimizer(total_steps), config.schedule(total_steps)
    step = make_train_step(
        make_loss(model, config),
        optimizer,
        weights_fn=lambda batch, axis_name: row_weights(batch.ref_chosen, axis_name=axis_name),
        num_microbatches=config.gradient_accumulation_steps,
        skip_nonfinite=config.skip_nonfinite,
    )
    step = jax.jit(step, donate_argnums=0)

    def update(state, index):
        indices = batch_indices(len(train.rows), size, seed=config.seed, step=index)
        state, metrics = step(state, with_reference(collate([train.rows[i] for i in indices])), train_key)
        return state, metrics | {"learning_rate": schedule(index), "epoch": (index + 1) / epoch_steps}

    size_eval = min(size, len(held_out.rows))
    parts = [held_out.rows[i : i + size_eval] for i in range(0, len(held_out.rows), size_eval)]
    filled = [part + [held_out.rows[0]] * (size_eval - len(part)) for part in parts]
    batches = [with_reference(collate(part)) for part in filled]
    counts = [np.arange(size_eval) < len(part) for part in parts]
    loss_fn = jax.jit(make_loss(model, dataclasses.replace(config, dropout=0.0)))

    def evaluate(state):
        total: dict[str, float] = {}
        for batch, counted in zip(batches, counts, strict=True):
            weights = jnp.asarray(counted) / len(held_out.rows)
            loss, metrics = loss_fn(state.params, batch._replace(weights=weights), train_key)
            for name, value in {"loss": loss, **metrics}.items():
                total[f"eval_{name}"] = total.get(f"eval_{name}", 0.0) + float(value)
        return total

    state, complete_run = training_loop(
        config,
        init_train_state(model.params, optimizer),
        update,
        total_steps=total_steps,
        label="dpo",
        evaluate=evaluate,
        show=("loss", "rewards/accuracies", "eval_rewards/accuracies", "rewards/margins"),
    )
    figures: dict[str, Any] = evaluate(state)
    if complete_run:
        figures["model"] = str(Path(config.output_dir) / "model")
        save_pretrained(figures["model"], model.module, state.params, model.tokenizer)
    facts("Result", figures)
    return figures


def _length(row: PreferenceTokens) -> int:
    return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))
