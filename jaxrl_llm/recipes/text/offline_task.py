"""What a recipe brings that learns from rows of text alone: its options and its `Task`; `offline` does the rest."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxrl_llm.data import Row, SupervisedExample, TokenBatch, split_indices, tokenize_prompt
from jaxrl_llm.data.examples import Prompt
from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.recipes.options import ModelOptions, OptimizerOptions, RunOptions, require, require_at_least
from jaxrl_llm.recipes.text.language_model import load_rows, read_dataset
from jaxrl_llm.training.step import WeightsFunction
from jaxrl_llm.types import Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineOptions(RunOptions, ModelOptions, OptimizerOptions):
    """Settings of a run on rows."""

    dataset: str
    """A .json, .jsonl or .parquet file, or the name of a dataset."""
    eval_dataset: str = ""
    """Held-out rows from a source of their own; empty: eval_fraction of the dataset."""
    split: str = "train"
    """Split of a dataset that has several."""
    eval_fraction: float = 0.1
    """Share of the rows that is held out for evaluation, where eval_dataset is empty."""
    max_length: int = 256
    """Tokens after which a row is cut."""
    per_device_train_batch_size: int = 32
    """Rows of a step for each part of data × fsdp of a mesh; gradient_accumulation_steps divides them (TRL multiplies)."""
    num_train_epochs: float = 1.0
    """Passes over the training rows, unless max_steps says otherwise."""
    max_steps: int = 0
    """Steps of the run; 0: as many as the epochs have."""
    group_by_length: bool = False
    """Batch rows of like length, padded to one of a few lengths: less padding, a few more programs to compile."""
    early_stopping_patience: int = 0
    """Evaluations without a lower eval_loss after which the run ends, and keeps the best model; 0: never."""
    num_samples: int = 3
    """Held-out prompts that are completed at every evaluation, into samples.jsonl; 0: none."""
    sample_tokens: int = 40
    """Longest of these completions, in tokens."""

    def validate_offline(self) -> None:
        """Checks the values."""
        self.validate_run()
        self.validate_model()
        self.validate_optimizer()
        size = self.per_device_train_batch_size
        require_at_least(2, max_length=self.max_length)
        require_at_least(1, per_device_train_batch_size=size, sample_tokens=self.sample_tokens)
        patience = self.early_stopping_patience
        require_at_least(0, max_steps=self.max_steps, early_stopping_patience=patience, num_samples=self.num_samples)
        require("eval_fraction", self.eval_fraction, "between 0 and 1", lambda share: 0 < share < 1)
        require("num_train_epochs", self.num_train_epochs, "positive", lambda epochs: epochs > 0)
        parts, meant = self.gradient_accumulation_steps, f"a divisor of per_device_train_batch_size={size}"
        require("gradient_accumulation_steps", parts, meant, lambda k: size % k == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """Settings of the policy that a preference loss compares with: the model as it was at the start."""

    precompute_ref_log_probs: bool = False
    """Score all rows by the reference before training, and free its memory."""
    sync_ref_model: bool = False
    """Let the reference follow the model (TR-DPO)."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the model in the reference at each of its updates."""
    ref_model_sync_steps: int = 512
    """Steps between two updates of the reference."""

    def validate_reference(self) -> None:
        """Checks the values."""
        require("ref_model_mixup_alpha", self.ref_model_mixup_alpha, "in (0, 1]", lambda share: 0 < share <= 1)
        require_at_least(1, ref_model_sync_steps=self.ref_model_sync_steps)
        both = self.precompute_ref_log_probs, self.sync_ref_model
        meant = "not both true: a reference that moves cannot be scored beforehand"
        require("precompute_ref_log_probs and sync_ref_model", both, meant, lambda pair: not all(pair))


