"""The run of every recipe that learns from what the model itself writes: data, rewards, evaluation, files.

`iteration.py` holds what happens in an iteration; here are the loop around it and the edge: prompts of a dataset, reward
functions by name, held-out prompts completed greedily, completions in the log, the saved model.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from jaxrl_llm.data import batch_indices, prompt_example, split_indices
from jaxrl_llm.models import join_trainable, split_trainable
from jaxrl_llm.optimizers.first_order import ScheduleName
from jaxrl_llm.recipes.loop import training_loop
from jaxrl_llm.recipes.options import LearningRates, OptimizerOptions
from jaxrl_llm.recipes.progress import facts, table
from jaxrl_llm.recipes.text.experience import Policy, Rollout
from jaxrl_llm.recipes.text.iteration import (
    Method,
    OnlineOptions,
    OnlineState,
    as_rollout,
    iteration_keys,
    make_iteration,
    make_sampler,
    make_update,
    start_state,
)
from jaxrl_llm.recipes.text.language_model import (
    LanguageModel,
    decode,
    load_model,
    load_rows,
    require_room,
    save_model,
    sizes,
)
from jaxrl_llm.recipes.text.prompts import (
    HostRewards,
    PromptTable,
    TracedRewards,
    function_metrics,
    load_host_rewards,
    load_traceable_reward,
    make_prompt_table,
    reward_contexts,
)
from jaxrl_llm.rollouts import Completions
from jaxrl_llm.training.logging import read_metrics, require_free
from jaxrl_llm.training.parallel import local_rows, parse_mesh, shard, shard_batch, shardings, wait_for_processes
from jaxrl_llm.training.parallel import whole as fetch
from jaxrl_llm.types import Key, Params

SAMPLES = 8
"""Completions of an iteration that go into samples.jsonl at every evaluation."""


class Parts(NamedTuple):
    """What `run_online` puts together before it starts.

    Attributes:
        model: The language model.
        train: Prompts to learn from.
        held_out: Prompts to evaluate on.
        rewards: The reward functions.
    """

    model: LanguageModel
    train: PromptTable
    held_out: PromptTable
    rewards: HostRewards | TracedRewards


class RunState(NamedTuple):
    """What a run changes.

    Attributes:
        online: What iterations change.
        num_tokens: Tokens of all completions so far, and of their prompts.
    """

    online: OnlineState
    num_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstOrderOptions(OnlineOptions, OptimizerOptions):
    """Settings of an online run whose updates follow the gradient."""

    learning_rate: float | None = None
    """Peak learning rate; None: 1e-6, of adapters 1e-5. Small new models need far more."""
    default_learning_rates: ClassVar = LearningRates(new=1e-6, full=1e-6, adapters=1e-5)
    lr_scheduler_type: ScheduleName = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises from 0. Adam's first steps are large: small models need some."""
    weight_decay: float = 0.0
    """Decoupled decay, not on biases and norms."""


def run_first_order(
    config: FirstOrderOptions, make_method: Callable[[LanguageModel, Any], Method], *, needs_reference: bool
) -> dict[str, Any]:
    """Runs a method with the optimizer of its settings, see `run_online`."""
    updates = config.max_steps * config.updates_per_step
    optimizer, schedule = config.optimizer(updates), config.schedule(updates)
    return run_online(config, make_method, optimizer, needs_reference=needs_reference, schedule=schedule)


def bind(model: LanguageModel, frozen: Params | None, config: OnlineOptions) -> Policy:
    """Makes functions of the trained parameters: with LoRA the adapters, else all. `frozen` are the others."""

    def apply(variables: dict[str, Params], *args: Any, **options: Any) -> tuple[Any, Any]:
        return model.apply({"params": join_trainable(variables["params"], frozen)}, *args, **options)

    def head_kernel(params: Params) -> Array:
        return model.head_kernel(join_trainable(params, frozen))

    return Policy(apply, head_kernel, config.temperature, config.chunk_size)


