"""Group relative policy optimization (GRPO): sample several completions of each prompt, learn from the better ones.

    jaxrl-llm grpo --model runs/sums/model --reward-funcs jaxrl_llm.rewards:exact_match_tokens --traceable-rewards
    jaxrl-llm grpo --model my/gpt2 --dataset prompts.jsonl --reward-funcs my_rewards.py:helpful

One iteration: sample `num_generations` completions of each prompt, reward them, subtract the mean reward of each group
as there is no critic, and make `num_iterations` updates with the clipped surrogate. A reward is any Python function in
TRL's signature, `reward(prompts, completions, **columns) -> list[float | None]`. With `traceable_rewards` it is a JAX
function of token ids, and the whole iteration is one compiled program, which can be vmapped over seeds.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages import ScaleRewards, group_relative_advantages
from jaxrl_llm.data import batch_indices, prompt_example, split_indices
from jaxrl_llm.losses import grpo_loss
from jaxrl_llm.losses.group_relative import GRPOLossType, ImportanceSamplingLevel, grpo_weights
from jaxrl_llm.models import save_pretrained
from jaxrl_llm.optimizers.first_order import ScheduleName
from jaxrl_llm.recipes.loop import training_loop
from jaxrl_llm.recipes.options import ModelOptions, OptimizerOptions, RunOptions, require, require_at_least
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model, load_rows, require_room
from jaxrl_llm.recipes.text.prompts import (
    HostRewards,
    Prompts,
    PromptTable,
    TraceableReward,
    TracedRewards,
    load_traceable_reward,
    make_prompt_table,
)
from jaxrl_llm.reductions import LossWeights, masked_mean, masked_std
from jaxrl_llm.rewards import load_reward
from jaxrl_llm.rollouts import Completions, generate, score_completions
from jaxrl_llm.rollouts.scoring import Apply, HeadKernel
from jaxrl_llm.training import TrainState, init_train_state, make_train_step
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunOptions, ModelOptions, OptimizerOptions):
    """Settings of GRPO."""

    output_dir: str = "runs/grpo"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str = "sums"
    """`sums`, a .json, .jsonl or .parquet file, or the name of a dataset; rows with `prompt` and columns for rewards."""
    split: str = "train"
    """Split of a dataset that has several."""
    eval_fraction: float = 0.1
    """Share of the rows that is held out for evaluation."""
    max_prompt_length: int = 256
    """Longer prompts are left out, in tokens."""
    reward_funcs: tuple[str, ...] = ("jaxrl_llm.rewards:exact_match",)
    """Reward functions, as package.module:function or path/file.py:function."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function; empty: all 1."""
    traceable_rewards: bool = False
    """Compile the whole iteration. Rewards are JAX functions of `completion_ids`, `completion_mask` and columns (`x_ids`)."""
    num_prompts: int = 32
    """Prompts of an iteration."""
    num_generations: int = 8
    """Completions of each prompt: the group."""
    max_completion_length: int = 64
    """Longest completion that is sampled, in tokens."""
    temperature: float = 1.0
    """Divides the logits in sampling and scoring."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have probability p."""
    min_p: float = 0.0
    """Sample from tokens at least min_p times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens that came before less likely."""
    scale_rewards: ScaleRewards = "group"
    """Standard deviation that divides the advantages: of the group, of the batch, or none (Dr. GRPO)."""
    loss_type: GRPOLossType = "dapo"
    """How the loss is averaged over tokens."""
    importance_sampling_level: ImportanceSamplingLevel = "token"
    """Ratio of each token, or of the sequence (GSPO)."""
    num_iterations: int = 1
    """Updates on the completions of one iteration."""
    epsilon: float = 0.2
    """Lower clip of the ratio."""
    epsilon_high: float | None = None
    """Upper clip of the ratio; epsilon if not given."""
    delta: float | None = None
    """Upper bound of the ratio where the advantage is negative."""
    beta: float = 0.0
    """Strength of the KL penalty to the starting model."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    learning_rate: float = 1e-6
    """Peak learning rate. TRL's 1e-6 suits large pretrained models; small new ones need far more."""
    lr_scheduler_type: ScheduleName = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises from 0. Adam's first steps are large: small models need some."""
    weight_decay: float = 0.0
    """Decoupled decay, not on biases and norms."""
    max_steps: int = 200
    """Iterations of the run."""
    eval_prompts: int = 512
    """Held-out prompts that an evaluation completes greedily, at most; evenly spread where there are more."""