class Task(NamedTuple):
    """What a recipe brings.

    A batch is a NamedTuple of arrays with the rows first, with the fields `real` (bool, False on rows that fill up the
    last batch of an evaluation), `weights` (filled in by `weights_fn`) and, where there is a `reference_fn`, `reference`.

    Attributes:
        label: What is running.
        train: Rows to learn from, tokenized.
        held_out: Rows to evaluate on.
        length: Tokens of a row.
        longest: Tokens of the longest row, where rows are not read beforehand; None: `max_length`.
        tokens: Tokens that `num_tokens` counts of a row; None: its length.
        collate: `collate(rows, length) -> batch`, padded to the length.
        loss_fn: `loss_fn(params, batch, key) -> (loss, metrics)`; with `frozen`, it is given them by that name too.
        evaluation_loss_fn: The same without dropout and noise.
        weights_fn: Weights of a whole batch; None for a loss that cannot be split.
        reference_fn: `reference_fn(params, batch) -> tree` of what the reference thinks of each row.
        prepare: `prepare(params, batch) -> batch`: adds statistics of the whole batch, under the current parameters.
        frozen: Parameters that the loss needs and that do not change (those of a teacher).
        describe: `describe(batch) -> metrics`: more metrics of a step, from its batch.
        derive: `derive(metrics) -> metrics`: more metrics of an evaluation, from those of the loss (`eval_…`).
        prompts: Token ids of prompts for samples.
        show: Metrics of the progress line.
    """

    label: str
    train: Sequence[Any]
    held_out: Sequence[Any]
    length: Callable[[Any], int]
    collate: Callable[[Sequence[Any], int], Any]
    loss_fn: Callable[..., tuple[Scalar, Metrics]]
    evaluation_loss_fn: Callable[..., tuple[Scalar, Metrics]]
    weights_fn: WeightsFunction | None
    longest: int | None = None
    tokens: Callable[[Any], int] | None = None
    reference_fn: Callable[[Params, Any], Any] | None = None
    prepare: Callable[[Params, Any], Any] | None = None
    frozen: Params | None = None
    describe: Callable[[Any], dict[str, Any]] = lambda batch: {}
    derive: Callable[[Metrics], dict[str, Any]] = lambda metrics: {}
    prompts: Sequence[np.ndarray] = ()
    show: Sequence[str] = ("loss", "eval_loss")


def load_examples(config: OfflineOptions, dataset: str, read: Callable[[Row], Any]) -> list[Any]:
    """Reads all rows of a source.

    Raises:
        ValueError: If a row is wrong, or there is none.
    """
    return [read(row) for row in read_dataset(dataset, config.split)]


def load_splits(config: OfflineOptions, read: Callable[[Row], Any]) -> tuple[list[Any], list[Any]]:
    """Reads the rows to train on and those held out, as the config says.

    Raises:
        ValueError: If a row is wrong, or there is none.
    """
    if config.eval_dataset:
        return load_examples(config, config.dataset, read), load_examples(config, config.eval_dataset, read)
    examples = [read(row) for row in load_rows(config.dataset, config.split)]
    parts = split_indices(len(examples), held_out=config.eval_fraction, seed=0)
    train, held_out = ([examples[i] for i in indices] for indices in parts)
    return train, held_out


def sample_prompts(examples: Sequence[SupervisedExample], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Tokenizes what each example asks: its prompt, or its conversation up to the assistant's last turn.

    Examples of plain text ask nothing, and are left out.
    """
    asked: list[Prompt] = []
    for prompt, completion in examples:
        if isinstance(prompt, tuple) and isinstance(completion, tuple):
            turns = (*prompt, *completion)
            prompt = turns[: max(index for index, turn in enumerate(turns) if turn.role == "assistant")]
        asked.append(prompt)
    return [tokenize_prompt(prompt, tokenizer) for prompt in asked if prompt]


def real_rows(rows: Sequence[Any]) -> Bool[Array, " batch"]:
    """Makes the field `real` of a batch of rows that all count."""
    return jnp.asarray(np.ones(len(rows), bool))


def targets(batch: TokenBatch) -> Bool[Array, "batch targets"]:
    """Tells which tokens are learned, of all but the first, which nothing predicts."""
    return jnp.asarray(batch.loss_mask)[:, 1:]
