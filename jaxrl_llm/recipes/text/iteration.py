"""One iteration of every recipe that learns from what the model itself writes, as pure functions.

Sample `num_generations` completions of each prompt, reward them, and make `num_iterations` × `num_minibatches` updates. A
recipe brings a `Method`: what it makes of rewards, and a loss. With a traceable reward the whole iteration is one
function, `make_iteration`: jit it, vmap it over seeds and settings, scan it. `online.py` runs iterations one by one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.losses import mask_truncated_completions
from jaxrl_llm.recipes.options import ModelOptions, RunOptions, require, require_at_least
from jaxrl_llm.recipes.text.experience import Experience, Policy, Rollout, rollout_metrics
from jaxrl_llm.recipes.text.prompts import Prompts, TraceableReward
from jaxrl_llm.reductions import average_metrics
from jaxrl_llm.rewards import OnError
from jaxrl_llm.rollouts import Completions, generate
from jaxrl_llm.training import TrainState, init_train_state, make_train_step
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineOptions(RunOptions, ModelOptions):
    """Settings of a run that learns from its own completions."""

    dataset: str = "sums"
    """`sums`, a .json, .jsonl or .parquet file, or the name of a dataset; rows with `prompt` and columns for rewards."""
    split: str = "train"
    """Split of a dataset that has several."""
    eval_fraction: float = 0.1
    """Share of the rows that is held out for evaluation."""
    max_prompt_length: int = 256
    """Longer prompts are left out, in tokens."""
    reward_funcs: tuple[str, ...] = ("exact_match",)
    """Rewards: short names (see `jaxrl_llm.rewards`), package.module:function, path/file.py:function, reward_model:folder."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function; empty: all 1."""
    traceable_rewards: bool = False
    """Compile the whole iteration. Rewards are JAX functions of `completion_ids`, `completion_mask` and columns (`x_ids`)."""
    reward_errors: OnError = "raise"
    """What happens where a reward raises or is not finite: `raise`, or `ignore`: it does not apply there, and is counted."""
    reward_timeout: float = 0.0
    """Seconds that a reward function may take for the completions of an iteration; 0: no limit."""
    num_prompts: int = 32
    """Prompts of an iteration."""
    num_generations: int = 8
    """Completions of each prompt."""
    rollout_batch_size: int = 0
    """Prompts that are sampled at once, a divisor of num_prompts: less memory, the same samples. 0: all."""
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
    mask_truncated_completions: bool = False
    """Do not learn from completions that were cut before their end."""
    num_iterations: int = 1
    """Passes of updates over the completions of one iteration."""
    num_minibatches: int = 1
    """Updates of a pass, each on a part of the completions; all of them together where 1."""
    max_steps: int = 200
    """Iterations of the run."""
    eval_prompts: int = 512
    """Held-out prompts that an evaluation completes greedily, at most; evenly spread where there are more."""
    num_completions_to_print: int = 0
    """Completions of the last iteration that every evaluation prints as a table; 8 go into samples.jsonl in any case."""

    @property
    def num_rows(self) -> int:
        """Completions of an iteration."""
        return self.num_prompts * self.num_generations

    @property
    def updates_per_step(self) -> int:
        """Updates of an iteration."""
        return self.num_iterations * self.num_minibatches

    @property
    def parts(self) -> int:
        """Parts into which the rows of an update are split, one after the other."""
        return getattr(self, "gradient_accumulation_steps", 1)

    @property
    def scoring_parts(self) -> int:
        """Parts in which all rows of an iteration are scored: as many rows at once as an update takes."""
        return self.num_minibatches * self.parts

    def validate_online(self) -> None:
        """Checks the values."""
        self.validate_run()
        self.validate_model()
        sizes = ("max_prompt_length", "num_prompts", "num_generations", "max_completion_length", "num_iterations")
        sizes += ("num_minibatches", "max_steps", "eval_prompts")
        require_at_least(1, **{name: getattr(self, name) for name in sizes})
        counts = ("rollout_batch_size", "top_k", "num_completions_to_print")
        require_at_least(0, **{name: getattr(self, name) for name in counts})
        rows, per_update = self.num_rows, self.num_rows // self.num_minibatches
        require(
            "num_minibatches", self.num_minibatches, f"a divisor of the {rows} completions", lambda k: rows % k == 0
        )
        meant = f"a divisor of the {per_update} completions of an update"
        require("gradient_accumulation_steps", self.parts, meant, lambda k: per_update % k == 0)
        meant = f"a divisor of num_prompts={self.num_prompts}"
        at_once = self.rollout_batch_size
        require("rollout_batch_size", at_once, meant, lambda size: size == 0 or self.num_prompts % size == 0)
        rates = self.dropout, self.lora_dropout
        require(
            "dropout and lora_dropout", rates, "0: completions are scored as they were sampled", lambda r: not any(r)
        )
        require("temperature", self.temperature, "positive: greedy completions are all alike", lambda t: t > 0)
        require("top_p", self.top_p, "in (0, 1]", lambda p: 0 < p <= 1)
        require("min_p", self.min_p, "in [0, 1]", lambda p: 0 <= p <= 1)
        require("repetition_penalty", self.repetition_penalty, "positive", lambda penalty: penalty > 0)
        require("eval_fraction", self.eval_fraction, "between 0 and 1", lambda share: 0 < share < 1)
        require("reward_timeout", self.reward_timeout, "at least 0", lambda seconds: seconds >= 0)
        host = self.reward_timeout, self.reward_errors
        meant = "0 and raise with traceable_rewards, where what is not finite does not apply"
        require(
            "reward_timeout and reward_errors", host, meant, lambda h: h == (0, "raise") or not self.traceable_rewards
        )
        require("reward_funcs", self.reward_funcs, "at least one function", bool)
        weights, count = self.reward_weights, len(self.reward_funcs)
        require("reward_weights", weights, f"{count} numbers or none", lambda w: len(w) in (0, count))