class Experience(NamedTuple):
    """What an update learns from; one row for each completion."""

    prompt_ids: Int[Array, "rows prompt_time"]
    prompt_mask: Bool[Array, "rows prompt_time"]
    completion_ids: Int[Array, "rows time"]
    completion_mask: Bool[Array, "rows time"]
    advantages: Float[Array, " rows"]
    old_log_probs: Float[Array, "rows time"] | None
    ref_log_probs: Float[Array, "rows time"] | None
    weights: LossWeights | None = None


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_run()
    config.validate_model()
    config.validate_optimizer()
    sizes = ("max_prompt_length", "num_prompts", "max_completion_length", "num_iterations", "max_steps", "eval_prompts")
    require_at_least(1, **{name: getattr(config, name) for name in sizes})
    require_at_least(2, num_generations=config.num_generations)
    rows = config.num_prompts * config.num_generations
    parts = config.gradient_accumulation_steps
    require("gradient_accumulation_steps", parts, f"a divisor of the {rows} completions", lambda k: rows % k == 0)
    require("temperature", config.temperature, "positive: greedy completions are all alike", lambda t: t > 0)
    require_at_least(0, top_k=config.top_k)
    require("top_p", config.top_p, "in (0, 1]", lambda p: 0 < p <= 1)
    require("min_p", config.min_p, "in [0, 1]", lambda p: 0 <= p <= 1)
    require("repetition_penalty", config.repetition_penalty, "positive", lambda penalty: penalty > 0)
    require("eval_fraction", config.eval_fraction, "between 0 and 1", lambda share: 0 < share < 1)
    require("epsilon", config.epsilon, "in (0, 1)", lambda e: 0 < e < 1)
    for name in ("epsilon_high", "delta"):
        require(name, getattr(config, name), "positive or None", lambda value: value is None or value > 0)
    require("beta", config.beta, "at least 0", lambda beta: beta >= 0)
    require("reward_funcs", config.reward_funcs, "at least one function", bool)
    weights, functions = len(config.reward_weights), len(config.reward_funcs)
    require(
        "reward_weights", config.reward_weights, f"{functions} numbers or none", lambda _: weights in (0, functions)
    )


def make_sampler(apply: Apply, config: Config, *, eos_id: int, pad_id: int):
    """Makes `sample(params, key, prompts) -> Completions`, `num_generations` rows for each prompt."""

    def sample(params: Params, key: Key, prompts: Prompts) -> Completions:
        return generate(
            apply,
            params,
            key,
            prompts.ids,
            prompts.mask,
            max_new_tokens=config.max_completion_length,
            num_generations=config.num_generations,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            eos_id=eos_id,
            pad_id=pad_id,
        )

    return sample


def make_update(apply: Apply, head_kernel: HeadKernel, optimizer: optax.GradientTransformation, config: Config):
    """Makes `update(state, ref_params, prompts, completions, rewards, key) -> (state, metrics)`.

    `ref_params` are the parameters of the reference model where β is positive, else None. `rewards` may hold NaN where
    no reward function applied. The update is pure and uncompiled.
    """
    score = partial(score_completions, apply, head_kernel, temperature=config.temperature, chunk_size=config.chunk_size)

    def loss_fn(params: Params, batch: Experience, key: Key) -> tuple[Scalar, Metrics]:
        statistics = score(params, batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask)
        return grpo_loss(
            statistics.log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.completion_mask,
            ref_log_probs=batch.ref_log_probs,
            entropy=statistics.entropy,
            loss_type=config.loss_type,
            importance_sampling_level=config.importance_sampling_level,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            delta=config.delta,
            beta=config.beta,
            max_completion_length=config.max_completion_length,
            entropy_coef=config.entropy_coef,
            weights=batch.weights,
        )

    def weights_fn(batch: Experience, axis_name: str | None) -> LossWeights:
        length = config.max_completion_length
        return grpo_weights(batch.completion_mask, config.loss_type, max_completion_length=length, axis_name=axis_name)

    step = make_train_step(
        loss_fn,
        optimizer,
        weights_fn=weights_fn,
        num_microbatches=config.gradient_accumulation_steps,
        skip_nonfinite=config.skip_nonfinite,
    )

    def update(
        state: TrainState, ref_params: Params, prompts: Prompts, completions: Completions, rewards: Array, key: Key
    ) -> tuple[TrainState, Metrics]:
        prompt_ids, prompt_mask = (jnp.repeat(x, config.num_generations, axis=0) for x in prompts[:2])
        rows = prompt_ids, prompt_mask, completions.ids, completions.mask
        experience = Experience(
            *rows,
            advantages=group_relative_advantages(rewards, config.num_generations, scale_rewards=config.scale_rewards),
            # On the first update the policy is the one that sampled: its ratio is one, by definition.
            old_log_probs=completions.log_probs if config.num_iterations > 1 else None,
            ref_log_probs=None if ref_params is None else score(ref_params, *rows).log_probs,
        )
        metrics = rollout_metrics(completions, rewards, config.num_generations)
        state, learned = jax.lax.scan(
            lambda state, _: step(state, experience, key), state, length=config.num_iterations
        )
        return state, metrics | jax.tree.map(lambda values: values[-1], learned)

    return update


