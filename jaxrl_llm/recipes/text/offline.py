"""The run of every recipe that learns from rows of text alone, without sampling or rewards.

A recipe brings a `Task`: its rows, how they become a batch, a loss, and the weights of the loss. The rest is the same for
all: shuffled batches of fixed shape, a reference policy where one is needed, evaluation on held-out rows, samples,
checkpoints, early stopping, and the saved model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxrl_llm.data import (
    LazySequence,
    Row,
    SupervisedExample,
    TokenBatch,
    batch_indices,
    bucket_length,
    split_indices,
    tokenize_prompt,
)
from jaxrl_llm.data.examples import Prompt
from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.models import (
    Adapted,
    ScalarHead,
    from_pretrained,
    from_pretrained_reward_model,
    join_trainable,
    load_adapters,
    split_trainable,
)
from jaxrl_llm.recipes.loop import EarlyStopping, training_loop
from jaxrl_llm.recipes.options import ModelOptions, OptimizerOptions, RunOptions, require, require_at_least
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text.language_model import (
    ADAPTER,
    LanguageModel,
    complete,
    load_rows,
    read_dataset,
    require_room,
    save_model,
    sizes,
)
from jaxrl_llm.reductions import combine_metrics
from jaxrl_llm.training import TrainState, init_train_state, make_train_step, sync_reference
from jaxrl_llm.training.step import LossFunction, WeightsFunction
from jaxrl_llm.types import Key, Metrics, Params, Scalar


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
    """Rows of a step; gradient_accumulation_steps divides them into parts (in TRL it multiplies them)."""
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


class Fixed(NamedTuple):
    """What a step reads and never changes; it is an argument of the compiled step, so that there is one copy of it.

    Attributes:
        base: The model without its adapters; None where all of it is trained.
        frozen: What the task needs.
    """

    base: Adapted | None
    frozen: Params | None


class OfflineState(NamedTuple):
    """What a run changes.

    Attributes:
        train: The model, or its adapters alone, and its optimizer.
        ref_params: The reference, where it follows the model; else None, for it is the model of the start.
        num_tokens: Tokens read so far, prompts with them.
    """

    train: TrainState
    ref_params: Params | None
    num_tokens: int = 0


def run_keys(seed: int) -> tuple[Key, Key, Key]:
    """Makes the keys of a run: of a new model, of training, and of samples."""
    init_key, train_key, sample_key = jax.random.split(jax.random.key(seed), 3)
    return init_key, train_key, sample_key


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


def train_offline(
    config: OfflineOptions, model: LanguageModel, task: Task, *, reference: ReferenceOptions | None = None
) -> tuple[Params, dict[str, Any]]:
    """Trains, evaluates and saves.

    Args:
        config: Settings of the recipe.
        model: Where to start.
        task: What to learn.
        reference: Settings of the reference, for a task with a `reference_fn`.

    Returns:
        The trained parameters (with early stopping, the best), and figures: all their evaluation metrics and, of a
        complete run, `model` (its folder).

    Raises:
        ValueError: If a row is longer than the model reads, or the reference of adapters should move.
    """
    _, key, sample_key = run_keys(config.seed)
    reference = reference or ReferenceOptions()
    trainable, base = split_trainable(model.params)
    meant = "false with lora: the reference is the model with its adapters off, and stays"
    require("sync_ref_model", reference.sync_ref_model, meant, lambda moves: not moves or base is None)
    lengths = None
    if config.group_by_length:
        lengths = np.array([task.length(row) for row in task.train])
    longest = require_rows_fit(config, model, task)
    size, num_rows = config.per_device_train_batch_size, len(task.train)
    total_steps = config.max_steps or max(round(config.num_train_epochs * num_rows / size), 1)
    optimizer, schedule = config.optimizer(total_steps), config.schedule(total_steps)

    def one_step(state: TrainState, batch: Any, key: Key, fixed: Fixed) -> tuple[TrainState, Metrics]:
        step = make_train_step(
            _with_fixed(task.loss_fn, fixed),
            optimizer,
            weights_fn=task.weights_fn,
            num_microbatches=config.gradient_accumulation_steps,
            skip_nonfinite=config.skip_nonfinite,
        )
        return step(state, batch, key)

    step = jax.jit(one_step, donate_argnums=0)
    sync = jax.jit(sync_reference, donate_argnums=0)
    prepare = None if task.prepare is None else jax.jit(task.prepare)
    score = None if task.reference_fn is None else jax.jit(task.reference_fn)
    start = base
    if score is not None and base is None:  # a copy, for the step gives the memory of its state away
        start = jax.tree.map(jnp.copy, model.params)
    held_out = _stack(task, min(size, len(task.held_out)))
    scored = None
    if score is not None and not reference.sync_ref_model:
        held_out = held_out._replace(reference=jax.lax.map(partial(score, start), held_out))
    if score is not None and reference.precompute_ref_log_probs:
        scored, start = _score_all(partial(score, start), task, longest, size), None
    evaluate = make_evaluation(task, held_out)

    def policy(state: OfflineState) -> Params:
        return join_trainable(state.train.params, base)

    def update(state: OfflineState, index: int) -> tuple[OfflineState, Metrics]:
        indices = batch_indices(num_rows, size, seed=config.seed, step=index, lengths=lengths)
        length = longest
        if lengths is not None:
            length = bucket_length(int(lengths[indices].max()), max_length=longest)
        rows = [task.train[i] for i in indices]
        batch = task.collate(rows, length)
        if scored is not None:
            batch = batch._replace(reference=jax.tree.map(lambda x: x[indices], scored))
        elif score is not None:
            batch = batch._replace(reference=score(state.ref_params if reference.sync_ref_model else start, batch))
        if prepare is not None:
            batch = prepare(policy(state), batch)
        train, metrics = step(state.train, batch, key, Fixed(base, task.frozen))
        ref_params = state.ref_params
        if reference.sync_ref_model:
            ref_params = sync(
                ref_params,
                train.params,
                train.step,
                mixup_alpha=reference.ref_model_mixup_alpha,
                sync_steps=reference.ref_model_sync_steps,
            )
        num_tokens = state.num_tokens + sum(map(task.tokens or task.length, rows))
        done = {"epoch": (index + 1) * size / num_rows, "num_tokens": num_tokens}
        metrics |= task.describe(batch) | {"learning_rate": schedule(index)} | done
        return OfflineState(train, ref_params, num_tokens), metrics

    folder = Path(config.output_dir) / "model"
    state, complete_run = training_loop(
        config,
        OfflineState(init_train_state(trainable, optimizer), start if reference.sync_ref_model else None),
        update,
        total_steps=total_steps,
        label=task.label,
        evaluate=lambda state: evaluate(policy(state), state.ref_params),
        sample=_sampler(config, model, task, sample_key, policy),
        early_stopping=_early_stopping(config, model, folder, policy),
        show=task.show,
    )
    params = policy(state)
    if complete_run and config.early_stopping_patience:  # the best model is there already
        params = _load_best(folder, model, base)
    elif complete_run:
        save_model(folder, model, params)
    figures: dict[str, Any] = {k: float(v) for k, v in evaluate(params, state.ref_params).items()}
    return params, figures | ({"model": str(folder)} if complete_run else {})


def require_rows_fit(config: OfflineOptions, model: LanguageModel, task: Task) -> int:
    """Returns the tokens of the longest row; where rows are not read beforehand, what the task says, or `max_length`.

    Raises:
        ValueError: If the model reads fewer.
    """
    lazy = isinstance(task.train, LazySequence)
    given = task.longest or config.max_length
    longest = given if lazy else max(map(task.length, [*task.train, *task.held_out]))
    require_room(model, longest - 1, "lower max_length, or give a new model more n_positions")
    return longest


def make_evaluation(task: Task, held_out: Any) -> Callable[[Params, Params | None], dict[str, Any]]:
    """Makes `evaluate(params, ref_params) -> metrics`: those of the loss over all held-out rows, named `eval_…`.

    Weights are made from all rows together, so the metrics do not depend on the size of a batch; a loss that cannot be
    split is averaged over whole batches.
    """

    @jax.jit
    def evaluate(params: Params, ref_params: Params | None, held_out: Any, frozen: Params | None) -> Metrics:
        loss_fn = _with_fixed(task.evaluation_loss_fn, Fixed(None, frozen))

        def one(batch: Any) -> Metrics:
            if ref_params is not None and task.reference_fn is not None:
                batch = batch._replace(reference=task.reference_fn(ref_params, batch))
            if task.prepare is not None:
                batch = task.prepare(params, batch)
            loss, metrics = loss_fn(params, batch, jax.random.key(0))
            return metrics | {"loss": loss}

        if task.weights_fn is None:
            return jax.tree.map(jnp.mean, jax.lax.map(one, held_out))
        shape = held_out.real.shape
        whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), held_out)
        weights = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), task.weights_fn(whole, None))
        return combine_metrics(jax.lax.map(one, held_out._replace(weights=weights)))

    def named(params: Params, ref_params: Params | None) -> dict[str, Any]:
        metrics = {f"eval_{k}": v for k, v in evaluate(params, ref_params, held_out, task.frozen).items()}
        return metrics | task.derive(metrics)

    return named


def _with_fixed(loss_fn: Callable[..., tuple[Scalar, Metrics]], fixed: Fixed) -> LossFunction:
    """Makes a loss of what is trained out of one of all parameters."""
    options = {} if fixed.frozen is None else {"frozen": fixed.frozen}
    return lambda params, batch, key: loss_fn(join_trainable(params, fixed.base), batch, key, **options)


def _load_best(folder: Path, model: LanguageModel, base: Adapted | None) -> Params:
    """Loads what early stopping kept."""
    if base is not None:
        return join_trainable(load_adapters(folder.with_name(ADAPTER)), base)
    load = from_pretrained_reward_model if isinstance(model.module, ScalarHead) else from_pretrained
    return load(folder)[1]


def _stack(task: Task, size: int) -> Any:
    """Collates all held-out rows: arrays of [batches, size, …]. What fills the last batch up is not `real`."""
    rows, count = list(task.held_out), len(task.held_out)
    if task.weights_fn is None:
        rows = rows[: count // size * size]
    rows += [rows[0]] * (-len(rows) % size)
    batch = task.collate(rows, max(map(task.length, rows)))
    batch = batch._replace(real=np.arange(len(rows)) < count)
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, size, *x.shape[1:]), batch)


def _score_all(score: Callable[[Any], Any], task: Task, length: int, size: int) -> Any:
    """Scores all training rows in their order: numpy arrays of [rows, …]."""
    rows = list(task.train)
    filled = rows + [rows[0]] * (-len(rows) % size)
    parts = [jax.device_get(score(task.collate(filled[i : i + size], length))) for i in range(0, len(filled), size)]
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *parts)


def _sampler(
    config: OfflineOptions, model: LanguageModel, task: Task, key: Key, policy: Callable[[OfflineState], Params]
) -> Callable[[OfflineState, int], list[dict[str, Any]]] | None:
    """Makes `sample(state, step) -> [{"prompt", "completion"}]`, from the model's own distribution.

    Prompts that leave no room are passed over; a completion takes half of the context at most.
    """
    length = min(config.sample_tokens, max(model.context_length // 2, 1))
    room = model.context_length - length + 1
    prompts = [ids for ids in task.prompts if len(ids) <= room][: config.num_samples]
    if not prompts:
        return None
    shown = model.tokenizer.batch_decode(prompts)

    def sample(state: OfflineState, step: int) -> list[dict[str, Any]]:
        texts = complete(
            model,
            policy(state),
            prompts,
            jax.random.fold_in(key, step),
            max_new_tokens=length,
            temperature=1.0,
        )
        return [{"prompt": prompt, "completion": text} for prompt, text in zip(shown, texts, strict=True)]

    return sample


def _early_stopping(
    config: OfflineOptions, model: LanguageModel, folder: Path, policy: Callable[[OfflineState], Params]
) -> EarlyStopping | None:
    if not config.early_stopping_patience:
        return None

    def keep(state: OfflineState) -> None:
        save_model(folder, model, policy(state))

    return EarlyStopping("eval_loss", config.early_stopping_patience, keep)


def real_rows(rows: Sequence[Any]) -> Bool[Array, " batch"]:
    """Makes the field `real` of a batch of rows that all count."""
    return jnp.asarray(np.ones(len(rows), bool))


def targets(batch: TokenBatch) -> Bool[Array, "batch targets"]:
    """Tells which tokens are learned, of all but the first, which nothing predicts."""
    return jnp.asarray(batch.loss_mask)[:, 1:]


def report(title: str, config: OfflineOptions, model: LanguageModel, train: Any, held_out: Any) -> None:
    """Prints what is going to be learned."""
    known = {"training": train, "held out": held_out} | sizes(config, model)
    facts(f"{title} on {config.dataset}", known | {"folder": config.output_dir})
