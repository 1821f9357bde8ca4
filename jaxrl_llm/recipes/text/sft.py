"""Supervised fine-tuning (SFT): learn to give the responses of a dataset.

    jaxrl-llm sft                                      # a new 4-layer GPT-2 learns to define English words (WordNet)
    jaxrl-llm sft --dataset chat.jsonl --model my/gpt2 --output-dir runs/chat

The loss is the mean negative log-likelihood over the tokens of all responses of a batch, with their EOS; prompts and
padding teach nothing. Rows may be `instruction`/`input`/`output`, `messages` or `conversations`, `prompt`/`completion`,
or `text`. The trained model is saved to `<output_dir>/model` in Hugging Face's layout.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.data import (
    SupervisedExample,
    TokenBatch,
    Tokens,
    batch_indices,
    collate_sft,
    split_indices,
    supervised_example,
    tokenize_prompt,
    tokenize_sft_rows,
)
from jaxrl_llm.losses import cross_entropy_loss
from jaxrl_llm.models import save_pretrained
from jaxrl_llm.recipes.loop import training_loop
from jaxrl_llm.recipes.options import ModelOptions, OptimizerOptions, RunOptions, require, require_at_least
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text.language_model import LanguageModel, complete, load_model, load_rows, require_room
from jaxrl_llm.reductions import token_weights
from jaxrl_llm.rollouts import score_tokens
from jaxrl_llm.training import init_train_state, make_train_step
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunOptions, ModelOptions, OptimizerOptions):
    """Settings of supervised fine-tuning."""

    output_dir: str = "runs/sft"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str = "wordnet"
    """`wordnet`, `sums`, a .json, .jsonl or .parquet file, or the name of a dataset."""
    split: str = "train"
    """Split of a dataset that has several."""
    eval_fraction: float = 0.1
    """Share of the rows that is held out for evaluation."""
    max_length: int = 256
    """Tokens after which a row is cut."""
    completion_only_loss: bool = True
    """Learn the responses only; if false, prompts too."""
    learning_rate: float = 1e-3
    """Peak learning rate. 1e-3 suits a small new model; take about 2e-5 to fine-tune a pretrained one."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    per_device_train_batch_size: int = 32
    """Rows of a step."""
    num_train_epochs: float = 3.0
    """Passes over the training rows, unless max_steps says otherwise."""
    max_steps: int = 0
    """Steps of the run; 0: as many as the epochs have."""
    eval_exact_match: bool = False
    """Complete held-out prompts greedily before and after, and report the share of completions that are exactly right."""


class Batch(NamedTuple):
    """Rows of text, padded on the right."""

    tokens: Int[Array, "batch time"]
    mask: Bool[Array, "batch time"]
    loss_mask: Bool[Array, "batch time"]
    weights: Float[Array, "batch targets"] | None = None


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_run()
    config.validate_model()
    config.validate_optimizer()
    require_at_least(2, max_length=config.max_length)
    require_at_least(1, per_device_train_batch_size=config.per_device_train_batch_size)
    require_at_least(0, max_steps=config.max_steps)
    require("eval_fraction", config.eval_fraction, "between 0 and 1", lambda share: 0 < share < 1)
    require("num_train_epochs", config.num_train_epochs, "positive", lambda epochs: epochs > 0)
    require(
        "gradient_accumulation_steps",
        config.gradient_accumulation_steps,
        f"a divisor of per_device_train_batch_size={config.per_device_train_batch_size}",
        lambda parts: config.per_device_train_batch_size % parts == 0,
    )


def make_loss(model: LanguageModel, config: Config):
    """Makes `loss_fn(params, batch, key)`: the cross-entropy of each response token given those before it."""

    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[Scalar, Metrics]:
        statistics = score_tokens(
            model.apply,
            model.head_kernel,
            params,
            batch.tokens,
            batch.mask,
            chunk_size=config.chunk_size,
            dropout_key=key if config.dropout > 0 else None,
        )
        mask = batch.loss_mask[:, 1:]
        return cross_entropy_loss(statistics.log_probs, mask, statistics=statistics, weights=batch.weights)

    return loss_fn