def make_grpo_iteration(
    apply: Apply,
    head_kernel: HeadKernel,
    optimizer: optax.GradientTransformation,
    reward: TraceableReward,
    config: Config,
    *,
    eos_id: int,
    pad_id: int,
):
    """Makes a whole iteration, `iteration(state, prompts, key, ref_params=None) -> (state, metrics, completions)`.

    Sampling, rewards, advantages and updates are one pure function: jit it, vmap it over states and keys for independent
    seeds, or scan it over prompts.

    Args:
        apply: The model, such as `module.apply`.
        head_kernel: The kernel of the model's head, from its parameters.
        optimizer: Any optax transformation.
        reward: `reward(completions, columns) -> [rows]`, traceable.
        config: Settings; numbers such as `epsilon` and `beta` may be traced.
        eos_id: The token that ends a completion.
        pad_id: Fills completions after their end.
    """
    sample = make_sampler(apply, config, eos_id=eos_id, pad_id=pad_id)
    update = make_update(apply, head_kernel, optimizer, config)

    def iteration(
        state: TrainState, prompts: Prompts, key: Key, ref_params: Params = None
    ) -> tuple[TrainState, Metrics, Completions]:
        sample_key, update_key = jax.random.split(jax.random.fold_in(key, state.step))
        completions = sample(state.params, sample_key, prompts)
        columns = {name: jnp.repeat(x, config.num_generations, axis=0) for name, x in prompts.columns.items()}
        rewards = reward(completions, columns)
        state, metrics = update(state, ref_params, prompts, completions, rewards, update_key)
        return state, metrics, completions

    return iteration