class OnlineState(NamedTuple):
    """What a run changes.

    Attributes:
        train: The parameters that are trained, and their optimizer.
        carry: What the method carries from iteration to iteration, such as an adaptive coefficient.
    """

    train: TrainState
    carry: Any


class Method(NamedTuple):
    """What a recipe brings; all functions are pure and traceable, and `params` are the parameters that are trained.

    Attributes:
        label: What is running.
        gather: `gather(policy, params, ref_params, rollout, loss_mask, carry) -> (experience, metrics)`, of all rows.
        loss: `loss(policy, params, batch, key) -> (loss, metrics)`, of some rows.
        weights: `weights(batch, axis_name)`: weights of the terms of the loss, of all rows of an update.
        start: `start(key, params) -> params`: what is trained, from the trained parameters of the language model.
        policy_params: `policy_params(params)`: the part that samples.
        carry: What is carried into the first iteration.
        next_carry: `next_carry(carry, metrics) -> carry`.
        extra_args: `extra_args(policy, params, batch, key)`: more arguments of the optimizer's update, or None.
        optimizer_metrics: `optimizer_metrics(opt_state)`, or None.
        show: Metrics of the progress line.
    """

    label: str
    gather: Callable[..., tuple[Experience, Metrics]]
    loss: Callable[[Policy, Params, Experience, Key], tuple[Scalar, Metrics]]
    weights: Callable[[Experience, str | None], Any]
    start: Callable[[Key, Params], Params] = lambda key, params: params
    policy_params: Callable[[Params], Params] = lambda params: params
    carry: Any = ()
    next_carry: Callable[[Any, Metrics], Any] = lambda carry, metrics: carry
    extra_args: Callable[[Policy, Params, Experience, Key], dict[str, Any]] | None = None
    optimizer_metrics: Callable[[optax.OptState], Metrics] | None = None
    show: Sequence[str] = ("reward", "eval_reward", "completions/mean_length", "entropy")


def start_state(method: Method, params: Params, optimizer: optax.GradientTransformation) -> OnlineState:
    """Makes the state before the first iteration, of the parameters that are trained (see `Method.start`)."""
    return OnlineState(init_train_state(params, optimizer), method.carry)


def make_sampler(policy: Policy, config: OnlineOptions, *, eos_ids: Sequence[int], pad_id: int):
    """Makes `sample(params, key, prompts) -> Completions`, `num_generations` rows for each prompt."""

    def sample(params: Params, key: Key, prompts: Prompts) -> Completions:
        def some(part: tuple[Array, Array, Array]) -> Completions:
            ids, mask, first_row = part
            return generate(
                policy.apply,
                params,
                key,
                ids,
                mask,
                max_new_tokens=config.max_completion_length,
                num_generations=config.num_generations,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
                repetition_penalty=config.repetition_penalty,
                eos_id=tuple(eos_ids),
                pad_id=pad_id,
                first_row=first_row,
            )

        count = prompts.ids.shape[0]
        at_once = config.rollout_batch_size or count
        if at_once >= count:
            return some((prompts.ids, prompts.mask, jnp.int32(0)))
        first_rows = jnp.arange(count // at_once) * at_once * config.num_generations
        ids, mask = (x.reshape(-1, at_once, x.shape[1]) for x in (prompts.ids, prompts.mask))
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), jax.lax.map(some, (ids, mask, first_rows)))

    return sample


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    method: Method,
    config: OnlineOptions,
    *,
    eos_ids: Sequence[int],
):
    """Makes `update(state, ref_params, rollout, key) -> (state, metrics)`: all updates of one iteration.

    Completions are scored at the temperature of the config, at which they are sampled.
    """
    policy = policy._replace(temperature=config.temperature, chunk_size=config.chunk_size)

    def loss_fn(params: Params, batch: Experience, key: Key) -> tuple[Scalar, Metrics]:
        return method.loss(policy, params, batch, key)

    def extra_args(params: Params, batch: Experience, key: Key) -> dict[str, Any]:
        assert method.extra_args is not None
        return method.extra_args(policy, params, batch, key)

    step = make_train_step(
        loss_fn,
        optimizer,
        weights_fn=method.weights,
        num_microbatches=config.parts,
        skip_nonfinite=getattr(config, "skip_nonfinite", False),
        extra_args_fn=None if method.extra_args is None else extra_args,
        optimizer_metrics_fn=method.optimizer_metrics,
    )

    def update(
        state: OnlineState, ref_params: Params | None, rollout: Rollout, key: Key
    ) -> tuple[OnlineState, Metrics]:
        completions = rollout.completions
        ended = mask_truncated_completions(completions.ids, completions.mask, jnp.array(eos_ids))
        rewards = rollout.total_rewards(config.reward_weights)
        metrics = rollout_metrics(completions, rewards, config.num_generations, ended.any(-1))
        loss_mask = ended if config.mask_truncated_completions else completions.mask
        experience, gathered = method.gather(policy, state.train.params, ref_params, rollout, loss_mask, state.carry)
        train, learned = repeat_updates(step, state.train, experience, key, config)
        metrics |= gathered | learned
        return OnlineState(train, method.next_carry(state.carry, metrics)), metrics

    return update


