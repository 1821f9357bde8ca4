"""Distillation: a small model learns the predictions of a large one, on the responses of a dataset.

    jaxrl-llm distill --teacher runs/large/model --model runs/small/model --dataset chat.jsonl
    jaxrl-llm distill --teacher runs/large/model --dataset chat.jsonl --n-layer 2 --n-embd 128

The loss is the generalised Jensen-Shannon divergence of teacher and student at each response token (GKD without samples
of the student's own). A new student takes the tokenizer of the teacher; another one must have the same.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxrl_llm.data import supervised_example, tokenize_sft_rows
from jaxrl_llm.divergences import chunked_generalized_jsd
from jaxrl_llm.log_probs import chunked_token_statistics
from jaxrl_llm.losses import cross_entropy_loss, token_mean_divergence
from jaxrl_llm.recipes.options import LearningRates, ModelOptions, require
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text import sft
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model
from jaxrl_llm.recipes.text.offline import report, require_rows_fit, run_keys, train_offline
from jaxrl_llm.recipes.text.offline_task import OfflineOptions, Task, load_splits, sample_prompts
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OfflineOptions):
    """Settings of distillation."""

    output_dir: str = "runs/distill"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str
    """Rows as for sft: a .json, .jsonl or .parquet file, or the name of a dataset."""
    teacher: str
    """Folder or hub id of the model to learn from."""
    beta: float = 0.5
    """0: forward KL (cover all that the teacher says); 1: reverse KL (say only what it says); between: a mixture."""
    temperature: float = 1.0
    """Divisor of both models' logits."""
    completion_only_loss: bool = True
    """Learn on the completions only; if false, on prompts too."""
    assistant_only_loss: bool = True
    """Of conversations, learn on what the assistant says; if false, on all turns."""
    learning_rate: float | None = None
    """Peak learning rate; None: 2e-5 for a saved model, 2e-4 for adapters, 1e-3 for a new model."""
    default_learning_rates: ClassVar = LearningRates(new=1e-3, full=2e-5, adapters=2e-4)
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_offline()
    require("teacher", config.teacher, "the folder or hub id of a model", bool)
    require("beta", config.beta, "in [0, 1]", lambda beta: 0 <= beta <= 1)
    require("temperature", config.temperature, "positive", lambda temperature: temperature > 0)


def make_loss(student: LanguageModel, teacher: LanguageModel, config: Config, *, evaluation: bool = False):
    """Makes `loss_fn(params, batch, key, frozen)`, where `frozen` are the teacher's parameters.

    An evaluation measures the student's negative log-likelihood too.
    """
    noisy, known_tokens = config.drops_out and not evaluation, len(teacher.tokenizer)

    def loss_fn(params: Params, batch: sft.Batch, key: Key, frozen: Params) -> tuple[Scalar, Metrics]:
        tokens, mask, learned = batch.tokens[:, :-1], batch.mask[:, :-1], batch.loss_mask[:, 1:]
        options = {"deterministic": False, "rngs": {"dropout": key}} if noisy else {}
        hidden, _ = student.apply({"params": params}, tokens, mask=mask, output="hidden", **options)
        known, _ = teacher.apply({"params": frozen}, tokens, mask=mask, output="hidden")
        # Of one tokenizer's models, some are padded to more entries than it has, each to another number.
        kernels = student.head_kernel(params)[:, :known_tokens], teacher.head_kernel(frozen)[:, :known_tokens]
        divergences = chunked_generalized_jsd(
            hidden,
            kernels[0],
            jax.lax.stop_gradient(known),
            jax.lax.stop_gradient(kernels[1]),
            beta=config.beta,
            temperature=config.temperature,
            chunk_size=config.chunk_size,
        )
        loss, metrics = token_mean_divergence(divergences, learned, weights=batch.weights)
        if evaluation:
            statistics = chunked_token_statistics(
                hidden, student.head_kernel(params), batch.tokens[:, 1:], chunk_size=config.chunk_size
            )
            _, more = cross_entropy_loss(statistics.log_probs, learned, statistics=statistics, weights=batch.weights)
            metrics |= more
        return loss, metrics

    return loss_fn


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `eval_loss` (divergence, nats for each token), `eval_nll` and the other metrics of the student on the held-out
        rows; of a complete run `model` (folder of the student).

    Raises:
        ValueError: If a setting or a row of the data is wrong, or the tokenizers differ.
    """
    validate(config)
    key = run_keys(config.seed)[0]
    teacher = load_model(ModelOptions(model=config.teacher, dtype=config.dtype, mesh=config.mesh), key)
    student = load_model(config, key, tokenizer=teacher.tokenizer)
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError(f"model={config.model!r} has another vocabulary than teacher={config.teacher!r}.")
    examples = load_splits(config, supervised_example)
    train, held_out = (
        tokenize_sft_rows(
            part,
            student.tokenizer,
            max_length=config.max_length,
            completion_only_loss=config.completion_only_loss,
            assistant_only_loss=config.assistant_only_loss,
        )
        for part in examples
    )
    report("Distillation", config, student, train, held_out)
    task = Task(
        label="distill",
        train=train.rows,
        held_out=held_out.rows,
        length=lambda row: len(row.ids),
        collate=partial(sft.collate, student.pad_id),
        loss_fn=make_loss(student, teacher, config),
        evaluation_loss_fn=make_loss(student, teacher, config, evaluation=True),
        weights_fn=sft.batch_weights,
        frozen=jax.tree.map(jnp.asarray, teacher.params),
        prompts=sample_prompts([examples[1][i] for i in held_out.kept], student.tokenizer),
        show=("loss", "eval_loss", "eval_nll"),
    )
    require_rows_fit(config, teacher, task)
    _, figures = train_offline(config, student, task)
    facts("Result", figures)
    return figures
