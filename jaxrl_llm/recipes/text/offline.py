"""The run of every recipe that learns from rows of text alone, without sampling or rewards.

A recipe brings a `Task`: its rows, how they become a batch, a loss, and the weights of the loss. The rest is the same for
all: shuffled batches of fixed shape, a reference policy where one is needed, evaluation on held-out rows, samples,
checkpoints, early stopping, and the saved model.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxrl_llm.data import LazySequence, batch_indices, bucket_length
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
from jaxrl_llm.recipes.options import OptimizerOptions, require
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text.language_model import (
    ADAPTER,
    LanguageModel,
    complete,
    require_room,
    save_model,
    sizes,
)
from jaxrl_llm.recipes.text.offline_task import OfflineOptions, ReferenceOptions, Task
from jaxrl_llm.reductions import combine_metrics
from jaxrl_llm.training import TrainState, init_train_state, make_train_step, sync_reference
from jaxrl_llm.training.parallel import (
    local_rows,
    num_shards,
    parse_mesh,
    shard,
    shard_batch,
    shardings,
    sum_over_processes,
    whole,
)
from jaxrl_llm.training.step import LossFunction, WeightsFunction
from jaxrl_llm.types import Key, Metrics, Params, Scalar


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
    mesh = parse_mesh(config.mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        task = task._replace(frozen=shard(task.frozen, mesh))
        return _train(config, model, task, reference or ReferenceOptions(), mesh)


def _train(
    config: OfflineOptions, model: LanguageModel, task: Task, reference: ReferenceOptions, mesh: Mesh | None
) -> tuple[Params, dict[str, Any]]:
    _, key, sample_key = run_keys(config.seed)
    trainable, base = split_trainable(model.params)
    meant, patience = "0 with several processes, for they would all read the metrics", config.early_stopping_patience
    require("early_stopping_patience", patience, meant, lambda p: p == 0 or jax.process_count() == 1)
    meant = "false with lora: the reference is the model with its adapters off, and stays"
    require("sync_ref_model", reference.sync_ref_model, meant, lambda moves: not moves or base is None)
    lengths = None
    if config.group_by_length:
        lengths = np.array([task.length(row) for row in task.train])
    longest = require_rows_fit(config, model, task)
    size, num_rows = config.per_device_train_batch_size * num_shards(mesh), len(task.train)
    mine = local_rows(size, mesh)
    total_steps = config.max_steps or max(round(config.num_train_epochs * num_rows / size), 1)
    optimizer, schedule = config.optimizer(total_steps), config.schedule(total_steps)

    state = shard(init_train_state(trainable, optimizer), mesh)
    placed: dict[str, Any] = {} if mesh is None else {"out_shardings": (shardings(state, mesh), None)}
    step = jax.jit(make_step(config, task.loss_fn, task.weights_fn, optimizer), donate_argnums=0, **placed)
    sync = jax.jit(sync_reference, donate_argnums=0)
    prepare = None if task.prepare is None else jax.jit(task.prepare)
    score = None if task.reference_fn is None else jax.jit(task.reference_fn)
    start = base
    if score is not None and base is None:  # a copy, for the step gives the memory of its state away
        start = jax.tree.map(jnp.copy, model.params)
    held_out = _stack(task, min(size, len(task.held_out)), mesh)
    scored = None
    if score is not None and not reference.sync_ref_model:
        score_stack = jax.jit(lambda params, stack: jax.lax.map(partial(score, params), stack))
        held_out = held_out._replace(reference=score_stack(start, held_out))
    if score is not None and reference.precompute_ref_log_probs:
        scored, start = _score_all(partial(score, start), task, longest, size, mesh), None
    evaluate = make_evaluation(task, held_out)

    def policy(state: OfflineState) -> Params:
        return join_trainable(state.train.params, base)

    def update(state: OfflineState, index: int) -> tuple[OfflineState, Metrics]:
        indices = batch_indices(num_rows, size, seed=config.seed, step=index, lengths=lengths)
        length = longest
        if lengths is not None:
            length = bucket_length(int(lengths[indices].max()), max_length=longest)
        rows = [task.train[i] for i in indices[mine]]
        batch = task.collate(rows, length)
        described = {name: sum_over_processes(value) for name, value in task.describe(batch).items()}
        if scored is not None:
            batch = batch._replace(reference=jax.tree.map(lambda x: x[indices[mine]], scored))
        batch = shard_batch(batch, mesh)
        if scored is None and score is not None:
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
        num_tokens = state.num_tokens + sum_over_processes(sum(map(task.tokens or task.length, rows)))
        done = {"epoch": (index + 1) * size / num_rows, "num_tokens": num_tokens}
        metrics |= described | {"learning_rate": schedule(index)} | done
        return OfflineState(train, ref_params, num_tokens), metrics

    folder = Path(config.output_dir) / "model"
    state, complete_run = training_loop(
        config,
        OfflineState(state, start if reference.sync_ref_model else None),
        update,
        total_steps=total_steps,
        label=task.label,
        about={"rows_per_step": size},
        evaluate=lambda state: evaluate(policy(state), state.ref_params),
        sample=_sampler(config, model, task, sample_key, policy),
        early_stopping=_early_stopping(config, model, folder, policy),
        show=task.show,
    )
    params = policy(state)
    if complete_run and config.early_stopping_patience:  # the best model is there already
        params = shard(_load_best(folder, model, base), mesh)
    elif complete_run:
        save_model(folder, model, params)
    figures: dict[str, Any] = {k: float(v) for k, v in evaluate(params, state.ref_params).items()}
    return params, figures | ({"model": str(folder)} if complete_run else {})


def make_step(
    config: OptimizerOptions,
    loss_fn: Callable[..., tuple[Scalar, Metrics]],
    weights_fn: WeightsFunction | None,
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, Any, Key, Fixed], tuple[TrainState, Metrics]]:
    """Makes `step(state, batch, key, fixed) -> (state, metrics)` of a loss of all parameters."""

    def step(state: TrainState, batch: Any, key: Key, fixed: Fixed) -> tuple[TrainState, Metrics]:
        make = make_train_step(
            _with_fixed(loss_fn, fixed),
            optimizer,
            weights_fn=weights_fn,
            num_microbatches=config.gradient_accumulation_steps,
            skip_nonfinite=config.skip_nonfinite,
        )
        return make(state, batch, key)

    return step


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
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), held_out)
        weights = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), task.weights_fn(rows, None))
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
        return load_adapters(folder.with_name(ADAPTER), model.module, base.base)
    load = from_pretrained_reward_model if isinstance(model.module, ScalarHead) else from_pretrained
    return load(folder)[1]


def _stack(task: Task, size: int, mesh: Mesh | None) -> Any:
    """Collates all held-out rows: arrays of [batches, size, …]. What fills the last batch up is not `real`."""
    rows, count = list(task.held_out), len(task.held_out)
    shards = num_shards(mesh)
    size = -(-size // shards) * shards
    if task.weights_fn is None:  # no weights could leave out what fills a batch up
        meant = f"of {count} parts at most, as many as there are held-out rows, for a loss that cannot be split"
        require("mesh", shards, meant, lambda parts: parts <= count)
        size = min(size, count // shards * shards)
        rows = rows[: count // size * size]
    rows += [rows[0]] * (-len(rows) % size)
    batch = task.collate(rows, max(map(task.length, rows)))
    batch = batch._replace(real=np.arange(len(rows)) < count)
    mine = local_rows(size, mesh)
    stack = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, size, *x.shape[1:])[:, mine], batch)
    return shard_batch(stack, mesh, axis=1)


def _score_all(score: Callable[[Any], Any], task: Task, length: int, size: int, mesh: Mesh | None) -> Any:
    """Scores all training rows in their order: numpy arrays of [rows, …]."""
    rows = list(task.train)
    filled, mine = rows + [rows[0]] * (-len(rows) % size), local_rows(size, mesh)

    def score_some(first: int) -> Any:
        batch = task.collate(filled[first : first + size][mine], length)
        return jax.device_get(whole(score(shard_batch(batch, mesh))))

    parts = [score_some(first) for first in range(0, len(filled), size)]
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


def report(title: str, config: OfflineOptions, model: LanguageModel, train: Any, held_out: Any) -> None:
    """Prints what is going to be learned."""
    known = {"training": train, "held out": held_out} | sizes(config, model)
    facts(f"{title} on {config.dataset}", known | {"folder": config.output_dir})