def repeat_updates(
    step: Callable[[TrainState, Experience, Key], tuple[TrainState, Metrics]],
    state: TrainState,
    experience: Experience,
    key: Key,
    config: OnlineOptions,
) -> tuple[TrainState, Metrics]:
    """Makes the updates of an iteration, on mini-batches that are drawn anew in every pass.

    Metrics are means over the updates, or the least and largest where their names say so; those of the sampler
    (`sampling/…`) are the first update's, before the parameters have moved.
    """
    if config.num_minibatches == 1:
        state, metrics = jax.lax.scan(
            lambda state, _: step(state, experience, key), state, length=config.num_iterations
        )
    else:
        rows = experience.completion_ids.shape[0]
        key, order_key = jax.random.split(key)
        order_keys = jax.random.split(order_key, config.num_iterations)
        orders = jax.vmap(lambda key: jax.random.permutation(key, rows))(order_keys)

        def one(state: TrainState, chosen: Array) -> tuple[TrainState, Metrics]:
            return step(state, jax.tree.map(lambda x: x[chosen], experience), key)

        parts = orders.reshape(config.updates_per_step, rows // config.num_minibatches)
        state, metrics = jax.lax.scan(one, state, parts)
    first = {name: values[0] for name, values in metrics.items() if name.startswith("sampling/")}
    return state, average_metrics(metrics) | first


def make_iteration(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    method: Method,
    reward: TraceableReward,
    config: OnlineOptions,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
):
    """Makes a whole iteration, `iteration(state, prompts, key, ref_params=None) -> (state, metrics, rollout)`.

    Sampling, rewards, advantages and updates are one pure function: jit it, vmap it over states and keys for independent
    seeds, or scan it over prompts. Numbers that enter the loss, such as `epsilon` and `beta`, may be traced.

    Args:
        policy: The model.
        optimizer: Any optax transformation.
        method: What is learned from rewards.
        reward: `reward(completions, columns) -> [rows]` or `[rows, functions]`, traceable.
        config: Settings.
        eos_ids: The tokens that end a completion.
        pad_id: Fills completions after their end.
    """
    sample = make_sampler(policy, config, eos_ids=eos_ids, pad_id=pad_id)
    update = make_update(policy, optimizer, method, config, eos_ids=eos_ids)

    def iteration(
        state: OnlineState, prompts: Prompts, key: Key, ref_params: Params | None = None
    ) -> tuple[OnlineState, Metrics, Rollout]:
        sample_key, update_key = iteration_keys(key, state)
        completions = sample(method.policy_params(state.train.params), sample_key, prompts)
        columns = {name: jnp.repeat(x, config.num_generations, axis=0) for name, x in prompts.columns.items()}
        rollout = as_rollout(prompts, completions, reward(completions, columns), config.num_generations)
        state, metrics = update(state, ref_params, rollout, update_key)
        return state, metrics, rollout

    return iteration


def iteration_keys(key: Key, state: OnlineState) -> tuple[Key, Key]:
    """Derives the keys of an iteration from that of the run: of sampling, and of the updates."""
    sample_key, update_key = jax.random.split(jax.random.fold_in(key, state.train.step))
    return sample_key, update_key


def as_rollout(
    prompts: Prompts, completions: Completions, rewards: Float[Array, "rows *functions"], num_generations: int
) -> Rollout:
    """Puts prompts, completions and rewards together."""
    ids, mask = (jnp.repeat(x, num_generations, axis=0) for x in prompts[:2])
    return Rollout(ids, mask, completions, jnp.asarray(rewards, jnp.float32).reshape(ids.shape[0], -1))