def rollout_metrics(completions: Completions, rewards: Float[Array, " rows"], group_size: int) -> Metrics:
    """Computes what TRL logs of completions and rewards; NaN rewards do not count."""
    valid = ~jnp.isnan(rewards)
    groups, group_valid = rewards.reshape(-1, group_size), valid.reshape(-1, group_size)
    stds = jax.vmap(masked_std)(groups, group_valid)
    # By comparison: the deviation of equal rewards may be a rounding error instead of 0.
    lowest, highest = (jnp.min(jnp.where(group_valid, sign * groups, jnp.inf), axis=1) for sign in (1, -1))
    lengths, ended = completions.mask.sum(-1), ~completions.mask[:, -1]
    gap = jnp.abs(completions.log_probs - completions.sampling_log_probs)
    return {
        "reward": masked_mean(rewards, valid),
        "reward_std": stds.mean(),
        "frac_reward_zero_std": jnp.mean(lowest >= -highest),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - ended.mean(),
        "sampling/sampling_logp_difference/mean": masked_mean(gap, completions.mask),
        "sampling/sampling_logp_difference/max": jnp.max(jnp.where(completions.mask, gap, 0)),
    }


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `model` (folder of the trained model), and the mean reward of greedy completions of held-out prompts before and
        after: `eval_reward_before`, `eval_reward`.

    Raises:
        ValueError: If a setting, a row of the data or a reward function is wrong.
    """
    validate(config)
    init_key, train_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
    model = load_model(config, init_key)
    train, held_out = _tables(model, config)
    tokens = max(train.length, held_out.length) + config.max_completion_length - 1
    require_room(model, tokens, "lower max_prompt_length or max_completion_length")
    facts(
        f"GRPO on {config.dataset}",
        {
            "training": f"{len(train.tokens)} prompts",
            "held out": f"{len(held_out.tokens)} prompts",
            "parameters": model.num_params,
            "folder": config.output_dir,
        },
    )
    updates = config.max_steps * config.num_iterations
    optimizer, schedule = config.optimizer(updates), config.schedule(updates)
    # A copy, for the step gives the memory of its state away.
    ref_params = jax.tree.map(jnp.copy, model.params) if config.beta > 0 else None
    rewards = load_rewards(model, config)
    iterate = _compiled_iteration(model, optimizer, rewards, train, config)
    held_out_reward = make_evaluation(model, rewards, held_out, config)

    def update(state: TrainState, index: int) -> tuple[TrainState, dict[str, Any]]:
        indices = batch_indices(len(train.tokens), config.num_prompts, seed=config.seed, step=index)
        state, metrics = iterate(state, indices, train_key, ref_params)
        return state, metrics | {"learning_rate": schedule(index * config.num_iterations)}

    def evaluate(state: TrainState) -> dict[str, Any]:
        return {"eval_reward": held_out_reward(state.params, eval_key)}

    before = float(held_out_reward(model.params, eval_key))
    state, complete_run = training_loop(
        config,
        init_train_state(model.params, optimizer),
        update,
        total_steps=config.max_steps,
        label="grpo",
        evaluate=evaluate,
        show=("reward", "eval_reward", "completions/mean_length", "entropy"),
    )
    figures: dict[str, Any] = {"eval_reward_before": before, "eval_reward": float(evaluate(state)["eval_reward"])}
    if complete_run:
        figures["model"] = str(Path(config.output_dir) / "model")
        save_pretrained(figures["model"], model.module, state.params, model.tokenizer)
    facts("Result", figures)
    return figures


def _tables(model: LanguageModel, config: Config) -> list[PromptTable]:
    """Reads the dataset; returns its training and its held-out prompts."""
    examples = [prompt_example(row) for row in load_rows(config.dataset, config.split)]
    train, held_out = split_indices(len(examples), held_out=config.eval_fraction, seed=0)
    spread = np.linspace(0, len(held_out) - 1, min(config.eval_prompts, len(held_out))).round().astype(int)
    return [
        make_prompt_table(model, [examples[i] for i in part], max_prompt_length=config.max_prompt_length)
        for part in (train, held_out[spread])
    ]


def load_rewards(model: LanguageModel, config: Config) -> HostRewards | TracedRewards:
    """Loads the reward functions that the settings name."""
    if config.traceable_rewards:
        eos_id = model.tokenizer.eos_token_id
        return TracedRewards(model, load_traceable_reward(config.reward_funcs, config.reward_weights, eos_id))
    return HostRewards(model, [load_reward(name) for name in config.reward_funcs], config.reward_weights or None)


def _compiled_iteration(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    rewards: HostRewards | TracedRewards,
    table: PromptTable,
    config: Config,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Makes `iterate(state, indices, key, ref_params)`: one program, or two with the rewards on the host between them."""
    ids = {"eos_id": model.tokenizer.eos_token_id, "pad_id": model.pad_id}
    if isinstance(rewards, TracedRewards):
        iteration = make_grpo_iteration(model.apply, model.head_kernel, optimizer, rewards.reward, config, **ids)
        compiled = jax.jit(iteration, donate_argnums=0)

        def iterate(state, indices, key, ref_params):
            return compiled(state, table.batch(indices, model.pad_id), key, ref_params)[:2]

        return iterate
    sample = jax.jit(make_sampler(model.apply, config, **ids))
    update = jax.jit(make_update(model.apply, model.head_kernel, optimizer, config), donate_argnums=0)

    def iterate_with_host(state, indices, key, ref_params):
        sample_key, update_key = jax.random.split(jax.random.fold_in(key, state.step))
        prompts = table.batch(indices, model.pad_id)
        completions = sample(state.params, sample_key, prompts)
        totals, reward_metrics = rewards(table, indices, completions)
        state, metrics = update(state, ref_params, prompts, completions, jnp.asarray(totals), update_key)
        return state, metrics | reward_metrics

    return iterate_with_host


def make_evaluation(
    model: LanguageModel, rewards: HostRewards | TracedRewards, table: PromptTable, config: Config
) -> Callable[[Params, Key], float]:
    """Makes `evaluate(params, key)`: the mean reward of greedy completions of all prompts of a table."""
    greedy = dataclasses.replace(config, num_generations=1, temperature=0.0, repetition_penalty=1.0)
    ids = {"eos_id": model.tokenizer.eos_token_id, "pad_id": model.pad_id}
    sample = jax.jit(make_sampler(model.apply, greedy, **ids))
    count = len(table.tokens)
    size = min(count, 256)

    def evaluate(params: Params, key: Key) -> float:
        total = []
        for start in range(0, count, size):
            indices = np.arange(start, start + size) % count  # the last batch is filled up with the first prompts
            completions = sample(params, key, table.batch(indices, model.pad_id))
            total.append(np.asarray(rewards(table, indices, completions)[0])[: count - start])
        given = np.concatenate(total)
        given = given[~np.isnan(given)]
        return float(given.mean()) if given.size else float("nan")

    return evaluate