def run_online(
    config: OnlineOptions,
    make_method: Callable[[LanguageModel, Any], Method],
    optimizer: optax.GradientTransformation,
    *,
    needs_reference: bool,
    schedule: optax.Schedule | None = None,
) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Args:
        config: Settings of the recipe.
        make_method: `make_method(model, config)`.
        optimizer: Makes the updates.
        needs_reference: Whether the method compares with the model as it was at the start.
        schedule: Learning rate by update, for the log.

    Returns:
        `model` (folder of the trained model, of a complete run), and the mean reward of greedy completions of held-out
        prompts before and after: `eval_reward_before`, `eval_reward`.

    Raises:
        ValueError: If a row of the data or a reward function is wrong.
    """
    if not (config.resume or config.overwrite):
        require_free(config.output_dir)
    wait_for_processes("before the run")
    init_key, train_key, eval_key, start_key = jax.random.split(jax.random.key(config.seed), 4)
    parts = load_parts(config, init_key)
    mesh = parse_mesh(config.mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        if isinstance(parts.rewards, TracedRewards):
            parts = parts._replace(rewards=parts.rewards._replace(reward=shard(parts.rewards.reward, mesh)))
        keys = train_key, eval_key, start_key
        return _train(config, parts, make_method, optimizer, keys, needs_reference, schedule, mesh)


def _train(
    config: OnlineOptions,
    parts: Parts,
    make_method: Callable[[LanguageModel, Any], Method],
    optimizer: optax.GradientTransformation,
    keys: tuple[Key, Key, Key],
    needs_reference: bool,
    schedule: optax.Schedule | None,
    mesh: Mesh | None,
) -> dict[str, Any]:
    model, train = parts.model, parts.train
    train_key, eval_key, start_key = keys
    method = make_method(model, config)
    facts(
        f"{method.label.upper()} on {config.dataset}",
        {
            "training": f"{len(train.tokens)} prompts",
            "held out": f"{len(parts.held_out.tokens)} prompts",
            **sizes(config, model),
            "folder": config.output_dir,
        },
    )
    trained, frozen = split_trainable(model.params)
    # With LoRA the base without adapters; else a copy, for the step gives the memory of its state away.
    ref_params: Params | None = None
    if needs_reference:
        ref_params = jax.tree.map(jnp.copy, trained) if frozen is None else {}
    start = RunState(shard(start_state(method, method.start(start_key, trained), optimizer), mesh))
    iterate = compile_iteration(parts, method, optimizer, config, start.online, mesh)
    held_out_reward = make_evaluation(parts, method, config)
    last: dict[str, Rollout] = {}

    def update(state: RunState, index: int) -> tuple[RunState, dict[str, Any]]:
        indices = batch_indices(len(train.tokens), config.num_prompts, seed=config.seed, step=index)
        online, metrics, rollout = iterate(state.online, indices, train_key, ref_params, frozen)
        last["rollout"] = rollout
        num_tokens = state.num_tokens + int(rollout.prompt_mask.sum() + rollout.completions.mask.sum())
        metrics = metrics | {"num_tokens": num_tokens}
        if schedule is not None:
            metrics = metrics | {"learning_rate": schedule(index * config.updates_per_step)}
        return RunState(online, num_tokens), metrics

    def evaluate(state: RunState) -> dict[str, Any]:
        return {"eval_reward": known.pop() if known else held_out_reward(state.online.train.params, frozen, eval_key)}

    # Before the run leaves anything behind: a reward that does not work is found here.
    known = [] if config.resume else [held_out_reward(start.online.train.params, frozen, eval_key)]
    state, complete_run = training_loop(
        config,
        start,
        update,
        total_steps=config.max_steps,
        label=method.label,
        evaluate=evaluate,
        sample=lambda state, step: sampled_rows(model, last.get("rollout"), config, step),
        show=method.show,
    )
    lines = read_metrics(config.output_dir)
    figures: dict[str, Any] = {"eval_reward_before": lines[0]["eval_reward"]}
    figures["eval_reward"] = lines[-1]["eval_reward"] if complete_run else evaluate(state)["eval_reward"]
    if complete_run:
        figures["model"] = str(Path(config.output_dir) / "model")
        params = join_trainable(method.policy_params(state.online.train.params), frozen)
        save_model(Path(figures["model"]), model, params)
    facts("Result", figures)
    return figures


def load_parts(config: OnlineOptions, key: Key) -> Parts:
    """Loads the model, the prompts and the rewards that the settings name.

    Raises:
        ValueError: If one of them is wrong, or the model has no room for prompts and completions.
    """
    model = load_model(config, key)
    train, held_out = _tables(model, config)
    tokens = max(train.longest, held_out.longest) + config.max_completion_length - 1
    require_room(model, tokens, "lower max_prompt_length or max_completion_length")
    rewards = load_rewards(model, config)
    # A reward model reads the last token too, which the policy only writes.
    room = min([model.context_length + 1, *reward_contexts(rewards)]) - config.max_completion_length
    longest = max(train.longest, held_out.longest)
    if longest > room:
        raise ValueError(
            f"A reward model reads {room + config.max_completion_length} tokens, and {longest} of a prompt with "
            f"max_completion_length={config.max_completion_length} are more: lower either, or max_prompt_length."
        )
    train, held_out = (table._replace(length=min(table.length, room)) for table in (train, held_out))
    return Parts(model, train, held_out, rewards)


def _tables(model: LanguageModel, config: OnlineOptions) -> list[PromptTable]:
    """Reads the dataset; returns its training and its held-out prompts."""
    examples = [prompt_example(row) for row in load_rows(config.dataset, config.split)]
    train, held_out = split_indices(len(examples), held_out=config.eval_fraction, seed=0)
    spread = np.linspace(0, len(held_out) - 1, min(config.eval_prompts, len(held_out))).round().astype(int)
    return [
        make_prompt_table(model, [examples[i] for i in part], max_prompt_length=config.max_prompt_length)
        for part in (train, held_out[spread])
    ]


def load_rewards(model: LanguageModel, config: OnlineOptions) -> HostRewards | TracedRewards:
    """Loads the reward functions that the settings name."""
    if config.traceable_rewards:
        reward = load_traceable_reward(config.reward_funcs, model.eos_ids, tokenizer=model.tokenizer)
        return TracedRewards(model, reward)
    timeout = config.reward_timeout or None
    return load_host_rewards(model, config.reward_funcs, errors=config.reward_errors, timeout=timeout)


def compile_iteration(
    parts: Parts,
    method: Method,
    optimizer: optax.GradientTransformation,
    config: OnlineOptions,
    start: OnlineState,
    mesh: Mesh | None,
) -> Callable[..., tuple[OnlineState, dict[str, Any], Rollout]]:
    """Makes `iterate(state, indices, key, ref_params, frozen)`: one program, or two with the rewards between them.

    On a mesh the state stays where `start` has it. Every process computes all rewards, and keeps those of its rows.
    """
    model, rewards, train = parts.model, parts.rewards, parts.train
    where = None if mesh is None else shardings(start, mesh)
    mine = local_rows(config.num_prompts, mesh)
    for rows in (config.num_rows // config.scoring_parts, config.rollout_batch_size or config.num_prompts):
        local_rows(rows, mesh)  # raises where a part of the work could not be divided
    ids = {"eos_ids": model.eos_ids, "pad_id": model.pad_id}
    if isinstance(rewards, TracedRewards):

        @partial(jax.jit, donate_argnums=1, out_shardings=None if mesh is None else (where, None, None))
        def whole(reward, state, prompts, key, ref_params, frozen):
            policy = bind(model, frozen, config)
            iteration = make_iteration(policy, optimizer, method, reward, config, **ids)
            state, metrics, rollout = iteration(state, prompts, key, ref_params)
            return state, metrics | function_metrics(config.reward_funcs, rollout.rewards), rollout

        def iterate_whole(state, indices, key, ref_params, frozen):
            prompts = shard_batch(train.batch(indices[mine], model.pad_id), mesh)
            return whole(rewards.reward, state, prompts, key, ref_params, frozen)

        return iterate_whole

    programs = make_programs(model, method, optimizer, config)
    sample = jax.jit(programs.sample)
    update = jax.jit(programs.update, donate_argnums=0, out_shardings=None if mesh is None else (where, None))

    def iterate(state, indices, key, ref_params, frozen):
        sample_key, update_key = iteration_keys(key, state)
        prompts = shard_batch(train.batch(indices[mine], model.pad_id), mesh)
        completions = sample(state.train.params, sample_key, prompts, frozen)
        scores, reward_metrics = rewards(train, indices, fetch(completions))
        scores = shard_batch(np.asarray(scores)[local_rows(len(scores), mesh)], mesh)
        rollout = as_rollout(prompts, completions, jnp.asarray(scores), config.num_generations)
        state, metrics = update(state, ref_params, rollout, update_key, frozen)
        return state, metrics | reward_metrics, rollout

    return iterate


class Programs(NamedTuple):
    """The two programs of an iteration whose rewards are computed between them.

    Attributes:
        sample: `sample(params, key, prompts, frozen) -> Completions`.
        update: `update(state, ref_params, rollout, key, frozen) -> (state, metrics)`.
    """

    sample: Callable[..., Completions]
    update: Callable[..., tuple[OnlineState, dict[str, Any]]]


def make_programs(
    model: LanguageModel, method: Method, optimizer: optax.GradientTransformation, config: OnlineOptions
) -> Programs:
    """Makes both programs of an iteration, uncompiled."""

    def sample(params, key, prompts, frozen):
        make = make_sampler(bind(model, frozen, config), config, eos_ids=model.eos_ids, pad_id=model.pad_id)
        return make(method.policy_params(params), key, prompts)

    def update(state, ref_params, rollout, key, frozen):
        make = make_update(bind(model, frozen, config), optimizer, method, config, eos_ids=model.eos_ids)
        return make(state, ref_params, rollout, key)

    return Programs(sample, update)


def make_evaluation(
    parts: Parts, method: Method, config: OnlineOptions
) -> Callable[[Params, Params | None, Key], float]:
    """Makes `evaluate(params, frozen, key)`: the mean reward of greedy completions of all held-out prompts."""
    model, held_out = parts.model, parts.held_out
    greedy = dataclasses.replace(
        config, num_generations=1, temperature=0.0, repetition_penalty=1.0, rollout_batch_size=0
    )
    count = len(held_out.tokens)
    size = min(count, 256, (config.rollout_batch_size or config.num_prompts) * config.num_generations)

    @jax.jit
    def sample(params, frozen, key, prompts):
        policy = bind(model, frozen, greedy)
        make = make_sampler(policy, greedy, eos_ids=model.eos_ids, pad_id=model.pad_id)
        return make(method.policy_params(params), key, prompts)

    def evaluate(params: Params, frozen: Params | None, key: Key) -> float:
        total = []
        for start in range(0, count, size):
            indices = np.arange(start, start + size) % count  # the last batch is filled up with the first prompts
            prompts = held_out.batch(indices, model.pad_id)
            completions = sample(params, frozen, key, prompts)
            scores = parts.rewards(held_out, indices, fetch(completions))[0]
            rollout = as_rollout(prompts, completions, jnp.asarray(scores), 1)
            total.append(np.asarray(rollout.total_rewards(config.reward_weights))[: count - start])
        given = np.concatenate(total)
        given = given[~np.isnan(given)]
        return float(given.mean()) if given.size else float("nan")

    return evaluate


def sampled_rows(
    model: LanguageModel, rollout: Rollout | None, config: OnlineOptions, step: int
) -> list[dict[str, Any]]:
    """Decodes completions of the last iteration for samples.jsonl; prints some of them as a table if asked to."""
    if rollout is None:
        return []
    count = min(max(SAMPLES, config.num_completions_to_print), config.num_rows)
    some = jax.tree.map(lambda x: np.asarray(x[:count]), fetch(rollout))
    prompts = [model.tokenizer.decode(ids[mask]) for ids, mask in zip(some.prompt_ids, some.prompt_mask, strict=True)]
    texts = decode(model.tokenizer, some.completions.ids, some.completions.mask)
    totals = np.asarray(some.total_rewards(config.reward_weights))
    rows = [
        {"prompt": prompt, "completion": text, "reward": None if np.isnan(total) else float(total)}
        for prompt, text, total in zip(prompts, texts, totals, strict=True)
    ]
    if config.num_completions_to_print:
        shown = [[str(value) for value in row.values()] for row in rows[: config.num_completions_to_print]]
        table(f"Completions of iteration {step}", ["prompt", "completion", "reward"], shown)
    return rows