def batch_weights(batch: Batch, axis_name: str | None) -> Float[Array, "batch targets"]:
    """Makes the weights of a whole batch, of all tokens but the first: the mean over all response tokens."""
    return token_weights(batch.loss_mask[:, 1:], "token_mean", axis_name=axis_name)


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `eval_loss` (nats for each token), of a complete run `model` (folder of the trained model), and, if asked for,
        `eval_exact_match_before` and `eval_exact_match`.

    Raises:
        ValueError: If a setting or a row of the data is wrong.
    """
    validate(config)
    init_key, train_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
    examples = [supervised_example(row) for row in load_rows(config.dataset, config.split)]
    if config.eval_exact_match:
        _require_answers(examples)
    model = load_model(config, init_key)
    train_indices, eval_indices = split_indices(len(examples), held_out=config.eval_fraction, seed=0)
    train, held_out = (
        tokenize_sft_rows(
            [examples[i] for i in indices],
            model.tokenizer,
            max_length=config.max_length,
            completion_only_loss=config.completion_only_loss,
        )
        for indices in (train_indices, eval_indices)
    )
    length = max(len(row.ids) for row in train.rows + held_out.rows)
    require_room(model, length - 1, "lower max_length, or give a new model more n_positions")
    facts(
        f"SFT on {config.dataset}",
        {"training": train, "held out": held_out, "parameters": model.num_params, "folder": config.output_dir},
    )

    batch_size = config.per_device_train_batch_size
    epoch_steps = len(train.rows) / batch_size
    total_steps = config.max_steps or max(round(config.num_train_epochs * epoch_steps), 1)
    optimizer, schedule = config.optimizer(total_steps), config.schedule(total_steps)
    step = make_train_step(
        make_loss(model, config),
        optimizer,
        weights_fn=batch_weights,
        num_microbatches=config.gradient_accumulation_steps,
        skip_nonfinite=config.skip_nonfinite,
    )
    step = jax.jit(step, donate_argnums=0)

    def update(state, index):
        indices = batch_indices(len(train.rows), batch_size, seed=config.seed, step=index)
        batch = collate_sft([train.rows[i] for i in indices], pad_id=model.pad_id, length=length)
        state, metrics = step(state, Batch(*map(jnp.asarray, batch)), train_key)
        return state, metrics | {"learning_rate": schedule(index), "epoch": (index + 1) / epoch_steps}

    held_out_loss = make_evaluation(model, config, held_out.rows, length)
    longest = max(int(row.loss_mask.sum()) for row in held_out.rows)
    held_out_examples = [examples[eval_indices[i]] for i in held_out.kept]

    def exact_match(params: Params) -> float:
        prompts = [tokenize_prompt(example.prompt, model.tokenizer) for example in held_out_examples]
        texts = complete(model, params, prompts, eval_key, max_new_tokens=longest)
        answers = [example.completion for example in held_out_examples]
        return float(np.mean([text == answer for text, answer in zip(texts, answers, strict=True)]))

    before = {"eval_exact_match_before": exact_match(model.params)} if config.eval_exact_match else {}
    state, complete_run = training_loop(
        config,
        init_train_state(model.params, optimizer),
        update,
        total_steps=total_steps,
        label="sft",
        evaluate=lambda state: held_out_loss(state.params),
        show=("loss", "eval_loss", "eval_mean_token_accuracy"),
    )
    figures: dict[str, Any] = {k: float(v) for k, v in held_out_loss(state.params).items()} | before
    if complete_run:
        if config.eval_exact_match:
            figures["eval_exact_match"] = exact_match(state.params)
        figures["model"] = str(Path(config.output_dir) / "model")
        save_pretrained(figures["model"], model.module, state.params, model.tokenizer)
    facts("Result", figures)
    return figures


def _require_answers(examples: list[SupervisedExample]) -> None:
    for number, example in enumerate(examples, start=1):
        if not (example.prompt and isinstance(example.completion, str)):
            raise ValueError(
                "eval_exact_match needs rows that ask for one text (`prompt` and `completion`, or `instruction` and "
                f"`output`); row {number} is a conversation or plain text."
            )


def make_evaluation(model: LanguageModel, config: Config, rows: list[Tokens], length: int):
    """Makes `evaluate(params) -> metrics`: mean loss and accuracy over all response tokens of the held-out rows."""
    loss_fn = make_loss(model, dataclasses.replace(config, dropout=0.0))
    size = min(config.per_device_train_batch_size, len(rows))
    padding = Tokens(np.zeros(1, np.int32), np.zeros(1, bool), truncated=False)
    rows = rows + [padding] * (-len(rows) % size)
    batches = [collate_sft(rows[i : i + size], pad_id=model.pad_id, length=length) for i in range(0, len(rows), size)]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *batches)

    @jax.jit
    def evaluate(params: Params, stacked: TokenBatch) -> Metrics:
        weights = token_weights(jnp.asarray(stacked.loss_mask)[:, :, 1:].reshape(-1, length - 1), "token_mean")

        def one(part):
            batch, weights = part
            return loss_fn(params, Batch(*batch, weights=weights), jax.random.key(0))[1]

        parts = jax.lax.map(one, (stacked, weights.reshape(-1, size, length - 1)))
        return jax.tree.map(jnp.sum, parts)

    def metrics(params: Params) -> Metrics:
        found = evaluate(params, stacked)
        return {
            "eval_loss": found["nll"],
            "eval_mean_token_accuracy": found["mean_token_accuracy"],
            "eval_entropy": found["entropy"],
        }

    return metrics
